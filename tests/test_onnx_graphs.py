"""Every architecture in every ONNX graph against PyTorch, on tiny random models whose texts outgrow their windows.

Logits, decoding with a cache, batches padded on either side, the clients that run the files, and what a graph is made of.
Tolerance as in test_onnx.py: max |Δlogit| ≤ 1e-4 standard deviations of the logits.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from layouts import MIXED, NARROW, Layouts, checkpoint_with
from test_onnx import LLAMA3, TOKENS, Runner, assert_close
from transformers import AutoConfig, AutoModelForCausalLM

import exporters.onnx
import sola_edge  # noqa: F401  (transformers loads compressed checkpoints)
from exporters.result import ExportResult
from sola_edge.architecture import attention_implementation
from sola_edge.checkpoint import open_checkpoint
from sola_edge.errors import UserError
from sola_edge.testing import tiny_checkpoint

PADDING, PAD = 7, 2  # tokens, id
END = 2  # id of the token that ends a text
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": LLAMA3},
    "llama, biases, untied": {"bias": True, "tied": False},
    "llama, yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, two kinds": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3"},
    "qwen3, biases": {"model_type": "qwen3", "attention_bias": True, "tied": False},
    "gemma2": {"model_type": "gemma2"},
    "gemma3_text": {"model_type": "gemma3_text"},
    "gemma3_text, scaled": {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "phi3": {"model_type": "phi3", "tied": False},
    "phi3, sliding": {"model_type": "phi3", "sliding_window": 16},
    "phi3, partly rotated": {"model_type": "phi3", "partial_rotary_factor": 0.5, "heads": 2, "kv_heads": 1},
}
LAYOUTS: dict[str, Layouts] = {"llama, every layout": MIXED, "llama, narrow": NARROW}
SOURCES = [*MODELS, *(f"{name}, compressed" for name in MODELS), *LAYOUTS]
CASES = [(source, graph) for source in SOURCES for graph in exporters.onnx.GRAPHS]
# Of these types optimum 2.1 asks the config for other key/value heads or another head width than the model has.
OPTIMUM = ("llama", "mistral", "qwen2", "gemma3_text")


def checkpoint_of(folder: Path, name: str) -> Path:
    if name in LAYOUTS:
        return checkpoint_with(folder, LAYOUTS[name])
    dense = name.removesuffix(", compressed")
    return tiny_checkpoint(folder, layers=4, compressed=name != dense, **MODELS[dense])


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ExportResult]:
    """(PyTorch's model, the export) of each case."""
    name, graph = request.param
    folder = tmp_path_factory.mktemp("case")
    source = checkpoint_of(folder / "checkpoint", name)
    return reference(source), exporters.onnx.export(source, folder / "onnx", graph=graph)


def reference(source: Path) -> Any:
    attention = attention_implementation(AutoConfig.from_pretrained(source))
    return AutoModelForCausalLM.from_pretrained(source, attn_implementation=attention).eval()


def logits(model: Any, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(tokens).logits.numpy()


def greedy(model: Any, prompt: torch.Tensor, count: int) -> list[int]:
    """The prompt (n,) and its `count` likeliest tokens by PyTorch, each from the whole text: no cache, no padding, no end."""
    text = prompt[None]
    for _ in range(count):
        found = torch.from_numpy(logits(model, text)[:, -1:])
        found[..., END] = -torch.inf
        text = torch.cat([text, found.argmax(-1)], dim=1)
    return text[0].tolist()


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of both rows of TOKENS, the first without its last tokens, which padding stands for."""
    short, pad = TOKENS[0, :-PADDING], torch.full((PADDING,), PAD)
    first = torch.cat([pad, short] if side == "left" else [short, pad])
    ids = torch.stack([first, TOKENS[1]])
    mask = torch.ones_like(ids)
    mask[0, slice(0, PADDING) if side == "left" else slice(-PADDING, None)] = 0
    return ids, mask


def test_logits_are_pytorchs(exported: tuple[Any, ExportResult]) -> None:
    model, result = exported
    assert_close(Runner(result.path, 2)(TOKENS), logits(model, TOKENS))


def test_decoding_step_by_step_equals_the_full_pass(exported: tuple[Any, ExportResult]) -> None:
    model, result = exported
    runner = Runner(result.path, 2)
    steps = [TOKENS[:, :11], *TOKENS[:, 11:].split(1, dim=1)]
    assert_close(np.concatenate([runner(step) for step in steps], axis=1), logits(model, TOKENS))


def test_a_prompt_in_chunks_equals_the_full_pass(exported: tuple[Any, ExportResult]) -> None:
    model, result = exported
    runner, tokens = Runner(result.path, 1), TOKENS[:1]
    steps = tokens.split((5, 20, 1, 14), dim=1)
    assert_close(np.concatenate([runner(step) for step in steps], axis=1), logits(model, tokens))


@pytest.mark.parametrize("exported", [case for case in CASES if case[1] == "portable"], indirect=True)
def test_a_batch_of_prompts_in_chunks_equals_the_full_pass(exported: tuple[Any, ExportResult]) -> None:
    """GroupQueryAttention takes several tokens beside a cache at batch size 1 only, the standard's operator at any."""
    model, result = exported
    runner = Runner(result.path, 2)
    steps = TOKENS.split((5, 20, 1, 14), dim=1)
    assert_close(np.concatenate([runner(step) for step in steps], axis=1), logits(model, TOKENS))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_row_without_padding(exported: tuple[Any, ExportResult], side: str) -> None:
    """The prompt, then tokens decoded beside a cache that has the padding; all rows of all steps."""
    model, result = exported
    ids, mask = padded(side)
    tokens = mask.bool()
    more = torch.randint(3, 300, (2, 6), generator=torch.Generator().manual_seed(5))
    runner = Runner(result.path, 2)
    found = [runner(ids, mask)]
    for step in more.split(1, dim=1):
        mask = torch.cat([mask, torch.ones_like(step)], dim=1)
        found.append(runner(step, mask))
    decoded = np.concatenate(found[1:], axis=1)
    for row in range(2):
        expected = logits(model, torch.cat([ids[row][tokens[row]], more[row]])[None])[0]
        assert_close(np.concatenate([found[0][row][tokens[row].numpy()], decoded[row]]), expected)


def test_the_checker_passes(exported: tuple[Any, ExportResult]) -> None:
    onnx.checker.check_model(str(exported[1].path), full_check=True)


@pytest.mark.parametrize("exported", [case for case in CASES if case[1] == "portable"], indirect=True)
def test_the_portable_graph_is_standard(exported: tuple[Any, ExportResult]) -> None:
    model = onnx.load(exported[1].path, load_external_data=False)
    assert [(row.domain, row.version) for row in model.opset_import] == [("", 23)]
    for node in model.graph.node:
        assert node.domain == ""
        assert onnx.defs.get_schema(node.op_type, 23).since_version <= 23


def test_every_weight_is_stored_once(exported: tuple[Any, ExportResult]) -> None:
    """A tied head is no copy; beside the parameters there are rotary tables or frequencies."""
    _, result = exported
    checkpoint = open_checkpoint(result.path.parent.parent / "checkpoint")
    graph = onnx.load(result.path, load_external_data=False).graph
    rotary = [row for row in graph.initializer if row.name.startswith(("cos_cache", "sin_cache", "rotary"))]
    extra = sum(int(np.prod(row.dims)) for row in rotary)
    assert result.path.with_name("model.onnx.data").stat().st_size == 4 * (checkpoint.parameters() + extra)


def test_both_graphs_have_the_same_inputs_and_outputs(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=2)
    signatures = []
    for graph in exporters.onnx.GRAPHS:
        session = onnxruntime.InferenceSession(str(exporters.onnx.export(source, tmp_path / graph, graph=graph).path))
        values = [*session.get_inputs(), *session.get_outputs()]
        signatures.append([(value.name, value.type, value.shape) for value in values])
    assert signatures[0] == signatures[1]


@pytest.mark.parametrize("exported", [case for case in CASES if case[0] in OPTIMUM], indirect=True)
@pytest.mark.parametrize("cache", [True, False])
def test_optimum_generates_what_pytorch_does(exported: tuple[Any, ExportResult], cache: bool) -> None:
    """An independent client, with and without its cache, on a batch that is padded on the left."""
    optimum = pytest.importorskip("optimum.onnxruntime")
    model, result = exported
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    client = optimum.ORTModelForCausalLM.from_pretrained(result.path.parent, session_options=options)
    ids, mask = padded("left")
    counted: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "use_cache": cache}
    found = client.generate(ids, attention_mask=mask, **counted)
    assert found[0, PADDING:].tolist() == greedy(model, TOKENS[0, :-PADDING], 12)
    assert found[1].tolist() == greedy(model, TOKENS[1], 12)


def generator(result: ExportResult, length: int, batch: int) -> Any:
    """onnxruntime-genai on an export, greedy up to `length` tokens."""
    genai = pytest.importorskip("onnxruntime_genai")
    config = genai.Config(str(result.path.parent))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
    parameters = genai.GeneratorParams(genai.Model(config))
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=batch)
    return genai.Generator(genai.Model(config), parameters)


def finished(made: Any) -> Any:
    while not made.is_done():
        made.generate_next_token()
    return made


def test_genai_generates_what_pytorch_does(exported: tuple[Any, ExportResult]) -> None:
    model, result = exported
    made = generator(result, 40, 1)
    made.append_tokens(TOKENS[:1, :16].numpy().astype(np.int32))
    assert list(finished(made).get_sequence(0)) == greedy(model, TOKENS[0, :16], 24)


def test_genai_samples_what_the_distribution_has(tmp_path: Path) -> None:
    """Sampled next tokens over many rows: their shares are the probabilities of PyTorch's logits, within what chance allows.

    Four of the kept tokens' standard errors, over those with at least a hundredth of the mass.
    """
    genai = pytest.importorskip("onnxruntime_genai")
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=2)
    result = exporters.onnx.export(source, tmp_path / "onnx")
    prompt, rows, kept = TOKENS[:1, :12], 32, 8
    with torch.no_grad():
        top = reference(source)(prompt).logits[0, -1].topk(kept)
    p = dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))
    counts = dict.fromkeys(p, 0)
    for seed in range(32):
        parameters = genai.GeneratorParams(genai.Model(str(result.path.parent)))
        sampled = {"do_sample": True, "top_k": kept, "top_p": 1.0, "temperature": 1.0, "random_seed": seed}
        parameters.set_search_options(max_length=16, batch_size=rows, **sampled)
        made = genai.Generator(genai.Model(str(result.path.parent)), parameters)
        made.append_tokens(prompt.repeat(rows, 1).numpy().astype(np.int32))
        made.generate_next_token()
        for row in range(rows):
            counts[int(made.get_sequence(row)[-1])] += 1
    total = sum(counts.values())
    assert total == 32 * rows
    for token, share in p.items():
        error = (share * (1 - share) / total) ** 0.5
        assert share < 0.01 or abs(counts[token] / total - share) <= 4 * error


def test_genai_samples_the_same_with_the_same_seed(tmp_path: Path) -> None:
    source = checkpoint_with(tmp_path / "checkpoint", MIXED)
    result = exporters.onnx.export(source, tmp_path / "onnx")

    def text(seed: int) -> list[int]:
        genai = pytest.importorskip("onnxruntime_genai")
        model = genai.Model(str(result.path.parent))
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=48, min_length=48, do_sample=True, top_p=0.9, random_seed=seed)
        made = genai.Generator(model, parameters)
        made.append_tokens(TOKENS[:1, :12].numpy().astype(np.int32))
        return list(finished(made).get_sequence(0))

    first = text(1)
    assert first == text(1) and first != text(2) and first[:12] == TOKENS[0, :12].tolist()


def test_genai_generates_a_padded_batch(exported: tuple[Any, ExportResult]) -> None:
    """Padded on the right: onnxruntime-genai masks pad tokens at the end of a prompt, and takes those before it for text."""
    model, result = exported
    ids, _ = padded("right")
    made = generator(result, ids.shape[1] + 12, 2)
    made.append_tokens(ids.numpy().astype(np.int32))
    finished(made)
    new = [list(made.get_sequence(row))[ids.shape[1] :] for row in range(2)]
    assert new[0] == greedy(model, TOKENS[0, :-PADDING], 12)[-12:]
    assert new[1] == greedy(model, TOKENS[1], 12)[-12:]


def test_genai_goes_on_after_more_tokens(exported: tuple[Any, ExportResult]) -> None:
    """Continuous decoding: a prompt in two parts, tokens of the model, more of a prompt, and the rest."""
    model, result = exported
    first, second, third = TOKENS[0, :10], TOKENS[0, 10:14], TOKENS[0, 14:22]
    made = generator(result, 44, 1)
    for part in (first, second):
        made.append_tokens(part[None].numpy().astype(np.int32))
    for _ in range(6):
        made.generate_next_token()
    begun = greedy(model, torch.cat([first, second]), 6)
    assert list(made.get_sequence(0)) == begun
    made.get_logits()  # else the token that was generated last would be missing in the cache
    made.append_tokens(third[None].numpy().astype(np.int32))
    text = torch.cat([torch.tensor(begun), third])
    assert list(finished(made).get_sequence(0)) == greedy(model, text, 44 - len(text))


@pytest.mark.parametrize(
    ("values", "graph", "words"),
    [
        ({"heads": 8, "kv_heads": 8}, "genai", "heads of 8 channels .* genai graph .*--graph portable"),
        (
            {
                "model_type": "phi3",
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
                "original_max_position_embeddings": 32,
            },
            "portable",
            "longrope",
        ),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "portable", "looks ahead"),
    ],
)
def test_what_a_graph_cannot_compute_is_refused(tmp_path: Path, values: dict[str, Any], graph: str, words: str) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=1, **values)
    with pytest.raises(UserError, match=words) as raised:
        exporters.onnx.export(source, tmp_path / "onnx", graph=graph)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "onnx").exists()


def test_heads_of_any_even_width_fit_the_portable_graph(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", layers=2, heads=8, kv_heads=8)
    result = exporters.onnx.export(source, tmp_path / "onnx", graph="portable")
    assert_close(Runner(result.path, 2)(TOKENS), logits(reference(source), TOKENS))
