"""The files beside the graph: what onnxruntime-genai and transformers need to run it.

`genai_config.json` tells onnxruntime-genai the graph's names and shapes and how to generate; `config.json` and the tokenizer
are the model's own. The generation defaults are those of the checkpoint's generation_config.json where it has one.
"""

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from sola_edge.architecture import head_dim
from sola_edge.checkpoint import Checkpoint

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


def write_companions(checkpoint: Checkpoint, folder: Path, model_file: str, provenance: dict[str, str]) -> None:
    """Write genai_config.json, config.json, generation_config.json (if there is one) and the tokenizer into `folder`."""
    tokenizer = checkpoint.tokenizer()
    generation = _generation(checkpoint)
    _write_json(folder / CONFIG, genai_config(checkpoint, tokenizer, generation, model_file))
    _write_json(folder / "config.json", _plain_config(checkpoint, provenance))
    if generation is not None:
        generation.save_pretrained(folder)
    context = checkpoint.config.max_position_embeddings
    tokenizer.model_max_length = min(
        tokenizer.model_max_length, context
    )  # "no limit" is 1e30: too long for C++ readers
    tokenizer.save_pretrained(folder)


def genai_config(
    checkpoint: Checkpoint, tokenizer: Any, generation: GenerationConfig | None, model_file: str
) -> dict[str, Any]:
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
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    }
    model = {
        **_special_tokens(checkpoint, tokenizer, generation),
        "context_length": config.max_position_embeddings,
        "decoder": decoder,
        "type": config.model_type,
        "vocab_size": config.vocab_size,
    }
    return {"model": model, "search": _search(config, generation)}


def _search(config: Any, generation: GenerationConfig | None) -> dict[str, Any]:
    asked = {key: getattr(generation, key, None) for key in SEARCH_DEFAULTS}
    search = {key: default if asked[key] is None else asked[key] for key, default in SEARCH_DEFAULTS.items()}
    search |= {"diversity_penalty": 0.0, "early_stopping": True, "max_length": config.max_position_embeddings}
    return {**search, "past_present_share_buffer": True}


def _special_tokens(checkpoint: Checkpoint, tokenizer: Any, generation: GenerationConfig | None) -> dict[str, Any]:
    """bos, eos and pad ids: generation config, then config, then tokenizer; a chat's end-of-turn token also ends."""
    sources = (generation, checkpoint.config, tokenizer)

    def first(name: str) -> Any:
        return next((ids for source in sources if (ids := getattr(source, name, None)) is not None), None)

    ends = first("eos_token_id")
    ends = list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.insert(0, tokenizer.eos_token_id)
    begin, pad = first("bos_token_id"), first("pad_token_id")
    tokens: dict[str, Any] = {"bos_token_id": begin} if begin is not None else {}
    if ends:
        tokens |= {"eos_token_id": ends[0] if len(ends) == 1 else ends}
        pad = ends[-1] if pad is None else pad
    return tokens if pad is None else {**tokens, "pad_token_id": pad}


def _generation(checkpoint: Checkpoint) -> GenerationConfig | None:
    path = checkpoint.path / "generation_config.json"
    return GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True) if path.is_file() else None


def _plain_config(checkpoint: Checkpoint, provenance: dict[str, str]) -> dict[str, Any]:
    """The model's config without the layout of its matrices, which is in the graph; where it came from is kept."""
    content = checkpoint.config.to_dict()
    content.pop("quantization_config", None)
    content.pop("_name_or_path", None)
    return {**content, "sola": provenance}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")
