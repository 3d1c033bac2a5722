"""Text → token windows → the model, one decoder layer at a time → statistics.

Only one decoder layer's weights are in memory, with the hidden states of every calibration token (tokens × hidden × 4 bytes).
A layer's statistics are Gram matrices S = Σ x xᵀ of the inputs of its linear layers (products in float32 over a window, sums
in float64) and each FFN neuron's mean activation norm, mean over tokens of |h_j| (method.md §1).
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from sola_edge.checkpoint import Checkpoint
from sola_edge.errors import UserError
from sola_edge.texts import SEPARATOR, Text

# The input that each component's matrix multiplies: q, k, v share one, gate and up share one.
INPUT_OF = {"q": "attention", "k": "attention", "v": "attention", "o": "o", "gate": "ffn", "up": "ffn", "down": "down"}
PROBE = {"attention": "q", "o": "o", "ffn": "gate", "down": "down"}  # the component whose input is listened to


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration says of one decoder layer.

    grams: by input name (`INPUT_OF`), (n_in, n_in) float64. norms: (ffn,) mean |h_j|. tokens: how many were seen.
    """

    grams: dict[str, torch.Tensor]
    norms: torch.Tensor
    tokens: int


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


class LayerStream:
    """Runs calibration windows through the original model, a decoder layer at a time.

    The running part is transformers' own model class with a single layer: its masks, its rotary embeddings, its layer; the
    weights of layer after layer are put into it.
    """

    def __init__(self, checkpoint: Checkpoint, windows: torch.Tensor, device: str = "cpu") -> None:
        self._checkpoint = checkpoint
        self._device = torch.device(device)
        self._model = _single_layer_model(checkpoint).to(self._device)
        embedding = checkpoint.tensor(f"{checkpoint.architecture.embedding}.weight")
        self._hidden = embedding[windows].float()
        self.tokens = windows.numel()

    def advance(self, layer: int) -> LayerStatistics:
        """Run layer number `layer` (they must come in order) on all windows and return its statistics.

        Raises UserError when an activation is not finite.
        """
        self._load(layer)
        recorder = _Recorder(self._model, self._checkpoint)
        with torch.inference_mode(), recorder:
            for i, hidden in enumerate(self._hidden):
                output = self._model(inputs_embeds=hidden[None].to(self._device), use_cache=False).last_hidden_state
                self._hidden[i] = output[0].cpu()
        return recorder.statistics(layer, self.tokens)

    def _load(self, layer: int) -> None:
        prefix = self._checkpoint.architecture.layer.format(layer) + "."
        names = [name for name in self._checkpoint.names() if name.startswith(prefix)]
        weights = {name.removeprefix(prefix): self._checkpoint.tensor(name).float() for name in names}
        self._model.layers[0].load_state_dict({k: v.to(self._device) for k, v in weights.items()}, assign=True)


def _single_layer_model(checkpoint: Checkpoint) -> Any:
    """transformers' decoder of one layer without vocabulary or final norm: hidden states in, hidden states out."""
    config = copy.deepcopy(checkpoint.config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    model = AutoModel.from_config(config, dtype=torch.float32)
    model.norm = nn.Identity()
    return model.eval()


class _Recorder:
    """Forward hooks that sum up the statistics of one layer while the windows pass."""

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        row = checkpoint.architecture
        self._grams: dict[str, torch.Tensor] = {}
        self._norms = torch.zeros(checkpoint.config.intermediate_size, dtype=torch.float64)
        layer = model.layers[0]
        self._modules = {name: layer.get_submodule(getattr(row, part)) for name, part in PROBE.items()}
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def record(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            gram = (x.T @ x).double().cpu()
            self._grams[name] = gram if name not in self._grams else self._grams[name].add_(gram)
            if name == "down":
                self._norms += x.abs().sum(0, dtype=torch.float64).cpu()

        return record

    def statistics(self, layer: int, tokens: int) -> LayerStatistics:
        """The sums as statistics. Raises UserError when any is not finite."""
        for name, gram in self._grams.items():
            bad = int((~gram.isfinite()).sum())
            if bad:
                raise UserError(
                    f"layer {layer}: {bad} entries of the {name} Gram matrix are not finite; the checkpoint is damaged or "
                    f"overflows in float32"
                )
        return LayerStatistics(self._grams, self._norms / tokens, tokens)
