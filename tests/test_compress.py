"""Compression end to end on tiny models, its statistics, and what it leaves untouched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sola_edge.calibration import LayerStream, token_windows
from sola_edge.checkpoint import PROVENANCE, open_checkpoint
from sola_edge.cli import main
from sola_edge.compress import compress
from sola_edge.config import CompressionSettings
from sola_edge.errors import UserError
from sola_edge.files import sha256_file
from sola_edge.planning import neuron_order
from sola_edge.testing import byte_tokenizer, tiny_checkpoint
from sola_edge.texts import Text, load_text

SENTENCE = "The quick brown fox jumps over the lazy dog; 12 boxing wizards jump quickly.\n"


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "calibration.txt"
    path.write_text("".join(f"{i}: {SENTENCE}" for i in range(60)))
    return str(path)


def settings_for(rate: float, **values: object) -> CompressionSettings:
    return CompressionSettings(rate=rate, window=64, max_windows=16, **values)  # type: ignore[arg-type]


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits


VARIANTS = [
    {"model_type": "llama"},
    {"model_type": "llama", "tied": False, "bias": True, "kv_heads": 1},
    {"model_type": "llama", "heads": 4, "kv_heads": 4, "hidden": 96, "ffn": 256, "layers": 6},
    {"model_type": "mistral", "tied": False, "head_dim": 24},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_rate_is_met_and_the_rest_is_untouched(tmp_path: Path, text: str, variant: dict) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "dense", layers=variant.pop("layers", 7), **variant))
    made = compress(source.path, tmp_path / "small", settings_for(0.2), text)
    result = open_checkpoint(made.path)
    assert 1 - result.parameters() / source.parameters() == pytest.approx(0.2, rel=0.005)
    assert made.plan.rate == pytest.approx(1 - result.parameters() / source.parameters(), abs=1e-12)
    touched = {int(module.split(".")[2]) for module in result.layout}
    assert touched <= set(range(2, source.layers - 2))
    assert not any("v_proj" in module or "o_proj" in module for module in result.layout)
    for name in source.names():
        module = name.rpartition(".")[0]
        if "mlp" not in name and module not in result.layout:
            assert torch.equal(result.tensor(name), source.tensor(name))
    assert logits(made.path, torch.arange(3, 30)[None]).isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
def test_full_rank_is_the_dense_model(tmp_path: Path, text: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permuted neurons, prime split and every matrix factored at full rank: the logits are the dense model's."""
    from sola_edge import allocation
    from sola_edge.methods import METHODS

    full = [lambda spectra, _: [len(s.energy) - 1 for s in spectra]]
    monkeypatch.setattr(allocation.MatrixSpectrum, "dense_parameters", property(lambda self: 10**9))
    monkeypatch.setattr("sola_edge.planning.RATE_TOLERANCE", 1e9)
    monkeypatch.setattr("sola_edge.compress.method_named", lambda name: METHODS[name])
    monkeypatch.setattr("sola_edge.planning.method_named", lambda _: type("M", (), {"allocate": staticmethod(full[0])}))
    source = tiny_checkpoint(tmp_path / "dense", layers=6, bias=bias)
    made = compress(source, tmp_path / "small", settings_for(0.3), text)
    assert len(made.plan.layouts) == 2 * 6
    ids = torch.arange(3, 60)[None]
    assert (logits(source, ids) - logits(made.path, ids)).abs().max() < 2e-5


def test_higher_rate_costs_more(tmp_path: Path, text: str) -> None:
    source = tiny_checkpoint(tmp_path / "dense", layers=8)
    ids = token_windows(load_text(text), byte_tokenizer(), 64, 4)
    reference = logits(source, ids)
    errors = []
    for rate in (0.05, 0.15, 0.35):
        made = compress(source, tmp_path / f"{rate}", settings_for(rate, align=4), text)
        errors.append(float((logits(made.path, ids) - reference).square().mean()))
    assert errors == sorted(errors)
    assert errors[0] > 0


def test_same_input_gives_the_same_bytes(tmp_path: Path, text: str) -> None:
    source = tiny_checkpoint(tmp_path / "dense", layers=8)
    a, b = (compress(source, tmp_path / name, settings_for(0.2), text).path for name in ("a", "b"))
    assert sha256_file(a / "model.safetensors") == sha256_file(b / "model.safetensors")


def test_provenance(tmp_path: Path, text: str) -> None:
    source = tiny_checkpoint(tmp_path / "dense", layers=8)
    made = compress(source, tmp_path / "small", settings_for(0.2), text)
    content = json.loads((made.path / PROVENANCE).read_text())
    assert content["weights_sha256"] == {"model.safetensors": sha256_file(made.path / "model.safetensors")}
    assert content["source"]["weights_sha256"] == {"model.safetensors": sha256_file(source / "model.safetensors")}
    assert content["calibration"]["sha256"] == load_text(text).sha256
    assert content["calibration"]["tokens"] == 16 * 64
    assert all(0 < share < 1 for share in content["prime_share_of_norm"].values())
    assert not [path for path in made.path.parent.iterdir() if "partial" in path.name]


def test_streamed_statistics_are_the_whole_models(tmp_path: Path, text: str) -> None:
    """Layer by layer gives what hooks on the loaded model give, and the hidden states of its last layer."""
    folder = tiny_checkpoint(tmp_path / "dense", layers=5)
    windows = token_windows(load_text(text), byte_tokenizer(), 64, 3)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    seen: dict[str, torch.Tensor] = {}
    for component, module in {
        "o": model.model.layers[3].self_attn.o_proj,
        "down": model.model.layers[3].mlp.down_proj,
    }.items():
        module.register_forward_pre_hook(lambda _, x, name=component: seen.update({name: x[0].flatten(0, 1).double()}))
    with torch.inference_mode():
        model(windows)
    stream = LayerStream(open_checkpoint(folder), windows)
    statistics = [stream.advance(layer) for layer in range(5)][3]
    for name in ("o", "down"):
        assert torch.allclose(statistics.grams[name], seen[name].T @ seen[name], rtol=1e-4, atol=1e-4)
    assert torch.allclose(statistics.norms, seen["down"].abs().mean(0), rtol=1e-4)


def test_neuron_order_is_a_partition() -> None:
    order = neuron_order(torch.tensor([0.1, 5.0, 0.3, 4.0, 0.2]), 2)
    assert order.tolist() == [1, 3, 0, 2, 4]


def test_windows_have_no_bos_and_do_not_overlap() -> None:
    text = Text("t", ("abcdef", "gh"))
    windows = token_windows(text, byte_tokenizer(), 4, None)
    assert byte_tokenizer().batch_decode(windows) == ["abcd", "ef\n\n"]


def test_non_finite_activations_are_refused(tmp_path: Path, text: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoint(tmp_path / "dense", layers=6)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layer 3: .* not finite"):
        compress(folder, tmp_path / "small", settings_for(0.2), text)
    assert not (tmp_path / "small").exists()


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command line in this process (importing torch anew for every case would take minutes); its exit code."""
    monkeypatch.setattr(sys, "argv", ["sola-edge", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out", "--rate", 0.2], "does not exist"),
        (["{model}", "out", "--rate", 0], "rate 0 is out of range"),
        (["{model}", "out", "--rate", 1], "rate 1 is out of range"),
        (["{model}", "out", "--rate", 1.5], "rate 1.5 is out of range"),
        (["{model}", "out", "--rate", 0.95], "cannot be reached"),
        (["{model}", "out", "--rate", 0.2, "--align", "wide"], "align 'wide'"),
        (["{model}", "out", "--rate", 0.2, "--method", "magic"], "no method 'magic'"),
        (["{model}", "out", "--rate", 0.2, "--structure", "narrow"], "structure 'narrow'"),
        (["{model}", "out", "--rate", 0.2, "--calibration", "{empty}"], "holds no text"),
        (["{model}", "out", "--rate", 0.2, "--calibration", "nowhere.txt"], "cannot read"),
        (["{model}", "{model}/config.json/out", "--rate", 0.2], "cannot create the folder"),
        (["{model}", "/proc/out", "--rate", 0.2], "cannot write"),
        (["{model}", ".", "--rate", 0.2], "the folder you are in"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    tmp_path: Path,
    arguments: list,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_checkpoint(tmp_path / "model", layers=6)
    (tmp_path / "empty.txt").write_text(" \n")
    before = sorted(tmp_path.iterdir())
    filled = [str(a).format(model=model, empty=tmp_path / "empty.txt") for a in arguments]
    assert run_cli(monkeypatch, "compress", *filled, "--window", 64) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    last = [line for line in printed.err.splitlines() if line.strip()][-1]
    assert last.startswith("sola-edge: ")
    assert message in last
    assert sorted(tmp_path.iterdir()) == before


def test_cli_compresses_and_prints_json(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint(tmp_path / "model", layers=8)
    arguments = ["--rate", 0.2, "--calibration", text, "--window", 64, "--json"]
    assert run_cli(monkeypatch, "compress", model, tmp_path / "small", *arguments) == 0
    assert json.loads(capsys.readouterr().out)["rate"] == pytest.approx(0.2, rel=0.005)
    assert run_cli(monkeypatch, "compress", tmp_path / "small", tmp_path / "smaller", *arguments) == 2
    assert "compressed already" in capsys.readouterr().err


def test_console_script_reports_without_a_traceback() -> None:
    command = [sys.executable, "-m", "sola_edge.cli", "compress", "nowhere", "out", "--rate", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
