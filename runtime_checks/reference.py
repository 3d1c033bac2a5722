"""Logits of a reference on every window of a protocol, kept on disk as raw float32, one file per window."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime_checks.generation import Continuation
from runtime_checks.metrics import Comparison, Floats, compare_window, window_nll
from runtime_checks.process import CheckError, Child
from runtime_checks.protocol import Protocol
from sola_edge.files import check_room
from sola_edge.progress import track


@dataclass(frozen=True)
class Reference:
    """What candidates are compared with. `files` hold (context, vocab) float32 each."""

    artefact: str
    runtime: str
    vocab: int
    files: list[Path]
    nll: list[Floats]
    continuation: Continuation | None = None

    def window(self, index: int) -> npt.NDArray[np.float32]:
        """The logits of a window, memory-mapped."""
        return read_logits(self.files[index], self.vocab)


def read_logits(path: Path, vocab: int) -> npt.NDArray[np.float32]:
    """A raw float32 file as (n, vocab), memory-mapped."""
    return np.memmap(path, dtype=np.float32, mode="r").reshape(-1, vocab)


def vocabulary(child: Child, scratch: Path) -> int:
    """Columns of a runtime's logits."""
    return int(child.ask("logits", ids=[1, 2], out=str(scratch / "probe.f32"))["shape"][1])


def check_space(folder: Path, needed: int) -> None:
    """Raises UserError if a folder's disk has not that many bytes (and a tenth more) to spare."""
    complaint = (
        f"the logits need {needed / 1e9:.1f} GB in {folder}, which has {{free:.1f}} GB left; "
        "give fewer or shorter windows, or point TMPDIR at a larger disk"
    )
    check_room(folder, needed * 1.1, complaint)


def write_reference(child: Child, protocol: Protocol, scratch: Path, name: str, description: str) -> Reference:
    """Run the reference over all windows. Raises UserError when the logits would not fit, CheckError when it fails."""
    vocab = vocabulary(child, scratch)
    check_space(scratch, (protocol.windows + 1) * protocol.context * vocab * 4)
    files, nll = [], []
    for index, ids in enumerate(track(list(protocol.ids), description)):
        path = scratch / f"{name}.{index}.f32"
        child.ask("logits", ids=ids.tolist(), out=str(path))
        files.append(path)
        nll.append(window_nll(read_logits(path, vocab), ids))
    return Reference(str(child.path), child.row.label, vocab, files, nll)


def compare_all(
    child: Child, reference: Reference, protocol: Protocol, scratch: Path, description: str
) -> Iterator[Comparison]:
    """Run a candidate over all windows, comparing each with the reference's. Raises CheckError."""
    path = scratch / "candidate.f32"
    for index, ids in enumerate(track(list(protocol.ids), description)):
        rows, vocab = child.ask("logits", ids=ids.tolist(), out=str(path))["shape"]
        if (rows, vocab) != (protocol.context, reference.vocab):
            expected = (protocol.context, reference.vocab)
            raise CheckError(f"{child.row.label} on {child.path}: logits of shape {(rows, vocab)}, expected {expected}")
        yield compare_window(reference.window(index), read_logits(path, vocab), ids)
    path.unlink(missing_ok=True)
