"""The frozen settings of a compression, a matrix's layout, and what *compression rate* means.

Compression rate c = parameters removed / parameters of the whole dense model, embeddings counted once (method.md §7).
It is defined by `rate_of` and nowhere else.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from sola_edge.errors import UserError

QUANT_METHOD = "sola"  # the name of compressed checkpoints in transformers' tables
Split = Literal["out", "in"]
ALIGNMENTS = (256, 32, 8)
RATE_TOLERANCE = 0.005  # of the asked rate: 0.2 means 0.199 to 0.201


@dataclass(frozen=True)
class MatrixLayout:
    """How a factored matrix W (n_out, n_in) is stored.

    The first `prime` of the split side are kept dense as P, the rest is the product B A of rank `rank`.
    split "out": y = concat(P x, B (A x)), P (prime, n_in), A (rank, n_in), B (n_out - prime, rank).
    split "in":  y = P x[:prime] + B (A x[prime:]), P (n_out, prime), A (rank, n_in - prime), B (n_out, rank).
    With prime = 0 there is no P and y = B (A x).
    """

    n_out: int
    n_in: int
    prime: int
    rank: int
    split: Split = "out"

    def __post_init__(self) -> None:
        side = self.n_out if self.split == "out" else self.n_in
        if self.split not in ("out", "in") or not 0 <= self.prime < side or self.rank < 1:
            raise ValueError(f"impossible layout {self}")

    @property
    def low_rank_shape(self) -> tuple[int, int]:
        """(rows, columns) of the part that B A replaces."""
        if self.split == "out":
            return self.n_out - self.prime, self.n_in
        return self.n_out, self.n_in - self.prime

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of each stored part by its name: `prime` (absent when 0), `A`, `B`."""
        rows, columns = self.low_rank_shape
        parts = {"A": (self.rank, columns), "B": (rows, self.rank)}
        if self.prime:
            parts["prime"] = (self.prime, self.n_in) if self.split == "out" else (self.n_out, self.prime)
        return parts

    @property
    def parameters(self) -> int:
        """Number of stored weights, without a bias."""
        return sum(rows * columns for rows, columns in self.shapes.values())


@dataclass(frozen=True)
class CompressionSettings:
    """What a user asks of `sola-edge compress`. Raises UserError on an impossible value."""

    rate: float
    method: str = "sola-paper"
    structure: str = "hybrid"
    align: int | None = None  # None: auto
    prime_share: float = 0.15
    window: int = 2048
    max_windows: int | None = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise UserError(f"rate {self.rate:g} is out of range: give the share of parameters to remove, 0 < rate < 1")
        if self.align is not None and self.align < 1:
            raise UserError(f"align {self.align} is out of range: give auto or a positive number such as 8, 32 or 256")
        if self.window < 2:
            raise UserError(f"window {self.window} is out of range: give at least 2 tokens")
        if self.max_windows is not None and self.max_windows < 1:
            raise UserError(f"windows {self.max_windows} is out of range: give at least 1")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def rate_of(parameters_removed: int, parameters_dense: int) -> float:
    """Compression rate of removing that many of a model's parameters."""
    return parameters_removed / parameters_dense


def alignment_for(side: int, align: int | None) -> int:
    """The multiple that ranks and prime counts of a matrix are rounded to, given the length of its smaller side.

    `auto` (None): 256 (the block of K-quants) where the side holds at least four of them, else 32 (the block of Q8_0),
    else 8 (what GPU kernels want).
    """
    if align is not None:
        return align
    return next((a for a in ALIGNMENTS if side >= 4 * a), ALIGNMENTS[-1])
