"""Tiny random models for tests and for trying an exporter out: real checkpoints, only small and untrained."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sola_edge.architecture import COMPONENTS, FFN, architecture_of
from sola_edge.checkpoint import CheckpointWriter, Tensors, copy_checkpoint, open_checkpoint, storage_config
from sola_edge.config import MatrixLayout, Split
from sola_edge.files import replace_folder

# Values with which a tiny model of the type uses what its architecture has: a head width that is not hidden / heads, masks
# of several kinds in a short text, caps that bend.
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 16, "final_logit_softcapping": 8.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 4.0},
    "gemma3_text": {**_GEMMA, "sliding_window_pattern": 3},
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(vocabulary_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one merge (llama.cpp loads none without), special tokens first, padded to the size.

    Its pre-tokenizer is SmolLM's, one that the GGUF exporter knows llama.cpp's name of.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, "th"]
    tokens += [f"<|unused{i}|>" for i in range(vocabulary_size - len(tokens))]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    names = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "unk_token": SPECIAL[0], "pad_token": SPECIAL[2]}
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names)


def tiny_checkpoint(
    folder: Path,
    *,
    model_type: str = "llama",
    compressed: bool = False,
    hidden: int = 64,
    ffn: int = 160,
    layers: int = 5,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 320,
    tied: bool = True,
    bias: bool = False,
    seed: int = 0,
    dense_components: tuple[str, ...] = (),
    **config_values: Any,
) -> Path:
    """Write a random model with a tokenizer and return its folder.

    `compressed` replaces every matrix of the inner layers (all but the first and the last) but v and `dense_components`
    by random factors of half rank, with a fifth of the neurons prime: a structure to export, not an approximation.
    Weights are large enough that logits vary and biases are not zero.
    """
    torch.manual_seed(seed)
    values = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **({"attention_bias": bias, "mlp_bias": bias} if model_type == "llama" else {}),
        **CONFIGS.get(model_type, {}),
        **config_values,
    }
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))  # about 1, or 0 where 1 is added to it
            else:
                parameter.normal_(std=0.5 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5)
    with replace_folder(folder) as partial:
        model.save_pretrained(partial)
        byte_tokenizer(vocab).save_pretrained(partial)
    if compressed:
        _factor_randomly(folder, set(dense_components) | {"v"}, ffn // 5 // 8 * 8, layers)
    return folder


def _factor_randomly(folder: Path, dense: set[str], prime: int, layers: int) -> None:
    source = open_checkpoint(folder)
    row = architecture_of(source.config)
    layouts = {}
    for i in range(1, layers - 1):
        for component in ("q", "k", "o", "gate", "up", "down"):
            module = row.module(i, component)
            n_out, n_in = source.shape(f"{module}.weight")
            ffn = component in ("gate", "up", "down")
            rank = min(n_out, n_in) // 2
            split: Split = "in" if component == "down" else "out"
            if component not in dense:
                layouts[module] = MatrixLayout(n_out, n_in, prime if ffn else 0, rank, split)
    with replace_folder(folder) as partial:
        writer = CheckpointWriter(partial)
        for name in source.names():
            module = name.removesuffix(".weight")
            if module not in layouts:
                writer.add(name, source.tensor(name))
                continue
            for part, shape in layouts[module].shapes.items():
                writer.add(f"{module}.{part}", torch.randn(shape) * 1.5 / shape[-1] ** 0.5)
        writer.finish(storage_config(source), source.tokenizer(), layouts)
        matrices = {module: asdict(layout) for module, layout in layouts.items()}
        (partial / "sola.json").write_text(json.dumps({"method": "random", "rate": 0.0, "matrices": matrices}))


@dataclass(frozen=True)
class ExactForm:
    """A form of compression that loses nothing: of weights of exactly the ranks that it stores, and of dead neurons.

    prime: prime neurons. pivot: pivoted factors of half rank, gathered but in gate; else plain factors of full rank.
    dropped: layer i drops (i + 1) times as many neurons that down ignores, attention stays dense, every other FFN is whole.
    """

    prime: int = 0
    pivot: bool = False
    dropped: int = 0


EXACT_FORMS = {
    "plain": ExactForm(),
    "prime": ExactForm(prime=24),
    "pivot": ExactForm(pivot=True),
    "pivot and prime": ExactForm(prime=24, pivot=True),
    "narrow": ExactForm(dropped=16),
}


def exact_pair(source: Path, dense: Path, compressed: Path, form: ExactForm, seed: int = 0) -> None:
    """Write `dense`, a variant of the model `source`, and `compressed`, which computes the same with fewer or other weights."""
    random = torch.Generator().manual_seed(seed)
    original = open_checkpoint(source)
    row = original.architecture
    rewritten: dict[str, torch.Tensor] = {}  # of the dense variant
    stored = {name: original.tensor(name) for name in original.names()}
    layouts: dict[str, MatrixLayout] = {}
    for i in range(original.layers):
        width = original.config.intermediate_size
        kept = (
            torch.randperm(width, generator=random)[: width - form.dropped * (i + 1)]
            if form.dropped
            else torch.arange(width)
        )
        for component in FFN if form.dropped else COMPONENTS:
            module = row.module(i, component)
            weight = stored.pop(f"{module}.weight").double()
            if component in ("gate", "up") and original.bias_name(module):
                stored[f"{module}.bias"] = stored[f"{module}.bias"][kept]
            layout = _exact_layout(component, weight.shape, len(kept), form, whole=bool(form.dropped and i % 2))
            exact, parts = _exact(weight, component, kept, layout, random)
            rewritten[f"{module}.weight"] = exact.float()
            stored |= {f"{module}.{part}": value for part, value in parts.items()}
            layouts[module] = layout
    copy_checkpoint(replace(original, tensors=_Rewritten(original.tensors, rewritten)), dense)
    with replace_folder(compressed) as partial:
        writer = CheckpointWriter(partial)
        for name, tensor in stored.items():
            writer.add(name, tensor)
        writer.finish(storage_config(original), original.tokenizer(), layouts)


def _exact_layout(component: str, shape: torch.Size, ffn: int, form: ExactForm, whole: bool) -> MatrixLayout:
    split: Split = "in" if component == "down" else "out"
    n_out, n_in = (ffn if component in ("gate", "up") else shape[0]), (ffn if component == "down" else shape[1])
    if whole:
        return MatrixLayout(n_out, n_in, 0, 0, split)
    prime = form.prime if component in FFN else 0
    full = min(MatrixLayout(n_out, n_in, prime, 1, split).low_rank_shape)
    gather = form.pivot and component != "gate"
    return MatrixLayout(n_out, n_in, prime, full // 2 if form.pivot else full, split, pivot=form.pivot, gather=gather)


def _exact(
    weight: torch.Tensor, component: str, kept: torch.Tensor, layout: MatrixLayout, random: torch.Generator
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(the dense variant's weight, the stored parts of the same matrix without the neurons that are not `kept`)."""
    side = 1 if component == "down" else 0
    exact = weight.clone()
    if component == "down":
        exact = torch.zeros_like(weight).index_copy(1, kept, weight[:, kept])
    narrow = exact.index_select(side, kept) if component in FFN else exact
    if layout.rank == 0:
        return exact, {"weight": narrow.float()}
    prime, rest = narrow.split([layout.prime, narrow.shape[side] - layout.prime], dim=side)
    parts = {"prime": prime} if layout.prime else {}
    if layout.pivot:  # nothing is dropped here; the rows beyond the pivots become mixtures of them
        a = rest[: layout.rank]
        b = torch.randn(len(rest) - layout.rank, layout.rank, generator=random, dtype=a.dtype) / layout.rank**0.5
        rest = torch.cat([a, b @ a])
        if layout.gather:
            parts["order"] = torch.randperm(len(rest), generator=random)
            rest = rest[parts["order"]]
        exact = torch.cat([prime, rest], dim=side)
    else:
        u, s, vt = torch.linalg.svd(rest, full_matrices=False)
        a, b = vt[: layout.rank], u[:, : layout.rank] * s[: layout.rank]
    parts |= {"A": a, "B": b}
    return exact, {part: value.int() if part == "order" else value.float() for part, value in parts.items()}


class _Rewritten:
    """Tensors of which some have other values."""

    def __init__(self, tensors: Tensors, values: dict[str, torch.Tensor]) -> None:
        self._tensors, self._values = tensors, values
        self.names, self.shape, self.dtype = tensors.names, tensors.shape, tensors.dtype

    def tensor(self, name: str) -> torch.Tensor:
        return self._values[name] if name in self._values else self._tensors.tensor(name)
