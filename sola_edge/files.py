"""Files and folders that appear whole or not at all.

An output is written beside its target under a temporary name and renamed into place when it is complete, so an
interrupted run leaves the old output or none.
"""

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from sola_edge.errors import UserError

PARTIAL = ".partial"  # how the names of unfinished outputs end


def _temporary_beside(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {target.parent}: {error.strerror}; choose another output") from error
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")


def _check_place(target: Path) -> None:
    """The nearest folder above the target that exists can be written to. Creates nothing."""
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"cannot create the folder {target.parent}: {above} is a file; choose another output")
    if not os.access(above, os.W_OK):
        raise UserError(f"cannot write to the folder {above}: permission denied; choose another output")


@contextlib.contextmanager
def _placing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another output") from error


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_file_target(target: Path) -> None:
    """Refuse a target that cannot become a file, before any minute of computing. Raises UserError."""
    if target.is_dir():
        raise UserError(f"{target} is a folder; give the name of the file to write")
    _check_place(target)


def check_folder_target(target: Path, marker: str) -> None:
    """Refuse a target folder that holds something other than an earlier output of ours.

    `marker` is a file that such an output has (a folder without it is somebody's data and is never replaced).
    Raises UserError.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give the name of a folder to write")
    if target.resolve() in (Path.cwd(), Path(target.absolute().anchor)):
        raise UserError(f"{target} is the folder you are in; give the name of a folder of its own")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).exists():
        raise UserError(f"{target} is not empty and is no earlier output (no {marker} in it); choose another folder")
    _check_place(target)


@contextlib.contextmanager
def replace_file(target: Path) -> Iterator[Path]:
    """Yield a path to write; on success it becomes `target`, on any exception it is deleted. Raises UserError."""
    check_file_target(target)
    target = target.absolute()
    partial = _temporary_beside(target)
    with _placing(target):
        partial.touch()
    try:
        yield partial
        partial.replace(target)
    finally:
        remove(partial)


@contextlib.contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside the target, which is there as long as it is needed. Raises UserError."""
    partial = _temporary_beside(target.absolute())
    with _placing(target):
        partial.mkdir()
    try:
        yield partial
    finally:
        remove(partial)


@contextlib.contextmanager
def replace_parts(targets: Sequence[Path]) -> Iterator[Path]:
    """Yield an empty folder to write files of the targets' names into; on success they take their places. Raises UserError.

    The first is the one that a reader opens. An old one is removed before any other file is replaced, and the new one comes
    last: whoever is interrupted meanwhile has no output, never one that is mixed of two.
    """
    for target in targets:
        check_file_target(target)
    first, *others = targets
    with folder_beside(first) as partial:
        yield partial
        first.unlink(missing_ok=True)
        for target in (*others, first):
            (partial / target.name).replace(target)


@contextlib.contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes `target`, on any exception it is deleted.

    Raises UserError if the place is not writable.
    """
    target = target.absolute()
    partial = _temporary_beside(target)
    old = partial.with_suffix(".old")
    with _placing(target):
        partial.mkdir()
    try:
        yield partial
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        remove(partial)
        remove(old)


def check_room(folder: Path, needed: float, complaint: str) -> None:
    """Raises UserError where the folder's disk has less than so many bytes left; complaint: with {needed} and {free}, in GB."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(complaint.format(needed=needed / 1e9, free=free / 1e9))


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files under a folder."""
    if path.is_dir():
        return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    return path.stat().st_size
