"""lm-evaluation-harness: tasks made of files, and models that it can ask, in transformers and in any runtime here."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from runtime_checks.accuracy_schema import AskedTask
from runtime_checks.process import Child
from runtime_checks.subject import Subject
from runtime_checks.task_files import PAIRS, Task
from sola_edge.errors import UserError
from sola_edge.progress import track

try:
    from lm_eval import evaluator
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(
        f"lm-evaluation-harness cannot be imported ({error}); install it with pip install 'sola-edge[accuracy]'"
    ) from error

SPLIT = "test"
BATCH = 8  # texts that transformers runs at once


@dataclass(frozen=True)
class Evaluated:
    """Of one task: every metric by question, and the log-likelihoods of all answers."""

    questions: int
    metrics: dict[str, list[float]]
    likelihoods: list[float]


def file_task(task: Task) -> ConfigurableTask:
    """The task that the harness makes of these questions, in its words for ARC and PIQA, or by partial evaluation."""
    import datasets

    rows = [{"pairs": PAIRS[task.kind](row), "choices": row.choices, "answer": row.answer} for row in task.questions]
    config: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": lambda **_: {SPLIT: datasets.Dataset.from_list(rows)},
        "test_split": SPLIT,
        "output_type": "multiple_choice",
        "metric_list": [{"metric": task.metric, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
        **WORDS[task.kind],
    }
    if task.metric != "acc":
        config["metric_list"].append({"metric": "acc", "aggregation": "mean", "higher_is_better": True})
    with _quiet():
        return ConfigurableTask(config=config)


def _before(row: dict[str, Any]) -> str:
    return str(row["pairs"][0][0])


def _befores(row: dict[str, Any]) -> list[str]:
    return [before for before, _ in row["pairs"]]


def _after(row: dict[str, Any]) -> str:
    return str(row["pairs"][0][1]).strip()


def _answer(row: dict[str, Any]) -> int:
    return int(row["answer"])


# what the harness asks a task for: where choices follow a question, and where each choice begins a text of its own
WORDS: dict[str, dict[str, Any]] = {
    "answer": {"doc_to_text": _before, "doc_to_choice": "choices", "doc_to_target": _answer},
    "fill": {"doc_to_text": _answer, "doc_to_choice": _befores, "doc_to_target": _after},
}


def named_task(name: str) -> ConfigurableTask:
    """One of the harness's own. Raises UserError for a name that it lacks or that stands for several, and without its data."""
    with _quiet():
        manager = TaskManager()
        if name not in manager.all_subtasks:
            raise UserError(
                f"lm-evaluation-harness has no task {name!r}; name one of its tasks, or a .jsonl file of questions"
            )
        load = manager.load
        try:
            found = load([name])["tasks"][name]
        except Exception as error:  # the hub's and the network's errors are many
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"the data of {name} cannot be fetched ({line}); give its questions as a .jsonl file"
            ) from error
    if found.OUTPUT_TYPE != "multiple_choice" or not _means(found):
        raise UserError(
            f"{name} is no multiple-choice task that is told by a mean over questions; name one that is, such as arc_easy, "
            "piqa or winogrande"
        )
    return found


def _means(task: ConfigurableTask) -> list[str]:
    """The metrics that are means over questions; others (F1, MCC, …) have no figure for a question."""
    return [name for name, total in task.aggregation().items() if getattr(total, "__name__", "") == "mean"]


def asked_of(task: ConfigurableTask, source: str, sha256: str | None, limit: int | None) -> AskedTask:
    """What a report says of a task."""
    questions = min(len(task.eval_docs), limit or len(task.eval_docs))
    if sha256 is None:
        docs = [task.eval_docs[number] for number in range(questions)]
        sha256 = hashlib.sha256(json.dumps(docs, sort_keys=True, default=str).encode()).hexdigest()
    return AskedTask(name=task.task_name, source=source, sha256=sha256, version=str(task.VERSION), questions=questions)


def transformers_model(model: Any, tokenizer: Any) -> HFLM:
    """The harness's own back end, on a model that is loaded."""
    with _quiet():
        return HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=BATCH, add_bos_token=False)


class RuntimeModel(TemplateLM):
    """A file in a runtime: a child process for every task, loaded for its longest text.

    It answers what multiple choice asks, the likelihood of a continuation. No text is cut. Raises CheckError where the runtime
    fails.
    """

    def __init__(self, subject: Subject, tokenizer: Any, threads: int) -> None:
        super().__init__()
        self.subject, self.tokenizer, self.threads = subject, tokenizer, threads

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a continuation that has nothing before it, as in the harness's own back end."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Without special tokens."""
        found: list[int] = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        longest = max(len(before) + len(after) for _, before, after in requests)
        answers = []
        with Child(self.subject.row, self.subject.artefact.path, self.threads, longest) as child:
            self.subject.version = child.loaded["version"]
            for _text, before, after in track(list(requests), f"answers of {self.subject.label}"):
                found = child.ask("continuation", ids=[*before, *after], count=len(after))
                answers.append((math.nan if found["value"] is None else found["value"], found["greedy"]))
        return answers

    def loglikelihood_rolling(self, requests: list[Any], *_: Any) -> list[float]:
        """Not for multiple choice."""
        raise NotImplementedError("perplexity is measured by check perplexity")

    def generate_until(self, requests: list[Any], *_: Any) -> list[str]:
        """Not for multiple choice."""
        raise NotImplementedError("only multiple-choice tasks are measured")


def evaluate(model: Any, task: ConfigurableTask, limit: int | None) -> Evaluated:
    """Ask a model all questions of a task, by the harness's own evaluator."""
    with _quiet():
        found = evaluator.simple_evaluate(
            model, tasks=[task], num_fewshot=0, limit=limit, bootstrap_iters=0, log_samples=True
        )
    samples = found["samples"][task.task_name]
    metrics = {name: [float(sample[name]) for sample in samples] for name in _means(task) if name in samples[0]}
    likelihoods = [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]
    return Evaluated(len(samples), metrics, likelihoods)


@contextmanager
def _quiet() -> Iterator[None]:
    """Its log, of warnings about settings that are ours, left out."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
