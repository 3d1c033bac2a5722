"""Runs a checkpoint's decoder layers on hidden states, one layer in memory at a time.

The running part is transformers' own: its layer, and the masks, rotary embeddings and whatever else its model class hands to a
layer, which are caught from a model of that class with a single layer and no vocabulary. No architecture needs code here.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel

from sola_edge.architecture import COMPONENTS, attention_implementation
from sola_edge.checkpoint import Checkpoint
from sola_edge.layers import empty_linear, unfuse_linears

HEAD_TOKENS = 512  # positions whose logits are in memory at once


class LayerRunner:
    """One decoder layer of a checkpoint, dense or compressed, at a time, in float32, and what comes before and after them.

    `layer` is transformers' module of the layer that was loaded last; its weights need no gradient.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.layer: Any = None
        self._models: dict[str, Any] = {}
        self._linears: dict[str, dict[str, nn.Module]] = {}  # the dense modules of a kind of layer, by component
        self._calls: dict[tuple[str, int], Any] = {}
        self._kind = ""
        self._table: torch.Tensor | None = None
        self._loaded_head: tuple[nn.Module, torch.Tensor] | None = None

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states (…, tokens, hidden) that enter the first layer, on the CPU.

        The table of embeddings stays in memory until `release_vocabulary`.
        """
        kind = self._kind_of(0)
        if self._table is None:
            self._table = self.checkpoint.tensor(f"{self.checkpoint.architecture.embedding}.weight")
        scale = getattr(self._model(kind).embed_tokens, "embed_scale", 1.0)
        embedded = F.embedding(ids, self._table).float() * torch.as_tensor(scale).cpu()
        return self._caught(kind, embedded)[0][0].cpu()

    def load(self, layer: int, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Put decoder layer `layer` in place, with the checkpoint's weights or those given (names relative to the layer)."""
        kind = self._kind_of(layer)
        if self.layer is not None and kind != self._kind:
            self.layer.to("meta")  # another model's, whose weights would stay in memory
        self._kind = kind
        self.layer = self._model(self._kind).layers[0]
        self._place_linears(layer)
        found = self.weights(layer) if weights is None else weights
        values = {k: (v.float() if v.is_floating_point() else v).to(self.device) for k, v in found.items()}
        self.layer.load_state_dict(values, assign=True)
        self.layer.requires_grad_(False)

    def _place_linears(self, layer: int) -> None:
        """The modules that hold the matrices of that layer: the model class's own, or those that a layout asks for."""
        row = self.checkpoint.architecture
        for component, own in self._linears[self._kind].items():
            layout = self.checkpoint.layout.get(row.module(layer, component))
            with torch.device("meta"):
                linear = own if layout is None else empty_linear(layout, own.bias is not None)
            if layout is not None:
                own.to("meta")  # its weights, of another layer, would stay in memory
            self.layer.set_submodule(getattr(row, component), linear)

    def weights(self, layer: int) -> dict[str, torch.Tensor]:
        """All tensors of a decoder layer, by their names within it."""
        prefix = self.checkpoint.architecture.layer.format(layer) + "."
        names = [name for name in self.checkpoint.names() if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.checkpoint.tensor(name) for name in names}

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """The loaded layer's output for hidden states (windows, tokens, hidden)."""
        hidden = hidden.to(self.device)
        key = (self._kind, hidden.shape[-2])
        if key not in self._calls:
            self._calls[key] = self._caught(self._kind, hidden[:1])[1]
        output = self.layer(hidden, **self._calls[key])
        return output[0] if isinstance(output, tuple) else output

    def loss_gradient(
        self, hidden: torch.Tensor, ids: torch.Tensor, labels: torch.Generator
    ) -> tuple[torch.Tensor, float]:
        """(gradient of the summed loss of one window's next tokens, their NLL in nats).

        hidden (tokens, hidden): what the last layer gave; ids (tokens,). The gradient is taken for next tokens that are drawn
        from the model's own distribution: the second moment of such gradients is the Fisher information, the curvature of
        the loss that the metric stands for, and a surprising word of the text does not outweigh all others in it.
        """
        norm, head = self._head
        hidden = hidden.to(self.device)
        gradient = torch.zeros_like(hidden)
        total = 0.0
        targets = ids[1:].to(self.device)
        for start in range(0, len(targets), HEAD_TOKENS):
            part = slice(start, min(start + HEAD_TOKENS, len(targets)))
            x = hidden[part].detach().requires_grad_()
            logits = soft_capped(F.linear(norm(x), head), self.checkpoint.config)
            p = logits.detach().softmax(-1)
            smallest = torch.finfo(p.dtype).tiny
            total -= float(p.gather(1, targets[part, None]).clamp_min(smallest).log().sum())
            p.scatter_add_(1, drawn_labels(p, labels)[:, None], p.new_full((len(p), 1), -1.0))
            (gradient[part],) = torch.autograd.grad(logits, x, p)  # of -log p[drawn] in the logits: p - onehot(drawn)
        return gradient, total

    @property
    def _head(self) -> tuple[nn.Module, torch.Tensor]:
        if self._loaded_head is None:
            row = self.checkpoint.architecture
            norm = self._model(self._kind_of(0)).norm
            norm.load_state_dict({"weight": self.checkpoint.tensor(f"{row.final_norm}.weight").float()}, assign=True)
            module = row.embedding if self.checkpoint.tied else row.head
            head = self.checkpoint.tensor(f"{module}.weight").float().to(self.device)
            self._loaded_head = (norm.to(self.device).requires_grad_(False), head)
        return self._loaded_head

    def release_vocabulary(self) -> None:
        """Drop the table of embeddings and the output head, each of which can be as large as a layer."""
        self._table = self._loaded_head = None

    def _kind_of(self, layer: int) -> str:
        """What sort of layer it is where a model has several (sliding and full attention); else one sort for all."""
        kinds = getattr(self.checkpoint.config, "layer_types", None)
        return kinds[layer] if kinds else ""

    def _model(self, kind: str) -> Any:
        if kind not in self._models:
            config = copy.deepcopy(self.checkpoint.config)
            config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
            if kind:
                config.layer_types = [kind]
            attention = attention_implementation(config)
            model = AutoModel.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
            unfuse_linears(model.layers[0], self.checkpoint.architecture.fused_rows(config))
            self._models[kind] = model.to(self.device)
            row = self.checkpoint.architecture
            self._linears[kind] = {c: model.layers[0].get_submodule(getattr(row, c)) for c in COMPONENTS}
        return self._models[kind]

    def _caught(self, kind: str, embedded: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model class hands to its layer for these embeddings: positional and named arguments."""
        model = self._model(kind)
        handle = model.layers[0].register_forward_pre_hook(_catch, with_kwargs=True)
        try:
            with torch.no_grad():
                batch = (embedded if embedded.dim() == 3 else embedded[None]).to(self.device)
                # told that nothing is padded, transformers asks for causal attention instead of making a mask, which
                # halves what attention costs
                seen = torch.ones(batch.shape[:2], dtype=torch.int64, device=self.device)
                model(inputs_embeds=batch, attention_mask=seen, use_cache=False)
        except _Caught as caught:
            return caught.positional, caught.named
        finally:
            handle.remove()
        raise RuntimeError(f"{type(model).__name__} did not call its layer")


def drawn_labels(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One index from each row's distribution, (rows,), by where a uniform number falls in the cumulated probabilities."""
    cumulated = p.cumsum(-1)
    uniform = torch.rand(len(p), 1, generator=generator).to(p.device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, uniform, right=True).flatten().clamp_max(p.shape[1] - 1)


class _Caught(Exception):
    def __init__(self, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.positional, self.named = positional, named


def _catch(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
    if not positional:
        positional = (named.pop("hidden_states"),)
    raise _Caught(positional, named)


def soft_capped(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Logits as the model gives them out: Gemma bends them below a cap."""
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if not cap else torch.tanh(logits / cap) * cap
