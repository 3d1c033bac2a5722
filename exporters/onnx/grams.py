"""E[x xᵀ] of what each stored matrix of a checkpoint multiplies, for a rounding that knows its inputs (gptq.py)."""

from dataclasses import dataclass
from typing import Any

import torch

from exporters.support import choose
from sola_edge.calibration import INPUT_OF, Statistics, read_calibration
from sola_edge.checkpoint import Checkpoint
from sola_edge.collect import collect
from sola_edge.errors import UserError
from sola_edge.texts import DEFAULT_CALIBRATION, load_text


@dataclass(frozen=True)
class Text:
    """What a rounding is calibrated on: a text as of `compress --calibration`, its first windows of so many tokens."""

    name: str = DEFAULT_CALIBRATION
    windows: int = 16
    window: int = 2048

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("window", 2)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)} is out of range: give at least {least}")


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
    """Gram matrices of what the tensors of an exported checkpoint multiply.

    The model runs when the first one is asked for, or before by `collect`, unless the cache folder has its statistics. One
    layer's are in memory.
    """

    def __init__(self, checkpoint: Checkpoint, source: Checkpoint, text: Text) -> None:
        """checkpoint: what is exported; source: the same model as it is stored.

        Raises UserError for a text that cannot be read or is too short.
        """
        window = min(text.window, source.config.max_position_embeddings)
        self._calibration = read_calibration(load_text(text.name), source.tokenizer(), window, text.windows)
        self._checkpoint, self._source = checkpoint, source
        self._statistics: Statistics | None = None
        self._layer: tuple[int, dict[str, torch.Tensor]] = (-1, {})

    def describe(self) -> dict[str, Any]:
        """For a file's metadata: the text's name and hash, windows and tokens."""
        return self._calibration.describe()

    def collect(self) -> Statistics:
        """What the text makes of the model, run once. Raises UserError for activations that are not finite."""
        if self._statistics is None:
            self._statistics = collect(self._source, self._calibration, gradient_windows=0)
        return self._statistics

    def of(self, name: str) -> torch.Tensor:
        """(n_in, n_in) float32 of a tensor of a decoder layer's matrix; that of a B by its A before A is rounded."""
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
            self._layer = (layer, dict(self.collect().layer(layer).inputs))
        return self._layer[1]
