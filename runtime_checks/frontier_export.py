"""Into which files a frontier's models go: one row per format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporters.gguf import BLOCKS, TYPES, Importance
from exporters.gguf import export as export_gguf
from exporters.gguf.llama_quantize import tools
from exporters.onnx import PRECISIONS, Quantization
from exporters.onnx import export as export_onnx
from exporters.support import check_graph, check_supported
from runtime_checks.artefacts import open_artefact
from runtime_checks.frontier_schema import Artefact
from runtime_checks.runtimes import RUNTIMES, RuntimeRow
from sola_edge.checkpoint import Checkpoint
from sola_edge.errors import UserError
from sola_edge.files import sha256_file

EXPORT_FORMAT = 2  # of what our exporters write: another number is another protocol of a frontier


@dataclass(frozen=True)
class Written:
    """What an export tells beside the file; see frontier_schema.Artefact."""

    stored_otherwise: int = 0
    expanded: int = 0


@dataclass(frozen=True)
class Format:
    """A format: its types, the one that the dense model is the baseline in, how it is checked and written.

    write(checkpoint, target, type, importance) writes the file or folder `target`.
    """

    kind: str
    types: tuple[str, ...]
    base: str
    suffix: str
    check: Callable[[Checkpoint, str], None]
    write: Callable[[Path, Path, str, Importance | None], Written]


def _check_gguf(source: Checkpoint, type: str) -> None:
    check_supported(source, "GGUF")
    if type in BLOCKS:
        tools(type)


def _write_gguf(checkpoint: Path, target: Path, type: str, importance: Importance | None) -> Written:
    made = export_gguf(checkpoint, target, type=type, importance=importance if type in BLOCKS else None)
    return Written(len(made.fallbacks), len(made.expanded))


def _check_onnx(source: Checkpoint, type: str) -> None:
    check_supported(source, "ONNX")
    check_graph(source, "genai")


def _write_onnx(checkpoint: Path, target: Path, type: str, importance: Importance | None) -> Written:
    precision, quantization = ONNX_TYPES[type]
    export_onnx(checkpoint, target, precision=precision, quantization=quantization)
    return Written()


# by the names that artefacts have: int8 multiplies in fp32 unless it is told otherwise, and is slow
ONNX_TYPES = {name: (name, Quantization()) for name in PRECISIONS} | {
    "int8-a8": ("int8", Quantization(int8_activations=True))
}


FORMATS = {
    row.kind: row
    for row in (
        Format("gguf", (*TYPES, *BLOCKS), "f16", ".gguf", _check_gguf, _write_gguf),
        Format("onnx", tuple(ONNX_TYPES), "fp32", "-onnx", _check_onnx, _write_onnx),
    )
}


def runtime_rows(names: Sequence[str]) -> list[RuntimeRow]:
    """The rows of runtimes. Raises UserError for one that is unknown, takes no exported file, or is not here."""
    found = []
    for name in names:
        row = RUNTIMES.get(name)
        if row is None or row.kind not in FORMATS:
            known = ", ".join(row.name for row in RUNTIMES.values() if row.kind in FORMATS)
            raise UserError(f"there is no runtime {name!r} for exported files; choose of: {known}")
        reason = row.missing()
        if reason:
            raise UserError(f"{name} cannot be run: {reason}")
        found.append(row)
    return found


def types_of(row: RuntimeRow, asked: Sequence[str]) -> list[str]:
    """Those of the asked types that the runtime's format has."""
    return [name for name in asked if name in FORMATS[row.kind].types]


def check_types(rows: Sequence[RuntimeRow], asked: Sequence[str]) -> None:
    """Raises UserError for a type that no runtime here takes, and a runtime that no type is for."""
    for name in asked:
        if not any(types_of(row, [name]) for row in rows):
            known = [n for kind in dict.fromkeys(row.kind for row in rows) for n in FORMATS[kind].types]
            raise UserError(f"type {name!r} is for none of the runtimes; choose of: {', '.join(dict.fromkeys(known))}")
    for row in rows:
        if not types_of(row, asked):
            raise UserError(f"no type is for {row.name}; add one of: {', '.join(FORMATS[row.kind].types)}")


def describe(path: Path, written: Written) -> Artefact:
    """Size, precision and hashes of what was written."""
    found = open_artefact(path)
    weights = [path] if path.is_file() else sorted(path.glob("model.onnx*"))
    return Artefact(
        bytes=found.bytes,
        precision=found.precision,
        sha256={file.name: sha256_file(file) for file in weights},
        stored_otherwise=written.stored_otherwise,
        expanded=written.expanded,
    )
