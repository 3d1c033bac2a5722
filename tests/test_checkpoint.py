"""Reading and writing weights: shards, GGUF, damage, and transformers' view of a compressed checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sola_edge  # noqa: F401  (registers the quantization method)
from sola_edge import checkpoint as checkpoint_module
from sola_edge.checkpoint import INDEX, copy_checkpoint, open_checkpoint
from sola_edge.config import MatrixLayout
from sola_edge.errors import UserError
from sola_edge.gguf_source import _unpermute
from sola_edge.layers import HybridLinear, empty_linear, replace_linears
from sola_edge.testing import tiny_checkpoint

IDS = torch.arange(3, 40)[None]


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_round_trip(tmp_path: Path, model_type: str, tied: bool) -> None:
    folder = tiny_checkpoint(tmp_path / "model", model_type=model_type, compressed=True, tied=tied, bias=True)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert isinstance(model.model.layers[1].mlp.down_proj, HybridLinear)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(folder), logits(tmp_path / "again"))
    assert open_checkpoint(tmp_path / "again").layout == open_checkpoint(folder).layout
    tokens = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    assert tokens.shape == (1, IDS.shape[1] + 4)


def test_loads_in_a_process_that_imports_transformers_later(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", compressed=True)
    code = (
        "import sys, sola_edge; assert 'transformers' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(folder)!r}).model.layers[1].mlp.up_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "HybridLinear"


def test_sharded_is_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "one"))
    monkeypatch.setattr(checkpoint_module, "SHARD_BYTES", 100_000)
    copy_checkpoint(source, tmp_path / "many")
    assert (tmp_path / "many" / INDEX).exists()
    copy = open_checkpoint(tmp_path / "many")
    assert len(copy.weight_files()) > 3
    assert sorted(copy.names()) == sorted(source.names())
    assert all(torch.equal(copy.tensor(name), source.tensor(name)) for name in source.names())
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "many"))


def test_half_precision_stays_half(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    copy_checkpoint(open_checkpoint(folder), tmp_path / "copy")
    assert open_checkpoint(tmp_path / "copy").dtype == torch.bfloat16
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_transformers_ignores_is_ignored(tmp_path: Path) -> None:
    """A stored head that the config ties to the embedding, and RoPE buffers that old checkpoints carry."""
    folder = tiny_checkpoint(tmp_path / "model", tied=True)
    plain = open_checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    extra = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights | extra, folder / "model.safetensors", metadata={"format": "pt"})
    again = open_checkpoint(folder)
    assert again.tied
    assert again.parameters() == plain.parameters()
    assert sorted(again.names()) == sorted(plain.names())


def test_unpermute_is_llama_cpps_permutation_undone() -> None:
    """Two heads of four rows: llama.cpp stores row pairs (0, 2, 1, 3) of each head."""
    rows = np.arange(8).reshape(8, 1)
    permuted = rows.reshape(2, 2, 2, 1).swapaxes(1, 2).reshape(8, 1)
    assert permuted[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert _unpermute(permuted, 2)[:, 0].tolist() == list(range(8))


def damaged_folder(folder: Path, damage: str) -> Path:
    tiny_checkpoint(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    content = json.loads(config.read_text())
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "no config":
        config.unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "config is no JSON":
        config.write_text("{")
    elif damage == "architecture":
        config.write_text(json.dumps({"model_type": "gpt2"}))
    elif damage == "shape":
        config.write_text(json.dumps(content | {"intermediate_size": 168}))
    elif damage == "missing tensor":
        config.write_text(json.dumps(content | {"num_hidden_layers": 6}))
    elif damage == "quantized":
        config.write_text(json.dumps(content | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    elif damage == "layout":
        config.write_text(
            json.dumps(content | {"quantization_config": {"quant_method": "sola", "matrices": {"x": {}}}})
        )
    elif damage == "missing norm":
        kept = {n: t for n, t in load_file(weights).items() if n != "model.layers.1.input_layernorm.weight"}
        save_file(kept, weights, metadata={"format": "pt"})
    elif damage == "value":
        config.write_text(json.dumps(content | {"num_hidden_layers": "x"}))
    elif damage == "index":
        (folder / INDEX).write_text("[]")
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "truncated"),
        ("no config", "config.json is missing"),
        ("no weights", "model.safetensors is missing"),
        ("config is no JSON", "no JSON"),
        ("architecture", "'gpt2' is not supported"),
        ("shape", r"has shape \(160, 64\), its config asks for \(168, 64\)"),
        ("missing tensor", "lacks the tensor model.layers.5"),
        ("quantized", "gptq-quantized"),
        ("layout", "no sola layout"),
        ("missing norm", "lacks the tensor model.layers.1.input_layernorm"),
        ("value", "config"),
        ("index", "no safetensors index"),
    ],
)
def test_damage_is_one_clear_line(tmp_path: Path, damage: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_checkpoint(damaged_folder(tmp_path / "model", damage))


@pytest.mark.parametrize("kept", [0, 3, 20, 2000])
def test_truncated_gguf_is_one_clear_line(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((320, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="truncated"):
        open_checkpoint(path)


@pytest.mark.slow
def test_smollm2_gguf_is_transformers_reading_of_it(smollm2_gguf: Path, smollm2: Path) -> None:
    """Names, dequantization and the RoPE permutation, judged by transformers' own GGUF loader."""
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name).state_dict()
    ours = open_checkpoint(smollm2)
    assert ours.parameters() == 134_515_008
    assert ours.tied
    for name in ours.names():
        assert torch.equal(ours.tensor(name), theirs[name]), name


@pytest.mark.slow
def test_smollm2_tokenizer_round_trips(smollm2: Path) -> None:
    tokenizer = open_checkpoint(smollm2).tokenizer()
    text = "Hello  world 12345\r\n\tdef f(x): return 'é ü 漢字 🙂'<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 2 == ids[-1]
    assert ids[0] != tokenizer.bos_token_id
    assert [tokenizer.decode(i) for i in tokenizer("12345")["input_ids"]] == list("12345")


def test_nothing_is_in_memory_before_weights_are_read() -> None:
    """transformers builds a model on `meta`; what takes the place of its matrices is there too, and not initialized."""
    layouts = {
        "0": MatrixLayout(n_out=8, n_in=16, prime=2, rank=3),
        "1": MatrixLayout(n_out=6, n_in=8, prime=0, rank=0),
        "2": MatrixLayout(n_out=16, n_in=6, prime=0, rank=3, pivot=True, gather=True),
    }
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 8), torch.nn.Linear(6, 16))
    replace_linears(model, layouts)
    tensors = [*model.parameters(), *model.buffers()]
    assert len(tensors) == 4 + 2 + 4 and all(tensor.is_meta for tensor in tensors)
    with torch.device("meta"):
        assert all(p.is_meta for layout in layouts.values() for p in empty_linear(layout, dense_bias=True).parameters())
