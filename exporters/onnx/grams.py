"""E[x xᵀ] of what each stored matrix of a checkpoint multiplies, for a rounding that knows its inputs (gptq.py)."""

from dataclasses import dataclass
from typing import Any

import torch

from exporters.support import choose
from sola_edge.calibration import INPUT_OF, collect, read_calibration
from sola_edge.checkpoint import Checkpoint
from sola_edge.errors import UserError
from sola_edge.texts import DEFAULT_CALIBRATION, load_text


@dataclass(frozen=True)
class Text:
    """What a rounding is calibrated on: a text as of `compress --calibration`, its first windows of so many tokens."""

    name: str = DEFAULT_CALIBRATION
    windows: int = 16
    window: int = 2048

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise UserError(f"windows {self.windows} is out of range: give at least 1")


def rounding_text(rounding: str, name: str | None = None, windows: int | None = None) -> Text | None:
    """What a rounding of the command line reads: `nearest` nothing, `gptq` a text.

    Raises UserError for another rounding, an impossible number of windows, and a text that nothing would read.
    """
    given: dict[str, Any] = {key: value for key, value in (("name", name), ("windows", windows)) if value is not None}
    if choose("rounding", rounding, {"nearest": False, "gptq": True}):
        return Text(**given)
    if given:
        raise UserError("rounding to the nearest levels reads no text; give --rounding gptq too, or leave the text out")
    return None


class Grams:
    """Of the tensors of `checkpoint`, by statistics of the model that it is.

    One layer's statistics are in memory. The cache folder keeps them, as those of a compression.
    """

    def __init__(self, checkpoint: Checkpoint, source: Checkpoint, text: Text) -> None:
        """Runs the text through the model. checkpoint: what is exported; source: the same model as it is stored.

        Raises UserError for a text that cannot be read or is too short, and for activations that are not finite.
        """
        calibration = read_calibration(load_text(text.name), source.tokenizer(), text.window, text.windows)
        self._checkpoint, self._statistics = checkpoint, collect(source, calibration, gradient_windows=0)
        self._layer: tuple[int, dict[str, torch.Tensor]] = (-1, {})

    def of(self, name: str) -> torch.Tensor:
        """(n_in, n_in) float32 of a tensor of a decoder layer's matrix."""
        module, _, part = name.rpartition(".")
        row = self._checkpoint.architecture
        component = row.component_of(module)
        assert component is not None, name
        layer = int(module[len(row.layer.split("{}")[0]) :].split(".")[0])
        found = self._inputs(layer)[INPUT_OF[component]]
        layout = self._checkpoint.layout.get(module)
        if layout is None or not layout.rank:
            return found
        split = layout.prime if layout.split == "in" else 0
        if part == "prime":
            return found[:split, :split] if split else found
        inner = found[split:, split:]
        if part == "A":
            return inner
        a = self._checkpoint.tensor(f"{module}.A").float()
        return a @ inner @ a.T

    def _inputs(self, layer: int) -> dict[str, torch.Tensor]:
        if self._layer[0] != layer:
            self._layer = (layer, dict(self._statistics.layer(layer).inputs))
        return self._layer[1]
