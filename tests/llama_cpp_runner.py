"""What the tests of the GGUF export share: models run by llama.cpp and by PyTorch, and the distance between them."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from exporters.llama_cpp import Build
from sola_edge.architecture import attention_implementation

PROBE = Path(__file__).with_name("llama_cpp_probe.py")
IDS = torch.randint(3, 250, (48,), generator=torch.Generator().manual_seed(7)).tolist()


class Refused(Exception):
    """llama.cpp did not load the model; the message is its log."""


def probe(build: Build, model: Path, **request: Any) -> dict[str, Any]:
    """The probe's answer. Raises Refused when the model does not load; any crash is a failure of the test."""
    command = [sys.executable, str(PROBE), json.dumps({"model": str(model), **request})]
    result = subprocess.run(command, env=build.environment(), capture_output=True, text=True, check=False)
    if result.returncode == 3:
        raise Refused(result.stderr)
    assert result.returncode == 0, f"exit code {result.returncode}: {result.stderr[-3000:]}"
    return json.loads(result.stdout.splitlines()[-1])


def llama_cpp_logits(build: Build, model: Path, **request: Any) -> np.ndarray:
    """(tokens, vocabulary) for IDS."""
    out = model.with_suffix(".npy")
    probe(build, model, ids=IDS, out=str(out), **request)
    return np.load(out)


def torch_logits(folder: Path) -> np.ndarray:
    """(tokens, vocabulary) for IDS by transformers in fp32."""
    attention = attention_implementation(AutoConfig.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def torch_logits_of_halves(folder: Path) -> np.ndarray:
    """The same where all that a llama.cpp with a file of F16 rounds is rounded: matrices, their inputs, keys and values."""
    attention = attention_implementation(AutoConfig.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = _half(parameter.data)
    linear, attend = functional.linear, functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(functional, "linear", lambda x, weight, bias=None: linear(_half(x), weight, bias))
        patch.setattr(
            functional,
            "scaled_dot_product_attention",
            lambda q, k, v, *rest, **named: attend(q, _half(k), _half(v), *rest, **named),
        )
        return model(torch.tensor([IDS])).logits[0].numpy()


def _half(values: torch.Tensor) -> torch.Tensor:
    return values.half().float()


def convertible(folder: Path) -> Path:
    """The folder of a tiny model, with the tokenizer files that llama.cpp's converter wants of its architecture."""
    add = WANTED.get(json.loads((folder / "config.json").read_text())["model_type"])
    if add:
        add(folder)
    return folder


def _sentencepiece(folder: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    model, words = io.BytesIO(), ["pack my box with five dozen jugs"] * 9
    settings = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False}
    SentencePieceTrainer.train(sentence_iterator=iter(words), model_writer=model, minloglevel=2, **settings)
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def _gpt2(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "GPT2Tokenizer"}))


WANTED = {"gemma2": _sentencepiece, "phi3": _gpt2}


def divergence(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Mean KL divergence of the candidate from the reference, in nats, computed in fp64."""
    p = torch.from_numpy(reference).double().log_softmax(-1)
    q = torch.from_numpy(candidate).double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def architecture_of(model: Path) -> str:
    """What the file says that it is."""
    return str(gguf.GGUFReader(model).fields["general.architecture"].contents())


def rewritten(
    source: Path,
    target: Path,
    change: Callable[[str, np.ndarray], np.ndarray | None],
    extra: Mapping[str, np.ndarray] = MappingProxyType({}),
    flags: Mapping[str, bool] = MappingProxyType({}),
) -> Path:
    """The file with each tensor as `change(name, values)` returns it (None: left out), extra ones, and flags in its metadata.

    Quantized tensors are handed over, and stored, as float32.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, architecture_of(source))
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)
    for key, value in flags.items():
        writer.add_bool(key, value)
    for tensor in reader.tensors:
        values = change(tensor.name, dequantize(tensor.data, tensor.tensor_type))
        if values is not None:
            writer.add_tensor(tensor.name, np.ascontiguousarray(values))
    for name, values in extra.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
