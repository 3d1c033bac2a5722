"""Options that more than one command of the command line takes, and how their words are read."""

import re
from pathlib import Path
from typing import Annotated

import typer

from sola_edge.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]
Align = Annotated[
    str, typer.Option(help="Round ranks and numbers of neurons to this multiple; auto: 256, 32 or 8 by size.")
]
Calibration = Annotated[str, typer.Option(help="A .txt or .jsonl file, a hub data set, or a built-in text.")]
Window = Annotated[int, typer.Option(help="Tokens per calibration window.")]
Windows = Annotated[int | None, typer.Option(help="Calibration windows to use, at most.")]
GradientWindows = Annotated[
    int | None, typer.Option(help="Of them, how many gradients are taken on; 0: none; default: all.")
]
CorrectionWindows = Annotated[
    int, typer.Option(help="Of those, how many later layers are corrected on; 0: no correction.")
]
Device = Annotated[
    str, typer.Option(help="cpu or cuda: where statistics and linear algebra run (files run on the CPU).")
]
OnDevice = Annotated[
    str,
    typer.Option(
        "--device", help="cpu, cuda, vulkan, metal or directml: where the files run, in the runtimes that can."
    ),
]
Text = Annotated[str, typer.Option(help="A .txt or .jsonl file, a hub data set, or a built-in text.")]
Artefacts = Annotated[list[Path], typer.Argument(help="Checkpoint folders, ONNX folders, .gguf files.")]
JsonFile = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the results to this JSON file.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure anew what an earlier run has measured already.")]
Threads = Annotated[int | None, typer.Option(help="Threads per runtime; default: one per core.")]


def alignment(value: str) -> int | None:
    """`auto` (None) or a multiple. Raises UserError."""
    if value == "auto":
        return None
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"align {value!r} is no number: give auto or a multiple such as 8, 32 or 256") from error


def items(value: str, name: str) -> list[str]:
    """The parts of a list with commas, each once. Raises UserError when there is none."""
    found = list(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))
    if not found:
        raise UserError(f"no {name} were named; give one or more, with commas between them")
    return found


def rates(value: str) -> list[float]:
    """Compression rates from a list with commas, each once. Raises UserError for what is no number."""
    parts = items(value, "rates")
    try:
        return list(dict.fromkeys(float(part) for part in parts))
    except ValueError as error:
        raise UserError(f"rates {value!r} holds what is no number; give a list such as 0.2,0.3") from error


SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([kKMGT]?i?)B")
POWERS = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4}


def size(value: str) -> int:
    """Bytes of a size such as 2GB (powers of 1,000) or 512MiB (powers of 1,024). Raises UserError."""
    found = SIZE.fullmatch(value.strip())
    prefix = found[2] if found else "?"
    if found is None or prefix == "i" or not float(found[1]):
        raise UserError(f"size {value!r} is none: give a number above 0 and its unit, such as 2GB, 1.5GiB or 512MiB")
    unit = 1024 if prefix.endswith("i") else 1000
    power = POWERS["k" if prefix[:1] == "K" else prefix[:1]]
    return round(float(found[1]) * unit**power)


def counts(value: str, name: str) -> list[int]:
    """Whole numbers of at least 1 from a list with commas, each once. Raises UserError."""
    parts = items(value, name)
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"{name} {value!r} holds what is no whole number above 0; give a list such as 512,2048")
    return list(dict.fromkeys(map(int, parts)))
