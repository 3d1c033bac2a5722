"""What exporting a large model to ONNX takes, measured on this machine: time beside that of copying the files, resident peak.

    python benchmarks/onnx_export.py            a random model of LLaMA-2-7B's shape in fp16, 13.5 GB; needs 41 GB of disk

Options: --precision fp16  --rounds 3  --work DIR (keeps the checkpoint; what is there is used as it is)  --out FILE.json
--hidden, --ffn, --layers, --heads, --kv-heads, --vocab, --context.

The export is `sola-edge export onnx` in a process of its own, its peak the kernel's figure for that process, pages of the
checkpoint that are mapped into it included. The copy is Python's own of the weights' files; copies and exports take turns, and
each begins with the checkpoint out of the page cache and ends when all is on the disk. Linux only: it drops the pages, and the
kernel's unit of the peak is that of Linux. Nothing is asserted: the table says what was wanted.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from random_models import Shape, work_folder, write_model
from rich import box
from rich.console import Console
from rich.table import Table

from runtime_checks.machine import machine, packages
from sola_edge.errors import UserError
from sola_edge.progress import status

LLAMA_2_7B = Shape(hidden=4096, ffn=11008, layers=32, heads=32, kv_heads=32, vocab=32000, context=4096)
SLOWER = 2.0  # times the copy, at most
PEAK = 2.5e9  # bytes, at most


def seconds(work: Callable[[], Any], sources: list[Path]) -> float:
    """Of the work, from files that are not in memory until everything is on the disk."""
    os.sync()  # pages that are not on the disk yet are not dropped
    for path in sources:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    work()
    os.sync()
    return time.perf_counter() - start


def export(checkpoint: Path, target: Path, precision: str) -> None:
    """In a child process. Raises UserError where it fails."""
    program = "from sola_edge.cli import main; main()"
    command = [sys.executable, "-c", program, "export", "onnx", str(checkpoint), str(target), "--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the export failed: {done.stderr.strip()}")


def copied(sources: list[Path], folder: Path) -> None:
    """Copy the files into a new folder."""
    folder.mkdir()
    for path in sources:
        shutil.copyfile(path, folder / path.name)


def measure(checkpoint: Path, scratch: Path, precision: str, rounds: int) -> dict[str, Any]:
    """Bytes, seconds of copies and exports, and the exports' greatest peak."""
    sources = sorted(checkpoint.glob("*.safetensors"))
    found: dict[str, Any] = {"bytes": sum(path.stat().st_size for path in sources), "copies": [], "exports": []}
    for _ in range(rounds):
        with status("copying"):
            found["copies"].append(seconds(lambda: copied(sources, scratch / "copy"), sources))
        shutil.rmtree(scratch / "copy")
        with status("exporting"):
            found["exports"].append(seconds(lambda: export(checkpoint, scratch / "onnx", precision), sources))
        found["exported_bytes"] = sum(path.stat().st_size for path in (scratch / "onnx").iterdir())
        shutil.rmtree(scratch / "onnx")
    # the largest of this process's children, of which the exports are by far the largest
    found["peak"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return found


def print_found(found: dict[str, Any], console: Console) -> None:
    """One table."""
    table = Table("", "measured", "wanted", box=box.SIMPLE_HEAD)
    table.add_row("checkpoint", f"{found['bytes'] / 1e9:.2f} GB", "")
    table.add_row("export", f"{found['exported_bytes'] / 1e9:.2f} GB", "")
    table.add_row("copying it, s", _shown(found["copies"]), "")
    table.add_row("exporting it, s", _shown(found["exports"]), "")
    ratios = [export / copy for export, copy in zip(found["exports"], found["copies"], strict=True)]
    table.add_row("times as long, by round", _shown(ratios, 2), f"≤ {SLOWER:g}")
    table.add_row("resident peak", f"{found['peak'] / 1e9:.2f} GB", f"≤ {PEAK / 1e9:g} GB")
    console.print(table)


def _shown(values: list[float], digits: int = 1) -> str:
    """The median and all values in their order."""
    return f"{statistics.median(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def parse() -> argparse.Namespace:
    """This process's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoint for another run")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    Shape.add_options(parser, LLAMA_2_7B)
    return parser.parse_args()


def main() -> None:
    """Command line."""
    asked = parse()
    shape = Shape.asked(asked)
    with work_folder(asked.work) as folder:
        checkpoint = folder / f"fp16-{shape.name}"
        if not checkpoint.exists():
            with status("making the model"):
                write_model(checkpoint, shape, {})
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            try:
                found = measure(checkpoint, Path(scratch), asked.precision, asked.rounds)
            except UserError as error:
                raise SystemExit(f"Error: {error}") from error
    print_found(found, Console())
    if asked.out:
        about = {"machine": machine(os.cpu_count() or 1).model_dump(), "packages": packages(), "shape": shape.name}
        asked.out.write_text(json.dumps({**about, **found}, indent=2))


if __name__ == "__main__":
    main()
