"""What a method decided: the layout of every matrix, the rate achieved, and what it predicts.

The compression rate is read when a method plans and nowhere after: everything that follows sees layouts.
"""

from dataclasses import dataclass, field

from sola_edge.config import RATE_TOLERANCE, MatrixLayout, rate_of
from sola_edge.errors import Unreachable


@dataclass(frozen=True)
class Plan:
    """layouts: of every matrix that changes, by module name. rate: achieved, exactly. `asked`: what was wanted.

    predicted_loss: rise of the mean NLL in nats, by module or FFN; {} where the method predicts none. retained_energy: of
    each factored matrix's low-rank part; {} where the method does not go by it.
    """

    layouts: dict[str, MatrixLayout]
    asked: float
    rate: float
    parameters_dense: int
    parameters_removed: int
    predicted_loss: dict[str, float] = field(default_factory=dict)
    retained_energy: dict[str, float] = field(default_factory=dict)


def check_reachable(asked: float, removable: int, parameters: int, method: str) -> None:
    """Refuse a rate beyond what a method can remove. Raises Unreachable."""
    if round(asked * parameters) > removable:
        raise Unreachable(
            f"rate {asked:g} cannot be reached: {method} can remove at most {rate_of(removable, parameters):.3f} of this "
            f"model's parameters; ask for less"
        )


def make_plan(
    layouts: dict[str, MatrixLayout],
    removed: int,
    asked: float,
    parameters: int,
    align: int,
    *,
    predicted_loss: dict[str, float] | None = None,
    retained_energy: dict[str, float] | None = None,
) -> Plan:
    """The plan of these layouts, which save `removed` of `parameters`. align: the coarsest grid.

    Raises Unreachable when the rate is missed by more than 0.5 % of it.
    """
    rate = rate_of(removed, parameters)
    if abs(rate - asked) > RATE_TOLERANCE * asked:
        raise Unreachable(
            f"rate {asked:g} cannot be met within 0.5 % with sizes this coarse (nearest: {rate:.4f}); "
            f"give a smaller --align than {align}"
        )
    return Plan(layouts, asked, rate, parameters, removed, predicted_loss or {}, retained_energy or {})
