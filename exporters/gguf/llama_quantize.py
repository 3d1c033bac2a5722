"""K- and I-quants: llama.cpp's own tool rounds an F16 file to them, by an importance matrix where one is asked for.

The importance of an input channel is its mean square over a text (llama-imatrix); llama-quantize weighs rounding errors by it.
"""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporters.llama_cpp import Build, find
from exporters.llama_cpp.tools import run_tool
from sola_edge.cores import usable_cores
from sola_edge.errors import UserError
from sola_edge.progress import status
from sola_edge.texts import DEFAULT_CALIBRATION, load_text

SUPER_BLOCK, BLOCK = 256, 32  # values that share a scale of scales; of iq4_nl, that share a scale
BLOCKS = {
    **dict.fromkeys(("q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m"), SUPER_BLOCK),
    **dict.fromkeys(("q5_k_s", "q5_k_m", "q6_k", "iq4_xs", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs"), SUPER_BLOCK),
    **dict.fromkeys(("iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"), SUPER_BLOCK),
    "iq4_nl": BLOCK,
}
"""Type → values in a block, which the rows of a matrix must be whole ones of."""
PLANNED = re.compile(r"\] (\S+) +- \[ *(\d+)[^]]*\], type = +\w+, size = [^(\n]*MiB -> [^(\n]*MiB \((\w+)\)")
"""A line of llama-quantize's: the tensor's name, the length of its rows, and the type that it is rounded to."""
COUNTED = re.compile(r"^\[ *(\d+)/ *(\d+)\] ", re.MULTILINE)  # the number that each tensor's line begins with
WINDOW = 512  # tokens, llama-imatrix's own
CHARACTERS = 16  # of a token, at most on average: more of a text is not handed over


@dataclass(frozen=True)
class Importance:
    """The text of an importance matrix, as of `compress --calibration`, and how many of its first windows are read.

    Raises UserError for less than one window.
    """

    text: str = DEFAULT_CALIBRATION
    windows: int = 64

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise UserError(f"windows {self.windows} is out of range: give at least 1")


def tools(type: str) -> Build:
    """The build whose tools round to that type. Raises UserError where there is none."""
    build = find()
    if build is None:
        raise UserError(f"type {type} is rounded by llama.cpp's own tool; run `sola-edge llama-cpp build` first")
    return build


def types_of(build: Build, model: Path, type: str, matrix: Path | None) -> dict[str, str]:
    """{tensor: ggml type} that llama-quantize would choose for the file's tensors; it reads none. Raises UserError.

    Without those whose rows are no whole blocks, for which it chooses what fits them. matrix: the importance matrix.
    """
    command = [str(build.tool("llama-quantize")), "--dry-run", *_weighed(matrix), str(model), type.upper()]
    told = _run(command, "llama-quantize does not plan", lambda told: not _cut_short(told))
    if complaint := _cut_short(told):
        raise UserError(f"llama-quantize told only {complaint} tensors of {model}; close other programs and try again")
    return {name: kind for name, columns, kind in PLANNED.findall(told) if int(columns) % BLOCKS[type] == 0}


def _cut_short(told: str) -> str:
    """`n of m` where only n of m tensors have a line, which begins with its number and m; "" where all have theirs."""
    lines = {(int(number), int(count)) for number, count in COUNTED.findall(told)}
    count = max((count for _, count in lines), default=1)
    return f"{len(lines)} of {count}" if len(lines) < count else ""


def _weighed(matrix: Path | None) -> list[str]:
    return ["--imatrix", str(matrix)] if matrix else []


def quantize(build: Build, model: Path, out: Path, type: str, matrix: Path | None, types: Mapping[str, str]) -> None:
    """Round the file `model` (F16) to the type (a key of `BLOCKS`) into the file `out`.

    types: {tensor: ggml type} where that is not llama-quantize's choice: it chooses by names and by how many tensors of a
    kind came before, and counts every part of a factored matrix as one. Rows that are no whole blocks go elsewhere all the
    same. matrix: the importance matrix. Raises UserError where the tool refuses: a type of very few bits without such a matrix.
    """
    with tempfile.TemporaryDirectory(prefix="sola-edge-") as folder:
        chosen = Path(folder) / "types.txt"
        chosen.write_text("".join(f"^{re.escape(name)}$={kind}\n" for name, kind in types.items()))
        asked = [*_weighed(matrix), *(["--tensor-type-file", str(chosen)] if types else [])]
        command = [str(build.tool("llama-quantize")), *asked, str(model), str(out), type.upper(), str(usable_cores())]
        with status(f"llama-quantize to {type}"):
            _run(command, f"llama-quantize cannot make {type}")


def importance_matrix(build: Build, model: Path, folder: Path, importance: Importance) -> Path:
    """The matrix of a text by llama-imatrix, a file in the folder. Raises UserError for a text of less than one window."""
    text, found = folder / "text.txt", folder / "imatrix.gguf"
    text.write_text(load_text(importance.text).joined[: importance.windows * WINDOW * CHARACTERS], encoding="utf-8")
    command = [str(build.tool("llama-imatrix")), "-m", str(model), "-f", str(text), "-o", str(found), "--no-ppl"]
    command += ["-c", str(WINDOW), "--chunks", str(importance.windows), "-t", str(usable_cores()), "-ngl", "0"]
    with status(f"llama-imatrix on {importance.text}"):
        _run(command, f"llama-imatrix cannot read {importance.text}")
    if not found.is_file():
        raise UserError(
            f"{importance.text} is too short for an importance matrix: it needs {2 * WINDOW} tokens; give more"
        )
    return found


def _run(command: Sequence[str], what: str, whole: Callable[[str], bool] = lambda _: True) -> str:
    """What the tool told, see `run_tool`. Raises UserError with its complaint."""
    done, text = run_tool(command, whole)
    if done.returncode:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        told = [line for line in lines if "error" in line.lower() or "failed" in line.lower() or "need" in line.lower()]
        raise UserError(f"{what}: {(told or lines or [f'exit code {done.returncode}'])[0][:300]}")
    return text
