"""The commands `compare` and `explain`: thin, as in cli.py, and importing what they need only when they run."""

from pathlib import Path
from typing import Annotated

import typer

from sola_edge.cli_options import (
    Align,
    Calibration,
    CorrectionWindows,
    Device,
    GradientWindows,
    Json,
    Text,
    Threads,
    Window,
    Windows,
    alignment,
    items,
    rates,
)
from sola_edge.config import CompressionSettings
from sola_edge.texts import DEFAULT_CALIBRATION, DEFAULT_SCORING


def add_commands(app: typer.Typer) -> None:
    """Register both commands."""
    app.command()(compare)
    app.command()(explain)


def compare(
    model: Annotated[str, typer.Argument(help="A dense model: a hub id, a folder, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; a comparison begun there goes on.")],
    rates_: Annotated[str, typer.Option("--rates", help="Compression rates, with commas between them.")] = "0.2,0.3",
    methods: Annotated[
        str, typer.Option(help="METHOD[:OPTION…] with commas between them.")
    ] = "sola,sola-paper,svd-llm,flap",
    calibration: Calibration = DEFAULT_CALIBRATION,
    align: Align = "auto",
    window: Window = CompressionSettings.window,
    windows: Windows = CompressionSettings.max_windows,
    gradient_windows: GradientWindows = CompressionSettings.gradient_windows,
    correction_windows: CorrectionWindows = CompressionSettings.correction_windows,
    device: Device = "cpu",
    text: Text = DEFAULT_SCORING,
    context: Annotated[int, typer.Option(help="Tokens per scored window.")] = 2048,
    test_windows: Annotated[int, typer.Option(help="Windows to score.")] = 40,
    task: Annotated[
        list[Path] | None, typer.Option(help="Zero-shot too: a task file as of `check tasks`; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task, from its start; default: all.")] = None,
    threads: Threads = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the compressed checkpoints in OUT/checkpoints.")] = False,
    as_json: Json = False,
) -> None:
    """Compress a model by several methods at several rates, and compare their perplexities with the dense model's.

    Options of a method: narrow, hybrid; plain, pivoted, auto; no-gradients; no-correction.

    Example: sola-edge compare SmolLM2.gguf build/compared --rates 0.2,0.3 --methods sola,sola:narrow,svd-llm
    """
    asked = rates(rates_)
    labels = items(methods, "methods")
    multiple = alignment(align)
    from runtime_checks.compare import Scoring
    from runtime_checks.compare import compare as run
    from runtime_checks.compare_table import print_comparison
    from runtime_checks.study import Common

    common = Common(
        calibration=calibration,
        align=multiple,
        window=window,
        windows=windows,
        gradient_windows=gradient_windows,
        correction_windows=correction_windows,
        device=device,
    )
    scoring = Scoring(text, context, test_windows, threads, tuple(task or ()), limit)
    found = run(model, out, labels, asked, common, scoring, keep=keep)
    if as_json:
        print(found.model_dump_json())
    else:
        print_comparison(found)
        print(f"compared: {out / 'compare.md'}, compare.json, compare.png")
    if not found.passed:
        raise typer.Exit(1)


def explain(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `sola-edge compress` wrote.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write this HTML page.")] = None,
    compared: Annotated[
        Path | None, typer.Option("--compare", help="A compare.json: its predictions go on the page.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what was done to every layer of a compressed checkpoint, and why: forms, ranks, predicted loss, activations.

    Example: sola-edge explain build/small -o build/small.html
    """
    from runtime_checks.explain import explain as run
    from runtime_checks.explain_page import write_page
    from runtime_checks.explain_table import print_explanation

    found = run(checkpoint)
    if compared is not None and output is None:
        from sola_edge.errors import UserError

        raise UserError("--compare is drawn on the page; give its name with -o page.html too")
    if output is not None:
        write_page(found, output, compared)
    if as_json:
        print(found.model_dump_json())
    else:
        print_explanation(found)
        if output is not None:
            print(f"page: {output}")
