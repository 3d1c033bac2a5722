"""Compression end to end on tiny models, its statistics, and what it leaves untouched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sola_edge import collect as collecting
from sola_edge.baselines import prime_order
from sola_edge.calibration import Calibration, token_windows
from sola_edge.checkpoint import PROVENANCE, open_checkpoint
from sola_edge.cli import main
from sola_edge.collect import collect
from sola_edge.compress import compress, prepare
from sola_edge.config import CompressionSettings
from sola_edge.errors import UserError
from sola_edge.factorize import Metric, cost
from sola_edge.files import sha256_file
from sola_edge.forms import FfnChoices
from sola_edge.identity import CARD
from sola_edge.journal import Journal
from sola_edge.layers import recompose
from sola_edge.sola import Sola, _layer_choices
from sola_edge.testing import byte_tokenizer, tiny_checkpoint
from sola_edge.texts import Text, load_text
from sola_edge.view import LayerView

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


def paper(rate: float, **values: object) -> CompressionSettings:
    return settings_for(rate, method="sola-paper", **values)


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_method_meets_the_rate_and_touches_nothing_else(tmp_path: Path, text: str, variant: dict) -> None:
    variant = dict(variant)
    source = open_checkpoint(tiny_checkpoint(tmp_path / "dense", layers=variant.pop("layers", 7), **variant))
    made = compress(source.path, tmp_path / "small", paper(0.2), text)
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


@pytest.mark.parametrize("method", ["sola", "sola-paper", "svd", "asvd", "svd-llm", "flap"])
@pytest.mark.parametrize("bias", [False, True])
def test_every_method_meets_the_rate_and_loads(tmp_path: Path, text: str, method: str, bias: bool) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "dense", layers=8, bias=bias))
    align = 1 if method == "flap" else 4  # FLAP has nothing finer than a neuron
    settings = settings_for(0.15, method=method, align=align, correction_windows=4 if method == "sola" else 0)
    made = compress(source.path, tmp_path / "small", settings, text)
    result = open_checkpoint(made.path)
    assert 1 - result.parameters() / source.parameters() == pytest.approx(0.15, rel=0.005)
    assert made.plan.rate == pytest.approx(1 - result.parameters() / source.parameters(), abs=1e-12)
    assert logits(made.path, torch.arange(3, 30)[None]).isfinite().all()
    assert json.loads((made.path / PROVENANCE).read_text())["method"] == method


def test_flap_leaves_a_layer_whole_that_loses_no_neuron(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "dense", layers=3))
    ffn, hidden = source.config.intermediate_size, source.config.hidden_size
    monkeypatch.setattr("sola_edge.baselines.flap_counts", lambda *_: [ffn, ffn - 100, ffn])
    rate = (100 * 3 * hidden - hidden) / source.parameters()  # a bias of `down` is gained
    made = compress(
        source.path, tmp_path / "small", settings_for(rate, method="flap", align=1, correction_windows=0), text
    )
    result = open_checkpoint(made.path)
    assert {module.split(".")[2] for module in result.layout} == {"1"}
    for name in source.names():
        if ".1.mlp" not in name:
            assert torch.equal(result.tensor(name), source.tensor(name))
    assert logits(made.path, torch.arange(3, 30)[None]).isfinite().all()


def test_narrow_only_drops_neurons(tmp_path: Path, text: str) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "dense", layers=4))
    settings = settings_for(0.2, structure="narrow", align=1, correction_windows=0)
    made = compress(source.path, tmp_path / "small", settings, text)
    assert made.plan.layouts
    assert all(layout.rank == 0 and "mlp" in module for module, layout in made.plan.layouts.items())
    result = open_checkpoint(made.path)
    assert torch.equal(
        result.tensor("model.layers.1.self_attn.q_proj.weight"), source.tensor("model.layers.1.self_attn.q_proj.weight")
    )
    assert logits(made.path, torch.arange(3, 30)[None]).isfinite().all()


@pytest.mark.parametrize("factors", ["plain", "pivoted", "auto"])
def test_factors_are_as_asked(tmp_path: Path, text: str, factors: str) -> None:
    source = tiny_checkpoint(tmp_path / "dense", layers=4)
    made = compress(source, tmp_path / "small", settings_for(0.3, factors=factors, align=4), text)
    low_rank = [layout for layout in made.plan.layouts.values() if layout.rank]
    assert low_rank
    assert {"plain": not any(x.pivot for x in low_rank), "pivoted": all(x.pivot for x in low_rank), "auto": True}[
        factors
    ]


def test_second_rate_reads_no_text_and_a_higher_one_predicts_more(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint(tmp_path / "dense", layers=5)
    first = compress(source, tmp_path / "a", settings_for(0.1, align=4), text).plan
    monkeypatch.setattr("sola_edge.collect._Collector", None)
    monkeypatch.setattr("sola_edge.sola.Sola.analyse", None)
    second = compress(source, tmp_path / "b", settings_for(0.3, align=4), text).plan
    assert sum(second.predicted_loss.values()) > sum(first.predicted_loss.values()) > 0


def test_other_methods_and_fewer_gradients_read_no_text_forward_again(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "dense", layers=8))
    recorded: list[int] = []
    own = collecting._Inputs.sums

    def sums(self: collecting._Inputs, tokens: int) -> dict[str, torch.Tensor]:
        recorded.append(tokens)
        return own(self, tokens)

    monkeypatch.setattr(collecting._Inputs, "sums", sums)
    whole = prepare(source, settings_for(0.2), text)
    assert len(recorded) == 8
    assert prepare(source, settings_for(0.2, method="svd-llm"), text).statistics.folder == whole.statistics.folder
    few = prepare(source, settings_for(0.2, gradient_windows=4), text)
    assert len(recorded) == 8
    assert few.plan.predicted_loss != whole.plan.predicted_loss
    anew = collect(source, Calibration(whole.calibration.windows.clone(), "t", "0"), 4)
    assert torch.equal(anew.layer(3).outputs["q"], few.statistics.layer(3).outputs["q"])
    assert not torch.equal(anew.layer(3).outputs["q"], whole.statistics.layer(3).outputs["q"])


def test_gradients_of_fewer_windows_are_the_same_after_and_before_the_others(tmp_path: Path, text: str) -> None:
    """Hidden states that are gone are made again, and windows in two parts give what windows in one part give."""
    windows = token_windows(load_text(text), byte_tokenizer(), 64, 6)
    source = open_checkpoint(tiny_checkpoint(tmp_path / "dense", layers=4))
    found = {}
    for name, counts in {"few first": (2, 6), "all first": (6, 2), "forward first": (0, 2, 6)}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sola_edge.collect.cache_folder", lambda kind, name=name: tmp_path / name / kind)
            made = {count: collect(source, Calibration(windows, "t", "0"), count) for count in counts}
        found[name] = {count: made[count].layer(2) for count in (2, 6)}
        assert not list(made[2].folder.glob("*.bin"))
    for name in ("all first", "forward first"):
        for count in (2, 6):
            one, other = found["few first"][count], found[name][count]
            for key in one.inputs:
                assert torch.allclose(one.inputs[key], other.inputs[key], rtol=1e-5, atol=1e-7)
            for key in one.outputs:
                assert torch.equal(one.outputs[key], other.outputs[key])


def test_what_a_killed_run_left_between_layers_goes_with_the_next(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "dense", layers=4))
    calibration = Calibration(token_windows(load_text(text), byte_tokenizer(), 64, 6), "t", "0")
    with monkeypatch.context() as patch:
        patch.setattr(collecting._Collector, "_backward", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            collect(source, calibration, 6)
    found = collect(source, calibration, 3)
    assert found.layer(0).outputs and not list(found.folder.glob("*.bin*"))


def test_damaged_statistics_are_not_believed_and_made_again(tmp_path: Path, text: str) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "dense", layers=4))
    calibration = Calibration(token_windows(load_text(text), byte_tokenizer(), 64, 4), "t", "0")
    for name in ("forward-002.safetensors", "backward-4-001.safetensors"):
        whole = collect(source, calibration, 4)
        before = {name: sha256_file(path) for path in whole.folder.glob("*.safetensors") for name in [path.name]}
        damaged = whole.folder / name
        damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\1\2\3")
        fresh = collect(source, calibration, 4)
        with pytest.raises(UserError, match="not what was written"):
            [fresh.layer(layer) for layer in range(4)]
        again = collect(source, calibration, 4)
        assert all(again.layer(layer).outputs for layer in range(4))
        assert {path.name: sha256_file(path) for path in again.folder.glob("*.safetensors")} == before


def test_a_disk_without_room_is_refused_before_anything_is_run(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "dense", layers=4))
    monkeypatch.setattr("sola_edge.files.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    monkeypatch.setattr("sola_edge.collect._Collector", None)
    with pytest.raises(UserError, match=r"needs .* GB and its disk has 1e-06 GB left"):
        prepare(source, settings_for(0.2), text)


@pytest.mark.parametrize("policy", ["plain", "pivoted"])
@pytest.mark.parametrize("kept", ["all", "some"])
def test_a_rewritten_ffn_costs_what_the_plan_says(tmp_path: Path, text: str, policy: str, kept: str) -> None:
    """Prime and marginal neurons, some dropped, all three matrices low-rank: ½ tr(G ΔW S ΔWᵀ) of what is stored.

    The change of down is that of all neurons: what is dropped and what is left out count, what prime columns take up too.
    """
    source = open_checkpoint(tiny_checkpoint(tmp_path / "dense", layers=4))
    run = prepare(source, settings_for(0.2, align=2, factors=policy), text)
    view, analysis = LayerView(run.model, 1, run.statistics), run.analyses[1]
    ffn = run.model.ffn
    choice = _layer_choices(run.model, 1, analysis)[view.module("down").rpartition(".")[0]]
    assert isinstance(choice, FfnChoices)
    fitting = [
        i
        for i, form in enumerate(choice.forms)
        if form.prime and (form.kept == ffn) == (kept == "all") and all(row.rank for row in form.layouts.values())
    ]
    fitting = [i for i in fitting if len(choice.forms[i].layouts) == 3]
    assert fitting
    for index in fitting[:: max(len(fitting) // 4, 1)]:
        layouts = choice.forms[index].layouts
        rewriter = Sola().rewriter(view, {view.module(c): layout for c, layout in layouts.items()}, analysis)
        stored = rewriter.stage("ffn", None) | rewriter.stage("down", None)
        total = 0.0
        for component, layout in layouts.items():
            module = view.module(component)
            product = recompose(layout, {part: stored[f"{module}.{part}"] for part in layout.shapes}).double()
            change, metric = view.weight(component), view.metric(component)
            if component == "down":
                change[:, rewriter.order] -= product
            else:
                rows = rewriter.order
                change, metric = change[rows] - product, Metric(metric.s, metric.g[rows][:, rows])
            total += 0.5 * cost(change, metric)
        assert total == pytest.approx(float(choice.options.loss[index]), rel=1e-3)


def test_prediction_is_the_cost_of_the_change(tmp_path: Path, text: str) -> None:
    """Plain attention factors, no correction: ½ tr(G ΔW S ΔWᵀ) of the stored matrices is what the plan says."""
    source = open_checkpoint(tiny_checkpoint(tmp_path / "dense", layers=4))
    settings = settings_for(0.3, align=4, factors="plain", correction_windows=0)
    run = prepare(source, settings, text)
    run.write(tmp_path / "small")
    result = open_checkpoint(tmp_path / "small")
    checked = 0
    for layer in range(4):
        view = LayerView(run.model, layer, run.statistics)
        for component in ("q", "k", "v", "o"):
            module = view.module(component)
            if module in run.plan.layouts:
                layout = run.plan.layouts[module]
                parts = {part: result.tensor(f"{module}.{part}") for part in layout.shapes}
                change = view.weight(component) - recompose(layout, parts)
                predicted = run.plan.predicted_loss[module]
                assert 0.5 * cost(change, view.metric(component)) == pytest.approx(predicted, rel=1e-3)
                checked += 1
    assert checked


def test_correction_helps_on_text_that_it_read_and_on_more_of_its_kind(tmp_path: Path, text: str) -> None:
    source = tiny_checkpoint(tmp_path / "dense", layers=6)
    ids = token_windows(load_text(text), byte_tokenizer(), 64, 40)
    reference = logits(source, ids).log_softmax(-1)
    errors = []
    for windows in (0, 16):
        made = compress(source, tmp_path / f"{windows}", settings_for(0.3, correction_windows=windows), text)
        found = logits(made.path, ids).log_softmax(-1)
        errors.append((reference.exp() * (reference - found)).sum(-1).mean(-1))
    seen, unseen = slice(0, 16), slice(16, None)
    assert 0 < errors[1][seen].mean() < errors[0][seen].mean()
    assert 0 < errors[1][unseen].mean() < errors[0][unseen].mean()


class Killed(Exception):
    """Stands for the end of the process: nothing after it runs but `finally`."""


@pytest.mark.parametrize("after", [3, 9, 16, 22, 27, 30, 33])
def test_killed_and_resumed_gives_the_same_bytes(
    tmp_path: Path, text: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal stops after some pieces (statistics, analyses, rewritten layers); a second run goes on there."""
    source = tiny_checkpoint(tmp_path / "dense", layers=4)
    settings = settings_for(0.3, correction_windows=8)
    whole = compress(source, tmp_path / "whole", settings, text).path
    monkeypatch.setattr("sola_edge.collect.cache_folder", lambda name: tmp_path / "other" / name)
    monkeypatch.setattr("sola_edge.compress.cache_folder", lambda name: tmp_path / "other" / name)
    written: list[str] = []
    own = Journal.writing

    def counted(self: Journal, name: str):
        if len(written) == after:
            raise Killed
        written.append(name)
        return own(self, name)

    monkeypatch.setattr(Journal, "writing", counted)
    with pytest.raises(Killed):
        compress(source, tmp_path / "resumed", settings, text)
    assert not (tmp_path / "resumed").exists()
    monkeypatch.setattr(Journal, "writing", own)
    ahead: list[str] = []

    def noted(self: Journal, name: str):
        ahead.append(name)
        return own(self, name)

    monkeypatch.setattr(Journal, "writing", noted)
    resumed = compress(source, tmp_path / "resumed", settings, text).path
    assert not set(written[:-1]) & set(ahead) - {name for name in written if written.count(name) > 1}  # nothing twice
    assert sha256_file(resumed / "model.safetensors") == sha256_file(whole / "model.safetensors")
    for name in (PROVENANCE, CARD):
        assert (resumed / name).read_text() == (whole / name).read_text()


def test_killed_processes_leave_what_a_next_one_goes_on_with(tmp_path: Path, text: str) -> None:
    """SIGKILL in the middle of the forward pass, of the backward pass and of the rewriting; then the same bytes as without."""
    source = tiny_checkpoint(tmp_path / "dense", layers=8, hidden=128, ffn=512)
    code = "import sys; from sola_edge.cli import main; sys.argv[0] = 'sola-edge'; main()"
    options = ["--rate", "0.2", "--align", "8", "--calibration", text, "--window", "64", "--windows", "16"]

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code, "compress", str(source), str(tmp_path / name), *options]
        environment = {**os.environ, "SOLA_EDGE_CACHE": str(tmp_path / f"cache-{name}")}
        return subprocess.Popen([*command, "--correction-windows", "4"], env=environment, stdout=subprocess.DEVNULL)

    for piece in ("statistics/*/forward-002*", "statistics/*/backward-16-005*", "work/*/layer-002*"):
        process = start("resumed")
        while process.poll() is None and not list((tmp_path / "cache-resumed").glob(piece)):
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "resumed").exists()
    assert start("resumed").wait() == 0
    assert start("whole").wait() == 0
    for name in ("model.safetensors", "config.json", PROVENANCE, CARD):
        assert sha256_file(tmp_path / "resumed" / name) == sha256_file(tmp_path / "whole" / name)
    left = [p.name for p in (tmp_path / "cache-resumed").rglob("*") if "partial" in p.name or p.suffix == ".bin"]
    assert not left


def test_a_damaged_piece_is_not_believed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    with journal.writing("piece") as path:
        path.write_text("content")
    assert journal.has("piece")
    assert Journal(tmp_path / "journal").has("piece")
    journal.path("piece").write_text("other")
    assert not Journal(tmp_path / "journal").has("piece")


@pytest.mark.parametrize("bias", [False, True])
def test_full_rank_is_the_dense_model(tmp_path: Path, text: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permuted neurons, prime split and every matrix factored at full rank: the logits are the dense model's."""
    from dataclasses import replace

    from sola_edge import allocation
    from sola_edge.methods import METHODS

    full = replace(METHODS["sola-paper"], allocate=lambda spectra, _: [len(s.energy) - 1 for s in spectra])
    monkeypatch.setattr(allocation.MatrixSpectrum, "dense_parameters", property(lambda self: 10**9))
    monkeypatch.setattr("sola_edge.planning.RATE_TOLERANCE", 1e9)
    monkeypatch.setitem(METHODS, "sola-paper", full)
    source = tiny_checkpoint(tmp_path / "dense", layers=6, bias=bias)
    made = compress(source, tmp_path / "small", paper(0.3), text)
    assert len(made.plan.layouts) == 2 * 6
    ids = torch.arange(3, 60)[None]
    expected = logits(source, ids)
    assert (
        expected - logits(made.path, ids)
    ).abs().max() < 1e-5 * expected.std()  # rounding in fp32 gives half of that


def test_higher_rate_costs_more(tmp_path: Path, text: str) -> None:
    source = tiny_checkpoint(tmp_path / "dense", layers=8)
    ids = token_windows(load_text(text), byte_tokenizer(), 64, 4)
    reference = logits(source, ids)
    errors = []
    for rate in (0.05, 0.15, 0.35):
        made = compress(source, tmp_path / f"{rate}", settings_for(rate, align=4, correction_windows=0), text)
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
    curves = content["norm_curve"]["norm"]
    assert len(curves) == 8
    assert all(curve == sorted(curve) and curve[0] > 0 and curve[-1] <= 1 for curve in curves)
    assert content["calibration_nll"] > 0
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
    statistics = collect(open_checkpoint(folder), Calibration(windows, "t", "0"), 0).layer(3)
    for name in ("o", "down"):
        assert torch.allclose(
            statistics.inputs[name].double(), seen[name].T @ seen[name] / windows.numel(), rtol=1e-4, atol=1e-5
        )
    assert torch.allclose(statistics.norms.double(), seen["down"].abs().mean(0), rtol=1e-4)
    assert torch.allclose(statistics.means.double(), seen["down"].mean(0), rtol=1e-3, atol=1e-5)
    assert not statistics.outputs


def test_neuron_order_is_a_partition() -> None:
    order = prime_order(torch.tensor([0.1, 5.0, 0.3, 4.0, 0.2]), 2)
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
        (["{model}", "out", "--rate", 0.2, "--structure", "wide"], "no structure 'wide'"),
        (["{model}", "out", "--rate", 0.2, "--structure", "narrow", "--method", "svd"], "structure 'narrow'"),
        (["{model}", "out", "--rate", 0.2, "--factors", "odd"], "no factors 'odd'"),
        (["{model}", "out", "--rate", 0.2, "--gradient-windows", -1], "gradient windows -1"),
        (
            ["{model}", "out", "--rate", 0.2, "--no-gradients", "--correction-windows", 4],
            "more than the 0 that gradients",
        ),
        (["{model}", "out", "--rate", 0.2, "--gradient-windows", 2, "--correction-windows", 4], "more than the 2 that"),
        (["{model}", "out", "--rate", 0.2, "--method", "svd-llm", "--correction-windows", 4], "a correction is not"),
        (["{model}", "out", "--rate", 0.2, "--method", "flap", "--factors", "pivoted"], "factors 'pivoted'"),
        (["{model}", "out", "--rate", 0.2, "--calibration", "{empty}"], "holds no text"),
        (["{model}", "out", "--rate", 0.2, "--calibration", "nowhere.txt"], "cannot read"),
        (["{model}", "out", "--rate", 0.2, "--window", 513], "window 513 is more than the 512 tokens"),
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
    assert (
        run_cli(monkeypatch, "compress", *filled, *([] if "--window" in filled else ["--window", 64]), "--windows", 8)
        == 2
    )
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
