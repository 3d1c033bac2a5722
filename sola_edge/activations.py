"""Activations on disk: as many as the calibration text has, one window of them in memory."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sola_edge.journal import Journal


class Activations:
    """Activations of all windows in one file, float32; `shape` (tokens, width) is one window's, the unit of reading and
    writing.
    """

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self._path = path
        self._shape = shape

    @classmethod
    @contextlib.contextmanager
    def writing(cls, journal: Journal, name: str, shape: tuple[int, int]) -> "Iterator[Activations]":
        """A new piece of a journal."""
        with journal.writing(name) as partial:
            yield cls(partial, shape)

    def get(self, window: int) -> torch.Tensor:
        """(tokens, width)."""
        count = self._shape[0] * self._shape[1]
        values = np.fromfile(self._path, dtype=np.float32, count=count, offset=4 * count * window)
        return torch.from_numpy(values.reshape(self._shape))

    def put(self, window: int, values: torch.Tensor) -> None:
        """Windows come in order."""
        with self._path.open("ab") as stream:
            stream.write(values.float().contiguous().numpy().tobytes())
