"""Multiple-choice tasks: files of {"question", "choices", "answer"} lines, and what a model is asked about them.

The texts are lm-evaluation-harness's, so that figures can be compared with published ones:

    answer   "Question: {question}\\nAnswer:" is followed by " {choice}"       ARC, PIQA: by acc_norm
    fill     the question up to its blank and the choice, followed by the rest of the question, which alone is scored
             (partial evaluation: the scored words are the same for every choice)      WinoGrande: by acc

acc takes the choice with the largest log-likelihood, acc_norm that with the largest per character of the choice, its leading
space not counted.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sola_edge.errors import UserError

Kind = Literal["answer", "fill"]
Metric = Literal["acc", "acc_norm"]
METRICS: dict[Kind, Metric] = {"answer": "acc_norm", "fill": "acc"}
BLANK = re.compile(r"(?<!\w)_(?!\w|\{)")  # alone: not the ___ or H_{2}O of ARC's questions


class Question(BaseModel):
    """One line of a task file; `answer` is the index, from 0, of the right choice. Other keys are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)

    question: str = Field(pattern=r"\S")
    choices: list[str] = Field(min_length=2)
    answer: int = Field(ge=0)


@dataclass(frozen=True)
class Task:
    """The questions that are asked (with their line numbers), and the file they came from."""

    name: str
    path: Path
    sha256: str  # of the file's bytes
    kind: Kind
    in_file: int
    questions: tuple[Question, ...]
    lines: tuple[int, ...]

    @property
    def metric(self) -> Metric:
        """What the task is judged by."""
        return METRICS[self.kind]

    def pairs(self) -> list[tuple[str, str]]:
        """(context, continuation that is scored) of every choice of every question, in the file's order."""
        return [pair for question in self.questions for pair in PAIRS[self.kind](question)]


def _answer(row: Question) -> list[tuple[str, str]]:
    return [(f"Question: {row.question}\nAnswer:", f" {choice}") for choice in row.choices]


def _fill(row: Question) -> list[tuple[str, str]]:
    before, after = BLANK.split(row.question, maxsplit=1)
    return [(before + choice, f" {after.strip()}") for choice in row.choices]


PAIRS = {"answer": _answer, "fill": _fill}


def read_tasks(paths: Sequence[Path], limit: int | None = None) -> list[Task]:
    """Read task files, of each the first `limit` questions. A task is called as its file is, without the suffix.

    Raises UserError for a file that is missing or no task, an impossible limit, and two files of one name.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} is out of range: give at least 1 question")
    if not paths:
        raise UserError("no task was named: give one or more --task FILE.jsonl")
    tasks = [_read(Path(path), limit) for path in paths]
    for i, task in enumerate(tasks):
        if any(task.name == other.name for other in tasks[:i]):
            raise UserError(f"two task files are called {task.name}: give each task once, in a file of its own name")
    return tasks


def _read(path: Path, limit: int | None) -> Task:
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"no such task file: {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a .jsonl file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise UserError(f'{path} is empty; give lines of {{"question": …, "choices": […], "answer": index}}')
    rows = [_row(path, number, line) for number, line in numbered]
    lines = [number for number, _ in numbered]
    return Task(
        name=path.stem,
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        kind=_kind(path, rows, lines),
        in_file=len(rows),
        questions=tuple(rows[:limit]),
        lines=tuple(lines[:limit]),
    )


def _row(path: Path, number: int, line: str) -> Question:
    try:
        row = Question.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the line"
        form = '{"question": …, "choices": […], "answer": index}'
        raise UserError(f"{path} line {number} is not {form} ({where}: {first['msg']}); correct it") from error
    if row.answer >= len(row.choices):
        last = len(row.choices) - 1
        raise UserError(f"{path} line {number}: answer {row.answer} is out of range; give an index from 0 to {last}")
    if not all(choice.strip() for choice in row.choices):
        raise UserError(f"{path} line {number} has a choice without text; correct it")
    return row


def _kind(path: Path, rows: list[Question], lines: list[int]) -> Kind:
    """Whether the questions of the whole file have a blank to fill. Raises UserError where only some have."""
    blank = [BLANK.search(row.question) is not None for row in rows]
    if any(blank) and not all(blank):
        have, lack = lines[blank.index(True)], lines[blank.index(False)]
        raise UserError(
            f"{path} line {have} has a blank '_' to fill and line {lack} has none: a task is either; "
            "split the file, or write gaps that are not to be filled as ___"
        )
    if not any(blank):
        return "answer"
    for row, line in zip(rows, lines, strict=True):
        if not BLANK.split(row.question, maxsplit=1)[1].strip():
            raise UserError(
                f"{path} line {line}: nothing follows the blank '_', so nothing can be scored; leave it out"
            )
    return "fill"
