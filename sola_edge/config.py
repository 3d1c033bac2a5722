"""The frozen settings of a compression, a matrix's layout, and what *compression rate* means.

Compression rate c = parameters removed / parameters of the whole dense model, embeddings counted once (method.md §7).
It is defined by `rate_of` and nowhere else.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from sola_edge.errors import UserError

QUANT_METHOD = "sola"  # the name of compressed checkpoints in transformers' tables
Split = Literal["out", "in"]
FactorPolicy = Literal["plain", "pivoted", "auto"]
STRUCTURES = ("hybrid", "narrow")
ALIGNMENTS = (256, 32, 8)
RATE_TOLERANCE = 0.005  # of the asked rate: 0.2 means 0.199 to 0.201


@dataclass(frozen=True)
class MatrixLayout:
    """How a matrix W (n_out, n_in) that compression changed is stored. Sizes are those after neurons were dropped.

    rank 0: whole, as `weight` (n_out, n_in); it differs from the dense model's by its size or by a bias that it gained.
    Otherwise the first `prime` of the split side are kept dense as P, the rest is the product L of factors of that rank:

    split "out": y = concat(P x, L x), P (prime, n_in).      gate, up; with prime = 0 (no P) q, k, v, o
    split "in":  y = P x[:prime] + L x[prime:], P (n_out, prime).                                  down

    With L (rows, columns): L = B A, A (rank, columns), B (rows, rank). `pivot` (PIFA, ICML 2025): the first `rank` rows of
    B are the identity and are not stored, L x = concat(A x, B (A x)) with B (rows - rank, rank). `gather`: the rows of L
    come in another order, L x = concat(…)[order] with a stored `order` (rows,), int32; a split "out" with gather has no
    prime rows among them: order runs over L's rows alone. `bias`: a bias is stored that the dense model does not have.
    """

    n_out: int
    n_in: int
    prime: int
    rank: int
    split: Split = "out"
    pivot: bool = False
    gather: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        side = self.n_out if self.split == "out" else self.n_in
        legal = self.split in ("out", "in") and 0 <= self.prime < side and self.rank >= 0 and side > 0
        if self.rank == 0:
            legal = legal and not (self.prime or self.pivot or self.gather)
        elif legal:
            legal = (not self.pivot or self.rank < self.low_rank_shape[0]) and (self.pivot or not self.gather)
        if not legal:
            raise ValueError(f"impossible layout {self}")

    @property
    def low_rank_shape(self) -> tuple[int, int]:
        """(rows, columns) of L, the part that factors replace."""
        if self.split == "out":
            return self.n_out - self.prime, self.n_in
        return self.n_out, self.n_in - self.prime

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each stored part by its name: `weight`, or `prime` (absent when 0), `A`, `B`, `order` (of a gather)."""
        if self.rank == 0:
            return {"weight": (self.n_out, self.n_in)}
        rows, columns = self.low_rank_shape
        parts: dict[str, tuple[int, ...]] = {
            "A": (self.rank, columns),
            "B": (rows - self.rank if self.pivot else rows, self.rank),
        }
        if self.prime:
            parts["prime"] = (self.prime, self.n_in) if self.split == "out" else (self.n_out, self.prime)
        if self.gather:
            parts["order"] = (rows,)
        return parts

    @property
    def weights(self) -> int:
        """Number of stored values without any bias; an order's indices count as one each."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def parameters(self) -> int:
        """Number of stored values, without a bias that the dense model has too."""
        return self.weights + (self.n_out if self.bias else 0)


@dataclass(frozen=True)
class CompressionSettings:
    """What a user asks of `sola-edge compress`. Raises UserError on an impossible value.

    align None: auto. prime_share: of sola-paper alone; sola chooses it per layer. gradient_windows: how many of
    the calibration windows gradients are taken on, 0 for none (forward statistics only); not given: as many as max_windows,
    None where that is: all. correction_windows: how many of those the sequential correction reads, 0 for none.
    """

    rate: float
    method: str = "sola"
    structure: str = "hybrid"
    align: int | None = None
    factors: str = "auto"
    gradient_windows: int | None = None
    correction_windows: int = 0
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
        if self.gradient_windows is None:
            object.__setattr__(self, "gradient_windows", self.max_windows)
        for name in ("gradient_windows", "correction_windows"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{name.replace('_', ' ')} {value} is out of range: give 0 (none) or more")
        if self.correction_windows == 1:
            raise UserError(
                "correction windows 1 is out of range: give 0 (none) or at least 2, whose halves are compared"
            )
        if self.gradient_windows is not None and self.correction_windows > self.gradient_windows:
            raise UserError(
                f"correction windows {self.correction_windows} are more than the {self.gradient_windows} that gradients are "
                "taken on, without which a correction makes things worse; give fewer, or more gradient windows"
            )
        if self.structure not in STRUCTURES:
            raise UserError(f"there is no structure {self.structure!r}; choose one of: {', '.join(STRUCTURES)}")
        if self.factors not in get_args(FactorPolicy):
            raise UserError(
                f"there are no factors {self.factors!r}; choose one of: {', '.join(get_args(FactorPolicy))}"
            )

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
