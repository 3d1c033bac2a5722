"""Writes a checkpoint as an ONNX folder that onnxruntime, onnxruntime-genai and optimum open.

model.onnx holds the graph, model.onnx.data every weight, two at a time: the peak is a few times the largest stack of matrices
that share an input. Quantized weights are written one at a time: the peak is the same, of pivoted models the matrices of one
layer besides, and with a text in mind one layer's statistics and some matrices of the size of the largest of them. The folder
appears whole or not at all.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporters.onnx.decoder import Decoder
from exporters.onnx.dialect import Dialect
from exporters.onnx.genai import GenAI
from exporters.onnx.genai_config import write_companions
from exporters.onnx.grams import Grams
from exporters.onnx.graph import GraphBuilder
from exporters.onnx.portable import Portable
from exporters.onnx.precision import Quantization, Weights, weights
from exporters.result import ExportResult
from exporters.support import check_graph, check_supported, choose
from sola_edge import __version__
from sola_edge.checkpoint import Checkpoint, open_checkpoint
from sola_edge.errors import UserError
from sola_edge.files import check_folder_target, replace_folder, size_of
from sola_edge.plain import plain
from sola_edge.progress import track

MODEL, DATA = "model.onnx", "model.onnx.data"
WORKERS, IN_FLIGHT = 2, 2**29  # threads that read, turn and write tensors, and bytes of those being written
MARKER = "sola-edge.json"  # provenance; tells an earlier export of ours from anybody's model
GRAPHS: dict[str, type[Dialect]] = {"genai": GenAI, "portable": Portable}


def export(
    checkpoint_path: str | Path,
    out_dir: str | Path,
    graph: str = "genai",
    precision: str = "fp32",
    quantization: Quantization | None = None,
) -> ExportResult:
    """Export a dense or compressed checkpoint (folder, .gguf or hub id) into the folder `out_dir`.

    The result's `path` is model.onnx. Raises UserError for an unknown graph or precision, choices that do not go with it,
    a checkpoint that cannot be read or expressed, and an `out_dir` that holds anything but an earlier export.
    """
    dialect, stored = choose("graph", graph, GRAPHS), weights(precision, quantization)
    if stored.quantized and not dialect.blocks:
        raise UserError(f"the {graph} graph is not written with weights in blocks; give --graph genai for {precision}")
    folder = Path(out_dir)
    check_folder_target(folder, MARKER)
    checkpoint = open_checkpoint(checkpoint_path)
    check_supported(checkpoint, "ONNX")
    check_graph(checkpoint, graph)
    stored = stored.of(checkpoint)
    provenance = _provenance(checkpoint) | stored.described()
    source = checkpoint
    if stored.quantized:
        checkpoint = plain(source)
    grams = Grams(checkpoint, source, stored.text) if stored.text else None
    if grams:
        provenance["rounding"] = json.dumps({"method": "gptq", **grams.describe()})
    builder = build(checkpoint, dialect, stored, grams)
    if grams:
        grams.collect()  # minutes, after all that may be refused
    metadata = {
        key: content if isinstance(content, str) else json.dumps(content) for key, content in provenance.items()
    }
    model = builder.model(checkpoint.config.model_type, "sola-edge", __version__, metadata)
    with replace_folder(folder) as partial:
        (partial / MARKER).write_text(json.dumps(provenance, indent=2) + "\n")
        write_companions(checkpoint, partial, MODEL, provenance, shared_cache=dialect.shared_cache)
        # what is quantized or made plain keeps its last matrix for its other parts, which is not for several threads
        _save(model, partial, workers=1 if stored.quantized else WORKERS)
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
    return ExportResult(folder / MODEL, files, size_of(folder))


def build(checkpoint: Checkpoint, dialect: type[Dialect], stored: Weights, grams: Grams | None = None) -> GraphBuilder:
    """The graph of a checkpoint, its weights not read yet. Raises UserError for what it cannot express."""
    builder = GraphBuilder(stored.precision, dialect.opsets)
    Decoder(checkpoint, builder, dialect, stored, grams).build()
    return builder


def _provenance(checkpoint: Checkpoint) -> dict[str, str]:
    """Where a graph comes from: the source model, how it was compressed (if it was), and this tool."""
    recorded = checkpoint.provenance
    rows = {"tool": f"sola-edge {__version__}", "source": recorded.get("source", {}).get("name", checkpoint.path.name)}
    rows |= {key: str(recorded[key]) for key in ("method", "rate") if key in recorded}
    if "plan" in recorded:
        plan = json.dumps(recorded["plan"], sort_keys=True).encode()
        rows["plan_sha256"] = hashlib.sha256(plan).hexdigest()
    return rows


def _save(model: ir.Model, folder: Path, workers: int) -> None:
    """Stream every initializer to one external-data file; constants stay in the graph."""
    with _bar(len(model.graph.initializers), "writing ONNX weights") as advance:
        try:
            ir.save(
                model,
                folder / MODEL,
                external_data=DATA,
                size_threshold_bytes=0,
                callback=advance,
                max_workers=workers,
                max_in_flight_bytes=IN_FLIGHT,
            )
        except OSError as error:  # the disk is full, for example
            raise UserError(f"cannot write {DATA}: {error.strerror or error}; choose another output") from error


@contextmanager
def _bar(count: int, description: str) -> Iterator[Callable[..., None]]:
    """A progress bar that each call of the yielded function advances by one."""
    steps = track(range(count + 1), description, total=count)
    next(steps)

    def advance(*_: Any) -> None:
        next(steps)

    yield advance
    for _ in steps:
        pass
