"""Multiple-choice tasks: texts and files by hand, trees that are the sequences, a naive scorer, statistics by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from runtime_checks.task_files import Question, read_tasks
from runtime_checks.task_schema import TaskReport
from runtime_checks.task_scoring import NothingToScore, encode, log_likelihoods
from runtime_checks.task_table import print_tasks
from runtime_checks.task_trees import Request, batches, plant
from runtime_checks.tasks import choose, loaded, measure_tasks, paired, share
from sola_edge.architecture import ARCHITECTURES
from sola_edge.checkpoint import open_checkpoint
from sola_edge.errors import UserError
from sola_edge.testing import byte_tokenizer, tiny_checkpoint

ASKED = [
    {"question": "What colour is the sky?", "choices": ["blue", "blue and red", "a", "thick"], "answer": 0},
    {"question": "What colour is the sea?", "choices": ["blue", "thin"], "answer": 1},
    {"question": "Plants begin as ___ in H_{2}O.", "choices": ["seeds", "seedlings", "7"], "answer": 2},
    {"question": "What colour is the sky?", "choices": ["blue", "green"], "answer": 0, "id": "a key of no use"},
]
FILLED = [
    {"question": "Ann met Bo because _ was late.", "choices": ["Ann", "Bo"], "answer": 0},
    {"question": "Ann met Bo because _ was early. ", "choices": ["Ann", "Bo"], "answer": 1},
    {"question": "_'s hat was lost.", "choices": ["The man ", "Thor"], "answer": 1},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "asked.jsonl", ASKED), write(tmp_path / "filled.jsonl", FILLED)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tasks") / "dense", layers=3)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tasks") / "small", layers=3, compressed=True, tied=False, seed=1)


# --- texts -----------------------------------------------------------------------------------------------------------


def test_choices_are_asked_in_the_harness_s_words(files: list[Path]) -> None:
    asked, filled = read_tasks(files)
    assert (asked.kind, asked.metric, filled.kind, filled.metric) == ("answer", "acc_norm", "fill", "acc")
    context = "Question: What colour is the sky?\nAnswer:"
    assert asked.pairs()[:2] == [(context, " blue"), (context, " blue and red")]
    assert filled.pairs()[2:5] == [
        ("Ann met Bo because Ann", " was early."),
        ("Ann met Bo because Bo", " was early."),
        ("The man ", " 's hat was lost."),
    ]


def test_context_and_continuation_are_encoded_together_and_split_at_the_context() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("ab th", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4  # a, b, a space and the merged "th"
    (found,) = encode(tokenizer, [("ab ", "th")])  # the context's space is the continuation's
    assert (found.inputs, found.targets) == (tuple(ids[:-1]), tuple(ids[2:]))
    assert found.first == 1  # b predicts the space
    with pytest.raises(NothingToScore, match="pair 1"):
        encode(tokenizer, [("a", "b"), ("t", "h")])  # merged into one id, which is the context's


# --- trees -----------------------------------------------------------------------------------------------------------

sequences = st.tuples(
    st.lists(st.integers(0, 2), min_size=1, max_size=9), st.lists(st.integers(0, 2), min_size=1, max_size=5)
)


@given(st.lists(sequences, min_size=1, max_size=12), st.integers(0, 4), st.integers(1, 20))
def test_every_request_is_one_path_of_one_tree(
    pairs: list[tuple[list[int], list[int]]], shared: int, nodes: int
) -> None:
    requests = [Request((*context, *after[:-1]), tuple(after)) for context, after in pairs]
    trees = plant(requests, shared, nodes)
    met: dict[int, list[int]] = {}
    for tree in trees:
        seen = tree.visible()
        assert len(tree) <= max(nodes, *(len(r.inputs) for r in requests))
        for node, target, owner in tree.scored:
            ancestors = np.flatnonzero(seen[node])
            wanted = requests[owner].inputs[: requests[owner].first + len(met.setdefault(owner, [])) + 1]
            assert tuple(tree.ids[i] for i in ancestors) == wanted
            assert [tree.depths[i] for i in ancestors] == list(range(len(wanted)))
            met[owner].append(target)
    assert met == {i: list(r.targets) for i, r in enumerate(requests)}


def test_a_shared_beginning_is_run_once() -> None:
    context = (1, 2, 3, 4)
    requests = [Request(context, (9,)), Request((*context, 5, 6), (5, 6, 7)), Request((*context, 5), (5, 8))]
    (tree,) = plant(requests, shared=4)
    assert sorted(tree.ids) == [1, 2, 3, 4, 5, 6]
    assert len(plant(requests, shared=5)) == 2
    assert [len(tree) for tree in plant(requests, shared=1, nodes=5)] == [5, 6]


def test_batches_are_of_similar_size_and_within_the_limit() -> None:
    trees = plant([Request(tuple(range(i, 3 * i)), (1,)) for i in range(1, 9)])
    found = list(batches(trees, 20))
    assert [[len(tree) for tree in batch] for batch in found] == [[16], [14], [12], [10, 8], [6, 4, 2]]


# --- against a naive scorer ------------------------------------------------------------------------------------------


@torch.no_grad()
def naive(model: Any, request: Request) -> float:
    """One choice at a time, the whole model at every position."""
    logits = model(torch.tensor([request.inputs]), use_cache=False).logits[0].double()
    picked = torch.log_softmax(logits, -1)[-len(request.targets) :]
    return float(picked[range(len(request.targets)), list(request.targets)].sum())


def check_against_naive(model: Any, requests: list[Request]) -> None:
    expected = [naive(model, request) for request in requests]
    assert len({round(value, 3) for value in expected}) > len(expected) / 2  # a model that tells choices apart
    for batch_tokens in (1, 70, 4096):
        found = log_likelihoods(model, requests, batch_tokens=batch_tokens)
        assert found.values == pytest.approx(expected, abs=1e-4)
        assert found.nonfinite == 0
        assert found.positions <= found.scored == sum(len(r.targets) for r in requests)
    assert log_likelihoods(model, requests, batch_tokens=1).tokens < sum(len(r.inputs) for r in requests)  # no padding


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_log_likelihoods_are_those_of_one_choice_at_a_time(
    model_type: str, compressed: bool, files: list[Path], tmp_path: Path
) -> None:
    window = {"sliding_window": 16} if model_type == "mistral" else {}
    folder = tiny_checkpoint(tmp_path / "model", layers=3, model_type=model_type, compressed=compressed, **window)
    requests = [r for task in read_tasks(files) for r in encode(byte_tokenizer(), task.pairs())]
    with loaded(open_checkpoint(folder)) as model:
        check_against_naive(model, requests)


# --- statistics by hand ----------------------------------------------------------------------------------------------


def test_acc_takes_the_likeliest_choice_and_acc_norm_the_likeliest_per_character() -> None:
    questions = [
        Question(question="?", choices=["a", "abcd"], answer=1),  # -2 against -4: by character -2 against -1
        Question(question="?", choices=["ab", "cd", "äö"], answer=2),  # equal: the first; ä is one character
    ]
    assert choose(questions, np.array([-2.0, -4.0, -6.0, -6.0, -6.0])) == {"acc": [0, 0], "acc_norm": [1, 0]}


def test_standard_errors_by_hand() -> None:
    before, now = np.array([1, 1, 0, 0], dtype=bool), np.array([1, 0, 0, 0], dtype=bool)
    assert (share(before).value, share(before).standard_error) == (0.5, 0.25)  # sqrt(0.5 * 0.5 / 4)
    found = paired("x", before, now)
    assert found.value == -0.25  # differences 0, -1, 0, 0: variance 3/16
    assert found.standard_error == pytest.approx(math.sqrt(3 / 16 / 4))
    assert paired("x", now, now).standard_error == 0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_the_paired_error_obeys_the_variance_of_a_difference(pairs: list[tuple[bool, bool]]) -> None:
    before, now = np.array(pairs).T
    found = paired("x", before, now)
    covariance = (before & now).mean() - before.mean() * now.mean()
    variance = (share(now).standard_error ** 2 + share(before).standard_error ** 2) - 2 * covariance / len(pairs)
    assert found.standard_error**2 == pytest.approx(variance, abs=1e-12)
    assert found.value == pytest.approx(share(now).value - share(before).value)


# --- the whole measurement -------------------------------------------------------------------------------------------


def test_checkpoints_are_rows_and_tasks_are_columns(
    dense: Path, small: Path, files: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "tasks.json"
    report = measure_tasks([dense, small], files, output=output)
    assert TaskReport.model_validate_json(output.read_text()) == report
    assert [(r.model, r.task, r.n) for r in report.results] == [
        (model, task, n) for model in ("dense", "small") for task, n in (("asked", 4), ("filled", 3))
    ]
    for folder in (dense, small):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for task in read_tasks(files):
            values = [naive(model, r) for r in encode(byte_tokenizer(), task.pairs())]
            chosen = choose(task.questions, np.array(values))
            found = report.result(folder.name, task.name)
            assert found.chosen == chosen[task.metric]
            rights = {
                m: np.mean([c == q.answer for c, q in zip(chosen[m], task.questions, strict=True)]) for m in chosen
            }
            assert found.accuracy.value == rights[task.metric]
            assert found.acc.value == rights["acc"]
            assert (found.acc_norm.value if found.acc_norm else None) == (
                rights["acc_norm"] if task.kind == "answer" else None
            )
    first, second = (report.result(model, "asked") for model in ("dense", "small"))
    assert first.difference is None
    assert second.difference is not None
    assert second.difference.value == pytest.approx(second.accuracy.value - first.accuracy.value)


def test_the_table_fits_80_columns(
    dense: Path, small: Path, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    report = measure_tasks([dense, small], files, limit=2)
    print_tasks(report, Console(width=80))
    shown = capsys.readouterr().out
    a, b = (report.result(model, "asked") for model in ("dense", "small"))
    assert b.difference is not None
    for part in (
        "acc_norm",
        "n = 2 of 4",
        "n = 2 of 3",
        f"{100 * a.accuracy.value:.2f} ± {100 * a.accuracy.standard_error:.2f}",
        f"{100 * b.difference.value:+.2f} ± {100 * b.difference.standard_error:.2f}",
    ):
        assert part in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_limit_takes_the_first_questions(dense: Path, files: list[Path]) -> None:
    whole, part = measure_tasks([dense], files), measure_tasks([dense], files, limit=2)
    assert [t.questions for t in part.tasks] == [2, 2]
    assert [t.in_file for t in part.tasks] == [4, 3]
    assert [r.chosen for r in part.results] == [r.chosen[:2] for r in whole.results]


def test_a_gguf_file_scores_as_its_folder(dense: Path, files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("exporters.gguf")
    from exporters.gguf import export

    export(dense, tmp_path / "dense.gguf", type="f32")
    report = measure_tasks([dense, tmp_path / "dense.gguf"], files)
    assert [m.name for m in report.models] == ["dense", "dense.gguf"]
    for task in ("asked", "filled"):
        assert report.result("dense", task).chosen == report.result("dense.gguf", task).chosen


def test_checkpoints_of_one_name_are_told_apart_by_their_paths(dense: Path, files: list[Path], tmp_path: Path) -> None:
    twin = tiny_checkpoint(tmp_path / "dense", layers=1)
    report = measure_tasks([dense, twin], files[:1])
    assert [m.name for m in report.models] == [str(dense), str(twin)]


# --- refusals --------------------------------------------------------------------------------------------------------

GOOD = {"question": "a?", "choices": ["b", "c"], "answer": 0}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([""], "is empty"),
        ([GOOD, "{not json"], "line 2 is not"),
        ([GOOD, "", {**GOOD, "answer": 2}], "line 3: answer 2 is out of range; give an index from 0 to 1"),
        ([{**GOOD, "answer": -1}], "(answer: "),
        ([{**GOOD, "answer": "0"}], "(answer: "),
        ([{**GOOD, "answer": True}], "(answer: "),
        ([{**GOOD, "choices": ["b"]}], "(choices: "),
        ([{**GOOD, "choices": ["b", 3]}], "(choices.1: "),
        ([{**GOOD, "choices": ["b", " "]}], "a choice without text"),
        ([{**GOOD, "question": " "}], "(question: "),
        ([{"question": "a?", "choices": ["b", "c"]}], "(answer: "),
        ([[1, 2]], "line 1 is not"),
        (['{"question": "\\ud800", "choices": ["b", "c"], "answer": 0}'], "line 1 is not"),
        ([{**GOOD, "question": "a _ b"}, GOOD], "line 1 has a blank '_' to fill and line 2 has none"),
        ([{**GOOD, "question": "a _ b"}, {**GOOD, "question": "is _ "}], "line 2: nothing follows the blank"),
        ([GOOD, {**GOOD, "question": "a" * 600}], "line 2 has 619 tokens with a choice, more than the context of 512"),
    ],
)
def test_bad_tasks_are_refused_in_one_line(rows: list[Any], message: str, dense: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "task.jsonl", rows)
    with pytest.raises(UserError) as refused:
        measure_tasks([dense], [path])
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bad_arguments_are_refused_before_anything_is_computed(
    dense: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "other").mkdir()
    twin = write(tmp_path / "other" / "asked.jsonl", ASKED)
    monkeypatch.setattr("runtime_checks.tasks.loaded", lambda _: pytest.fail("a model was loaded"))
    for checkpoints, tasks, options, message in (
        ([dense], [tmp_path / "nowhere.jsonl"], {}, "no such task file"),
        ([dense], [tmp_path], {}, "cannot read"),
        ([dense], [tmp_path / "latin.jsonl"], {}, "not UTF-8"),
        ([dense], [], {}, "no task was named"),
        ([dense], [files[0], twin], {}, "two task files are called asked"),
        ([dense], files, {"limit": 0}, "limit 0 is out of range"),
        ([dense], files, {"output": tmp_path}, "is a folder"),
        ([], files, {}, "no checkpoint was named"),
        ([dense, dense], files, {}, "named twice"),
        ([dense, tmp_path / "nowhere"], files, {}, "does not exist"),
        ([dense, tmp_path], files, {}, "config.json is missing"),
    ):
        with pytest.raises(UserError, match=message):
            measure_tasks(checkpoints, tasks, **options)


def test_a_token_without_embedding_is_refused(files: list[Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=1, vocab=100)
    with pytest.raises(UserError, match="line 1 has a token that model's tokenizer knows and model does not"):
        measure_tasks([folder], files[:1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_counted_and_refused(value: float, files: list[Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "damaged", layers=1)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][byte_tokenizer().convert_tokens_to_ids("7")] = value  # the head's row too
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "tasks.json"
    with pytest.raises(UserError, match="damaged gives no finite log-likelihood for 63 of 63 tokens of asked"):
        measure_tasks([folder], files[:1], output=output)
    assert not output.exists()
