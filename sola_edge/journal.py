"""Finished pieces of long work, kept on disk and believed only when their hash still fits.

A piece is one file. It is written beside and renamed into place, then a sidecar `<name>.sha256` says what it must hold,
so after a kill every piece is whole or absent, and work goes on after the last whole one.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sola_edge.errors import UserError
from sola_edge.files import PARTIAL, replace_file, sha256_file


class Journal:
    """The finished pieces in one folder, which is created. Raises UserError when it cannot be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._believed: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot create {folder}: {error.strerror}; set SOLA_EDGE_CACHE to a writable folder"
            ) from error

    def path(self, name: str) -> Path:
        """Where the piece of that name is, or will be."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether the piece is there and holds what was written (its bytes are hashed once per process)."""
        if name in self._believed:
            return True
        piece, sidecar = self.path(name), self._sidecar(name)
        if piece.is_file() and sidecar.is_file() and sha256_file(piece) == sidecar.read_text():
            self._believed.add(name)
        return name in self._believed

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a path to write; the piece exists when the block ends without an exception."""
        self._sidecar(name).unlink(missing_ok=True)
        with replace_file(self.path(name)) as partial:
            yield partial
            digest = sha256_file(partial)
        with replace_file(self._sidecar(name)) as partial:
            partial.write_text(digest)
        self._believed.add(name)

    def remove(self, name: str) -> None:
        """Forget a piece and delete its file."""
        self._believed.discard(name)
        self._sidecar(name).unlink(missing_ok=True)
        self.path(name).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Delete what killed processes were writing; for the holder of the folder's lock."""
        for partial in self.folder.glob(f".*{PARTIAL}"):
            partial.unlink(missing_ok=True)

    def _sidecar(self, name: str) -> Path:
        return self.folder / f"{name}.sha256"
