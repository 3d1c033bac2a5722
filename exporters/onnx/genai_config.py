"""The files beside the graph: what onnxruntime-genai and transformers need to run it.

`genai_config.json` tells onnxruntime-genai the graph's names and shapes and how to generate; `config.json` and the tokenizer
are the model's own. The generation defaults are those of the checkpoint's generation_config.json where it has one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from sola_edge.architecture import head_dim, kv_heads
from sola_edge.checkpoint import GENERATION, Checkpoint

CONFIG = "genai_config.json"
SEARCH_DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


def write_companions(
    checkpoint: Checkpoint, folder: Path, model_file: str, provenance: dict[str, str], *, shared_cache: bool
) -> None:
    """Write genai_config.json, config.json, generation_config.json (if there is one) and the tokenizer into `folder`.

    shared_cache: whether the graph's past and present may be one buffer.
    """
    tokenizer = checkpoint.tokenizer()
    _write_json(folder / CONFIG, genai_config(checkpoint, tokenizer, model_file, shared_cache))
    _write_json(folder / "config.json", _plain_config(checkpoint, provenance))
    if checkpoint.generation:
        shutil.copy(checkpoint.path / GENERATION, folder)
    # "no limit" is 1e30, which C++ readers cannot hold
    tokenizer.model_max_length = min(tokenizer.model_max_length, checkpoint.config.max_position_embeddings)
    tokenizer.save_pretrained(folder)


def genai_config(checkpoint: Checkpoint, tokenizer: Any, model_file: str, shared_cache: bool) -> dict[str, Any]:
    """The content of genai_config.json."""
    config = checkpoint.config
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": model_file,
        "head_size": head_dim(config),
        "hidden_size": config.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": kv_heads(config),
    }
    model = {
        **_special_tokens(checkpoint, tokenizer),
        "context_length": config.max_position_embeddings,
        "decoder": decoder,
        "type": config.model_type,
        "vocab_size": config.vocab_size,
    }
    search = _search(config, checkpoint.generation)
    return {"model": model, "search": {**search, "past_present_share_buffer": shared_cache}}


def _search(config: Any, generation: dict[str, Any]) -> dict[str, Any]:
    asked = {key: generation[key] for key in SEARCH_DEFAULTS if generation.get(key) is not None}
    search = {**SEARCH_DEFAULTS, **asked}
    return {
        **search,
        "diversity_penalty": 0.0,
        "early_stopping": True,
        "max_length": config.max_position_embeddings,
    }


def _special_tokens(checkpoint: Checkpoint, tokenizer: Any) -> dict[str, Any]:
    """bos, eos and pad ids: generation config, then config, then tokenizer."""

    def first(name: str) -> Any:
        sources = (checkpoint.generation.get(name), getattr(checkpoint.config, name, None), getattr(tokenizer, name))
        return next((found for found in sources if found is not None), None)

    ends = checkpoint.end_ids(tokenizer)
    begin, pad = first("bos_token_id"), first("pad_token_id")
    tokens: dict[str, Any] = {"bos_token_id": begin} if begin is not None else {}
    if ends:
        tokens |= {"eos_token_id": ends[0] if len(ends) == 1 else ends}
        pad = ends[-1] if pad is None else pad
    return tokens if pad is None else {**tokens, "pad_token_id": pad}


def _plain_config(checkpoint: Checkpoint, provenance: dict[str, str]) -> dict[str, Any]:
    """The model's config without the layout of its matrices, which is in the graph; where it came from is kept."""
    content = checkpoint.config.to_dict()
    content.pop("quantization_config", None)
    content.pop("_name_or_path", None)
    return {**content, "sola": provenance}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")
