"""Text → token windows, and what calibration says of each decoder layer: statistics on disk, made by collect.py."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sola_edge.errors import UserError
from sola_edge.journal import Journal
from sola_edge.texts import SEPARATOR, Text

FORWARD = "forward.json"  # the piece that is there when the forward statistics of all layers are

# The input that each component's matrix multiplies: q, k, v share one, gate and up share one.
INPUT_OF = {"q": "attention", "k": "attention", "v": "attention", "o": "o", "gate": "ffn", "up": "ffn", "down": "down"}
STAGES = {name: tuple(c for c in INPUT_OF if INPUT_OF[c] == name) for name in INPUT_OF.values()}  # input → components
PROBE = {"attention": "q", "o": "o", "ffn": "gate", "down": "down"}  # the component whose input is listened to


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration says of one decoder layer; sums are divided by the number of tokens.

    inputs: by input name (`INPUT_OF`) S = E[x xᵀ], (n_in, n_in). norms, means: (ffn,) mean |h_j| and mean h_j.
    outputs: by component G = E[g gᵀ] of the gradients g of the summed loss at its outputs (see LayerRunner.loss_gradient),
    (n_out, n_out); {} without gradients.
    weights: by component ‖g‖² of each token that has a gradient, (tokens,); {} without gradients. All float32.
    """

    inputs: Mapping[str, torch.Tensor]
    norms: torch.Tensor
    means: torch.Tensor
    outputs: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Calibration:
    """Token windows (windows, window) and where they came from."""

    windows: torch.Tensor
    text: str
    sha256: str

    @property
    def tokens(self) -> int:
        return self.windows.numel()

    def describe(self) -> dict[str, Any]:
        """Plain values for `sola.json`."""
        count, window = self.windows.shape
        return {"text": self.text, "sha256": self.sha256, "windows": count, "window": window, "tokens": self.tokens}


def token_windows(text: Text, tokenizer: Any, window: int, max_windows: int | None) -> torch.Tensor:
    """The text's tokens, without a BOS, cut into (windows, window) int64; a last incomplete window is left out.

    A text shorter than one window is one shorter window. Raises UserError when it has fewer than two tokens.
    """
    needed = None if max_windows is None else window * max_windows
    ids: list[int] = []
    for i, document in enumerate(text.documents):
        ids += tokenizer(document if i == 0 else SEPARATOR + document, add_special_tokens=False)["input_ids"]
        if needed is not None and len(ids) >= needed:
            break
    if len(ids) < 2:
        raise UserError(f"{text.name} gives {len(ids)} tokens; calibration needs at least 2, better 30,000")
    if len(ids) < window:
        return torch.tensor([ids])
    count = len(ids) // window
    count = count if max_windows is None else min(count, max_windows)
    return torch.tensor(ids[: count * window]).view(count, window)


def read_calibration(text: Text, tokenizer: Any, window: int, max_windows: int | None) -> Calibration:
    """The windows of a text and where they came from. Raises UserError when it is too short."""
    return Calibration(token_windows(text, tokenizer, window, max_windows), text.name, text.sha256)


class Statistics:
    """The statistics of a checkpoint on one calibration, complete on disk; read a layer at a time.

    Raises UserError wherever a piece is not what was written.
    """

    def __init__(self, journal: Journal, gradient_windows: int) -> None:
        self._journal = journal
        self.gradient_windows = gradient_windows
        self.folder = journal.folder

    @property
    def nll(self) -> float | None:
        """Mean loss of the calibration text in nats, where gradients were taken."""
        if not self.gradient_windows:
            return None
        return float(json.loads(self._piece(gradients_name(self.gradient_windows)).read_text())["nll"])

    def norms(self, layer: int) -> torch.Tensor:
        """One layer's mean |h_j|, (ffn,), and nothing else of its file."""
        with safe_open(self._piece(forward_name(layer)), framework="pt") as file:
            return file.get_tensor("norms")

    def layer(self, layer: int) -> LayerStatistics:
        """One layer's statistics from disk."""
        found = load_file(self._piece(forward_name(layer)))
        if self.gradient_windows:
            found |= load_file(self._piece(backward_name(layer, self.gradient_windows)))
        return LayerStatistics(
            inputs=_under("S.", found),
            norms=found["norms"],
            means=found["means"],
            outputs=_under("G.", found),
            weights=_under("g2.", found),
        )

    def _piece(self, name: str) -> Path:
        if not self._journal.has(name):
            for marker in (FORWARD, gradients_name(self.gradient_windows)):
                self._journal.remove(marker)
            raise UserError(
                f"{self._journal.path(name)} is not what was written there; run the same command again, which makes it anew"
            )
        return self._journal.path(name)


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def forward_name(layer: int) -> str:
    """The piece with S, norms and means of a layer."""
    return f"forward-{layer:03d}.safetensors"


def backward_name(layer: int, windows: int) -> str:
    """The piece with G of a layer, of gradients on so many windows."""
    return f"backward-{windows}-{layer:03d}.safetensors"


def gradients_name(windows: int) -> str:
    """The piece that is there when the gradients of so many windows are."""
    return f"gradients-{windows}.json"
