"""Tiny random models for tests and for trying an exporter out: real checkpoints, only small and untrained."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sola_edge.architecture import architecture_of
from sola_edge.checkpoint import CheckpointWriter, open_checkpoint, storage_config
from sola_edge.config import MatrixLayout, Split
from sola_edge.files import replace_folder

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
        **config_values,
    }
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
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
