"""A compressed checkpoint, explained: what `explain` finds, and the report holds of every compressed model.

Units: parameters; predicted losses in nats per token of the calibration text where the method took gradients, else shares
of the matrix's output energy (`unit`). What sola.json does not tell (another method, an older file) is null.
"""

from typing import Literal

from runtime_checks.frozen import Frozen

Form = Literal["whole", "plain", "pivoted"]
Unit = Literal["nats", "share of the output's energy"]
PREMISE = (0.15, 0.95)  # SoLA (AAAI 2025): this share of the neurons carries this share of the norm


class Matrix(Frozen):
    """One matrix as it is stored. rank: null of a whole one. parameters: with its bias; the dense one's likewise.

    predicted: rise of the loss that the plan gives to it alone (attention). retained: energy that its factors keep.
    """

    form: Form
    rank: int | None
    prime: int
    n_out: int
    n_in: int
    parameters: int
    parameters_dense: int
    predicted: float | None
    retained: float | None

    @property
    def share(self) -> float:
        """Of the dense matrix's parameters, what is left."""
        return self.parameters / self.parameters_dense

    @property
    def text(self) -> str:
        """The form in words."""
        return self.form if self.rank is None else f"{self.form} {self.rank}"


class LayerFound(Frozen):
    """One decoder layer. predicted_attention: of its four matrices; predicted_ffn: of its three and the dropped neurons."""

    layer: int
    neurons: int
    neurons_dense: int
    prime: int
    matrices: dict[str, Matrix]  # by component
    predicted_attention: float | None
    predicted_ffn: float | None
    norms: list[float] | None  # the share of the summed mean |h| that the largest `norm_neurons` carry

    @property
    def share(self) -> float:
        """Of the dense layer's matrices, the parameters that are left."""
        matrices = self.matrices.values()
        return sum(m.parameters for m in matrices) / sum(m.parameters_dense for m in matrices)


class NormShare(Frozen):
    """The share of the norm that the largest `neurons` (a share) of a layer's neurons carry, over the layers."""

    neurons: float
    minimum: float
    median: float
    maximum: float


class Explanation(Frozen):
    """A compressed checkpoint."""

    checkpoint: str
    architecture: str
    method: str | None
    settings: dict[str, int | float | str | None]
    calibration: str | None
    parameters: int
    parameters_dense: int
    rate: float
    predicted: float | None
    unit: Unit | None
    norm_neurons: list[float] | None
    norm_share: NormShare | None
    layers: list[LayerFound]

    @property
    def neurons(self) -> tuple[int, int]:
        """Kept and dense neurons of all layers."""
        return sum(row.neurons for row in self.layers), sum(row.neurons_dense for row in self.layers)
