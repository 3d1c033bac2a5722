"""The ONNX export against PyTorch, on tiny random models: logits, decoding with a cache, onnxruntime-genai, files, refusals.

Tolerance: max |Δlogit| ≤ 1e-4 standard deviations of the logits (about 4 here: the random weights are large).
"""

import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from layouts import EQUALLY_NARROW, MIXED, NARROW, Layouts, checkpoint_with, down, gate
from transformers import AutoModelForCausalLM

import exporters.onnx
import sola_edge  # noqa: F401  (transformers loads compressed checkpoints)
from exporters.result import ExportResult
from sola_edge.checkpoint import Checkpoint, open_checkpoint
from sola_edge.config import MatrixLayout
from sola_edge.errors import UserError
from sola_edge.testing import tiny_checkpoint

TOLERANCE = 1e-4
TOKENS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "compressed": {"compressed": True},
    "mistral-window": {"model_type": "mistral", "compressed": True, "sliding_window": 8},
    "biases-untied": {"compressed": True, "bias": True, "tied": False},
    "multi-query": {"heads": 4, "kv_heads": 1, "rope_scaling": LLAMA3},
    "one-head-per-key": {"heads": 4, "kv_heads": 4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "explicit-head-width": {"heads": 6, "kv_heads": 3, "head_dim": 32, "compressed": True},
    "gate-dense": {"compressed": True, "bias": True, "dense_components": ("gate",)},
    "down-dense": {"compressed": True, "dense_components": ("down",)},
    "only-up-factored": {"compressed": True, "dense_components": ("gate", "down")},
    "only-down-factored": {"compressed": True, "dense_components": ("gate", "up")},
}
# Which no method makes, and the checkpoint allows: gate and up split on their inputs, down on its outputs.
UNUSUAL: Layouts = {
    (1, "q"): MatrixLayout(64, 64, 16, 24, "in"),
    (1, "gate"): MatrixLayout(160, 64, 16, 24, "in"),
    (2, "gate"): gate(160, 40, 16),
    (2, "up"): gate(160, 40, 16),
    (2, "down"): MatrixLayout(64, 160, 8, 16, "out"),
}
LAYOUTS: dict[str, tuple[Layouts, dict[str, Any]]] = {
    "every-layout": (MIXED, {}),
    "every-layout-biased": (MIXED, {"bias": True, "tied": False}),
    "unusual-splits": (UNUSUAL, {}),
    "narrow": (NARROW, {}),
    "equally-narrow": (EQUALLY_NARROW, {"model_type": "mistral", "sliding_window": None}),
}


@pytest.fixture(scope="module", params=[*CASES, *LAYOUTS])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportResult]:
    """(checkpoint folder, its export) of each case."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in CASES:
        source = tiny_checkpoint(folder / "checkpoint", layers=3, **CASES[request.param])
    else:
        layouts, values = LAYOUTS[request.param]
        source = checkpoint_with(folder / "checkpoint", layouts, **values)
    return source, exporters.onnx.export(source, folder / "onnx")


def reference(source: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(source).eval()


def torch_logits(source: Path, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return reference(source)(tokens).logits.numpy()


def session_of(model: Path | bytes) -> onnxruntime.InferenceSession:
    """One thread; fp16 graphs warn of every cast that the CPU needs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def empty_cache(session: onnxruntime.InferenceSession, batch: int) -> dict[str, np.ndarray]:
    """`past_key_values.*` without a token, in the graph's own type."""
    pasts = [value for value in session.get_inputs() if value.name.startswith("past")]
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    return {v.name: np.zeros((batch, v.shape[1], 0, v.shape[3]), types[v.type]) for v in pasts}


class Runner:
    """An onnxruntime session that keeps its own cache."""

    def __init__(self, path: Path, batch: int) -> None:
        self.session = session_of(path)
        self.past = empty_cache(self.session, batch)
        self.seen = 0

    def __call__(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> np.ndarray:
        """Logits of the next tokens (batch, n); mask (batch, all tokens so far) where some of them are padding."""
        self.seen += tokens.shape[1]
        seen = torch.ones(tokens.shape[0], self.seen, dtype=torch.int64) if mask is None else mask
        feed = {"input_ids": tokens.numpy(), "attention_mask": seen.numpy(), **self.past}
        logits, *presents = self.session.run(None, feed)
        self.past = dict(zip(self.past, presents, strict=True))
        return logits


def genai_greedy(result: ExportResult, prompt: torch.Tensor, count: int) -> list[int]:
    """The prompt (1, n) and its greedy continuation by onnxruntime-genai."""
    genai = pytest.importorskip("onnxruntime_genai")
    config = genai.Config(str(result.path.parent))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
    model = genai.Model(config)
    length = prompt.shape[1] + count
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0))


def torch_greedy(source: Path, prompt: torch.Tensor, count: int) -> list[int]:
    """The same by PyTorch."""
    options: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    return reference(source).generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0].tolist()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    error = np.abs(found - expected).max()
    assert error <= TOLERANCE * expected.std() and error <= 1e-3
    p, q = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (expected, found))
    assert (p.exp() * (p - q)).sum(-1).mean() <= 1e-6


def test_logits_are_pytorchs(exported: tuple[Path, ExportResult]) -> None:
    source, result = exported
    assert_close(Runner(result.path, 2)(TOKENS), torch_logits(source, TOKENS))


def test_decoding_step_by_step_equals_the_full_pass(exported: tuple[Path, ExportResult]) -> None:
    source, result = exported
    runner = Runner(result.path, 2)
    steps = [TOKENS[:, :11], *TOKENS[:, 11:].split(1, dim=1)]
    assert_close(np.concatenate([runner(step) for step in steps], axis=1), torch_logits(source, TOKENS))


def test_a_prompt_in_chunks_equals_the_full_pass(exported: tuple[Path, ExportResult]) -> None:
    """One sequence: ONNX Runtime takes several tokens beside a cache at batch size 1 only."""
    source, result = exported
    runner, tokens = Runner(result.path, 1), TOKENS[:1]
    steps = tokens.split((5, 20, 1, 14), dim=1)
    assert_close(np.concatenate([runner(step) for step in steps], axis=1), torch_logits(source, tokens))


def test_genai_generates_what_pytorch_generates(exported: tuple[Path, ExportResult]) -> None:
    source, result = exported
    prompt = TOKENS[:1, :16]
    assert genai_greedy(result, prompt, 32) == torch_greedy(source, prompt, 32)


@pytest.mark.parametrize("exported", LAYOUTS, indirect=True)
def test_optimum_computes_what_pytorch_does(exported: tuple[Path, ExportResult]) -> None:
    """An independent client: logits, and greedy tokens through its own cache."""
    optimum = pytest.importorskip("optimum.onnxruntime")
    source, result = exported
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    folder, prompt = result.path.parent, TOKENS[:1, :16]
    model = optimum.ORTModelForCausalLM.from_pretrained(folder, session_options=options)
    assert_close(model(TOKENS, attention_mask=torch.ones_like(TOKENS)).logits.numpy(), torch_logits(source, TOKENS))
    counted: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **counted)
    assert found[0].tolist() == torch_greedy(source, prompt, 16)


def test_genai_tokenizes_as_transformers_does(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=1)
    result = exporters.onnx.export(source, tmp_path / "onnx")
    text = "Héllo  1234 world's\n\n\tdef f(x):\r\n    return x 日本語 🤗<|im_start|>user\n"
    tokenizer = genai.Tokenizer(genai.Model(str(result.path.parent)))
    assert list(tokenizer.encode(text)) == open_checkpoint(source).tokenizer()(text).input_ids


def test_the_checker_passes(exported: tuple[Path, ExportResult]) -> None:
    onnx.checker.check_model(str(exported[1].path), full_check=True)


def test_bytes_are_what_the_parameters_say(exported: tuple[Path, ExportResult]) -> None:
    """One data file: every parameter once (a tied head is no copy) and the two rotary tables."""
    source, result = exported
    checkpoint = open_checkpoint(source)
    graph = onnx.load(result.path, load_external_data=False).graph
    tables = sum(int(np.prod(row.dims)) for row in graph.initializer if row.name in ("cos_cache", "sin_cache"))
    data = result.path.with_name("model.onnx.data")
    assert data.stat().st_size == 4 * (checkpoint.parameters() + tables)
    locations = {entry.value for row in graph.initializer for entry in row.external_data if entry.key == "location"}
    assert locations == {data.name}
    assert result.bytes == sum(file.stat().st_size for file in result.files)


def test_names_are_those_of_the_checkpoint(exported: tuple[Path, ExportResult]) -> None:
    """Of stacked ones too: `a.b.c+d.e` holds a.b.c and a.b.d.e, each under its own name or followed by `.weight`."""
    source, result = exported
    names = {row.name for row in onnx.load(result.path, load_external_data=False).graph.initializer}
    for first, *others in [name.split("+") for name in names if "+" in name]:
        parents = [first.rsplit(".", cut)[0] for cut in (1, 2)]
        parts = [first, *(f"{parent}.{other}" for parent in parents for other in others)]
        names |= {part + end for part in parts for end in ("", ".weight")}
    stored = {name for name in open_checkpoint(source).names() if not name.endswith(".bias")}
    assert stored <= names


def operators(result: ExportResult) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(result.path, load_external_data=False).graph.node)


def test_a_hybrid_ffn_is_two_parallel_branches(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", compressed=True, layers=3)
    kinds = operators(exporters.onnx.export(source, tmp_path / "onnx"))
    assert kinds["Concat"] == 0
    assert kinds["Split"] == 2  # what q, k, v and what gate, up multiply the input by is stacked
    dense, attention, ffn = 2 * (1 + 1 + 3), 1 + 2 + 2, 1 + 2 + 3
    assert kinds["MatMul"] == dense + attention + ffn


def test_the_portable_graph_stacks_what_shares_an_input(tmp_path: Path) -> None:
    """Its attention takes no packed q, k, v, so their stack is split in dense layers too; gate and up stay apart there."""
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=3, tied=False)
    kinds = operators(exporters.onnx.export(source, tmp_path / "onnx", graph="portable"))
    assert (kinds["Split"], kinds["MatMul"]) == (3, 3 * 5 + 1)


@pytest.mark.parametrize(("dense", "concats", "splits"), [(("gate",), 1, 3), (("down",), 1, 2), (("gate", "up"), 0, 2)])
def test_pieces_meet_only_where_they_must(tmp_path: Path, dense: tuple[str, ...], concats: int, splits: int) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", compressed=True, layers=3, dense_components=dense)
    kinds = operators(exporters.onnx.export(source, tmp_path / "onnx"))
    assert (kinds["Concat"], kinds["Split"]) == (concats, splits)


ONE_PRIME: Layouts = {
    (1, "gate"): gate(96, 24, 16, pivot=True),
    (1, "up"): gate(96, 24, 16, pivot=True, gather=True),
    (1, "down"): down(96, 24, 16, pivot=True, gather=True),
}
SEVERAL_PRIMES = {**ONE_PRIME, (1, "gate"): gate(96, 32, 16, pivot=True)}


@pytest.mark.parametrize(
    ("layouts", "concats", "gathers", "splits"), [(ONE_PRIME, 3, 2, 1), (SEVERAL_PRIMES, 5, 2, 2), (NARROW, 0, 0, 0)]
)
def test_pivots_take_a_concat_and_stay_in_their_branch(
    tmp_path: Path, layouts: Layouts, concats: int, gathers: int, splits: int
) -> None:
    """A concat for each pivoted matrix, and beyond that where gate and up must be joined and down cuts them."""
    source = checkpoint_with(tmp_path / "checkpoint", layouts)
    kinds = operators(exporters.onnx.export(source, tmp_path / "onnx"))
    embedding_and_length = 2
    assert (kinds["Concat"], kinds["Gather"] - embedding_and_length, kinds["Split"]) == (concats, gathers, splits)


def test_metadata_and_configs_say_what_it_is(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", compressed=True, layers=3)
    result = exporters.onnx.export(source, tmp_path / "onnx")
    metadata = {row.key: row.value for row in onnx.load(result.path, load_external_data=False).metadata_props}
    assert metadata["tool"].startswith("sola-edge") and metadata["method"] == "random"
    folder = result.path.parent
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    genai = json.loads((folder / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["num_key_value_heads"] == 2
    assert genai["model"]["eos_token_id"] == 2
    assert genai["search"]["past_present_share_buffer"] is True


@pytest.mark.parametrize(("precision", "workers"), [("fp32", 2), ("int8", 1)])
def test_one_stack_of_tensors_in_memory_for_each_worker(
    precision: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", compressed=True, layers=3, tied=False)
    read, alive, most = Checkpoint.tensor, list[weakref.ref[torch.Tensor]](), 0

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(reference() is not None for reference in alive))
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    exporters.onnx.export(source, tmp_path / "onnx", precision=precision)
    assert len(alive) == len(open_checkpoint(source).names())  # none is read or quantized twice
    assert most <= 3 * workers  # q, k and v on their way into one stack


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=3)
    first = exporters.onnx.export(source, tmp_path / "onnx")
    assert exporters.onnx.export(source, tmp_path / "onnx") == first


@pytest.mark.parametrize(
    ("arguments", "config", "words"),
    [
        ({"graph": "stitched"}, {}, "genai, portable"),
        ({"precision": "int3"}, {}, "fp32"),
        ({}, {"heads": 8, "kv_heads": 8}, "heads of 8 channels"),
        ({}, {"hidden_act": "mish"}, "mish"),
        ({}, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, arguments: dict[str, str], config: dict[str, Any], words: str
) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=1, **config)
    with pytest.raises(UserError, match=words):
        exporters.onnx.export(source, tmp_path / "onnx", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=1)
    with pytest.raises(UserError, match="does not exist"):
        exporters.onnx.export(tmp_path / "absent", tmp_path / "onnx")
    for taken in (source, source / "config.json"):
        with pytest.raises(UserError):
            exporters.onnx.export(source, taken)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        exporters.onnx.export(source, tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=1)

    def damaged(self: Checkpoint, name: str) -> torch.Tensor:
        raise UserError(f"{name} is damaged")

    monkeypatch.setattr(Checkpoint, "tensor", damaged)
    with pytest.raises(UserError, match="is damaged"):
        exporters.onnx.export(source, tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smollm2", "smollm2_compressed"])
@pytest.mark.parametrize("graph", exporters.onnx.GRAPHS)
def test_smollm2(kind: str, graph: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The real model: the bounds on the distribution, the same greedy tokens, the same tokenization."""
    source = request.getfixturevalue(kind)
    result = exporters.onnx.export(source, tmp_path / "onnx", graph=graph)
    tokenizer = open_checkpoint(source).tokenizer()
    text = str(onnxruntime.InferenceSession.run.__doc__) + str(torch.nn.Module.__doc__)
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    logits = torch_logits(source, tokens), Runner(result.path, 1)(tokens)
    assert np.abs(logits[0] - logits[1]).max() <= 1e-3
    expected, found = (torch.from_numpy(values).double().log_softmax(-1) for values in logits)
    assert (expected.exp() * (expected - found)).sum(-1).mean() <= 1e-6
    assert (expected.argmax(-1) == found.argmax(-1)).double().mean() >= 0.999
    assert genai_greedy(result, tokens[:, :32], 64) == torch_greedy(source, tokens[:, :32], 64)
    genai = pytest.importorskip("onnxruntime_genai")
    assert list(genai.Tokenizer(genai.Model(str(tmp_path / "onnx"))).encode(text)) == tokenizer(text).input_ids


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [("smollm2", 1e-3), ("smollm2_compressed", 2e-3)])
def test_smollm2_in_int8(kind: str, most: float, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Near PyTorch, compressed too: a factored matrix is rounded twice, and its basis is chosen so that this is all."""
    source = request.getfixturevalue(kind)
    tokenizer = open_checkpoint(source).tokenizer()
    tokens = tokenizer(str(torch.nn.Module.__doc__), return_tensors="pt").input_ids[:, :512]
    expected = torch.from_numpy(torch_logits(source, tokens)).double().log_softmax(-1)
    result = exporters.onnx.export(source, tmp_path / "onnx", precision="int8")
    found = torch.from_numpy(Runner(result.path, 1)(tokens)).double().log_softmax(-1)
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    print(f"int8 of {kind}: KL {divergence:.2e}")
    assert divergence <= most


@pytest.mark.slow
def test_smollm2_in_int4_is_nearer_with_a_text_in_mind(smollm2: Path, tmp_path: Path, all_cores: None) -> None:
    """On text that the rounding has not read."""
    tokens = open_checkpoint(smollm2).tokenizer()(str(torch.nn.Module.__doc__), return_tensors="pt").input_ids[:, :512]
    expected = torch.from_numpy(torch_logits(smollm2, tokens)).double().log_softmax(-1)
    found = {}
    for name, text in (("nearest", None), ("gptq", exporters.onnx.Text(windows=8, window=512))):
        choices = exporters.onnx.Quantization(text=text)
        result = exporters.onnx.export(smollm2, tmp_path / name, precision="int4", quantization=choices)
        logits = torch.from_numpy(Runner(result.path, 1)(tokens)).double().log_softmax(-1)
        found[name] = float((expected.exp() * (expected - logits)).sum(-1).mean())
    print(found)
    assert found["gptq"] < found["nearest"]


def test_a_gguf_file_exports_as_its_folder_does(tmp_path: Path) -> None:
    """Its tensors are dequantized by two threads; F32 values are the same."""
    from exporters.gguf import export as export_gguf

    folder = tiny_checkpoint(tmp_path / "checkpoint", layers=3, tied=False)
    file = export_gguf(folder, tmp_path / "model.gguf", "f32").path
    data = [exporters.onnx.export(source, tmp_path / f"onnx{i}").path for i, source in enumerate((folder, file))]
    assert data[0].with_name("model.onnx.data").read_bytes() == data[1].with_name("model.onnx.data").read_bytes()
