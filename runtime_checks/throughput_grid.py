"""check throughput: time to the first token and tokens per second, over prompts, batches, threads, and the machine's limits.

A test is a prompt of so many tokens for each sequence of a batch, from an empty context until the first new token of each is
chosen, then so many greedy steps from there: as `llama-batched-bench` has it. All artefacts of a runtime take turns in every
round, after one round that is not counted. Every runtime runs in its child process, llama.cpp too, through its library.

A decoding step has to read the weights and what the cache holds, a prompt has to be multiplied by the weights: bytes and
operations follow from the shapes in the file (shapes.py). Divided by what the machine does at most (limits.py) they are
shares of the physical limit, of fp32 products for prompts: integer kernels of a runtime may go past it.
"""

import statistics
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime_checks.artefacts import Artefact, open_artefact
from runtime_checks.checks import VOCABULARY_OF_ANY_MODEL, check_sizes, named_subjects
from runtime_checks.frozen import Frozen
from runtime_checks.limits import Limits, machine_limits
from runtime_checks.machine import checked_threads, others_busy, packages, run_record
from runtime_checks.memory_model import element_bytes
from runtime_checks.process import CheckError
from runtime_checks.runtimes.devices import CPU
from runtime_checks.schema import MeasuredFile, RunRecord, Skipped
from runtime_checks.shapes import Shapes, shapes_of
from runtime_checks.subject import Subject
from runtime_checks.throughput import random_prompt
from sola_edge.errors import UserError
from sola_edge.progress import track


class SpeedTest(Frozen):
    """Tokens of the prompt and of the continuation of each of `batch` sequences."""

    threads: int
    batch: int
    prompt: int
    generate: int


class ThroughputPoint(Frozen):
    """Seconds of every round: to the first token of all sequences, and of all steps after it.

    step_bytes: what a step reads at least, weights and cache (in the middle of the steps, a sliding window's layers like
    others); prompt_flops: operations of the prompts. Both are null where the file does not tell its shapes.
    """

    test: SpeedTest
    first_token: list[float]
    decode: list[float]
    step_bytes: int | None
    prompt_flops: int | None

    @property
    def seconds_to_first(self) -> float:
        """Median."""
        return statistics.median(self.first_token)

    @property
    def prefill_speeds(self) -> list[float]:
        """Tokens per second of the prompts, all sequences together, by round."""
        return [self.test.batch * self.test.prompt / seconds for seconds in self.first_token]

    @property
    def decode_speeds(self) -> list[float]:
        """Tokens per second of the steps, all sequences together, by round."""
        return [self.test.batch * self.test.generate / seconds for seconds in self.decode]

    def bandwidth_share(self, limits: Limits | None) -> float | None:
        """Bytes read per second in decoding, as a share of the machine's bandwidth."""
        if self.step_bytes is None or limits is None:
            return None
        return self.step_bytes * self.test.generate / statistics.median(self.decode) / limits.memory

    def gemm_share(self, limits: Limits | None) -> float | None:
        """Operations per second of the prompts, as a share of the machine's rate."""
        if self.prompt_flops is None or limits is None:
            return None
        return self.prompt_flops / self.seconds_to_first / limits.gemm


class ThroughputCurve(MeasuredFile):
    """An artefact in a runtime. reasons: what failed."""

    points: list[ThroughputPoint]

    def point(self, test: SpeedTest) -> ThroughputPoint | None:
        """Of a test, where it was measured."""
        return next((point for point in self.points if point.test == test), None)


class ThroughputReport(RunRecord):
    """Curves. Version 1; bytes, seconds. baseline: the artefact that the others are compared with. limits: the CPU's, empty
    where another device was measured.
    """

    schema_version: Literal[1] = 1
    packages: dict[str, str]
    others_busy: float  # share of all cores that other work took before the rounds
    rounds: int
    baseline: str | None
    limits: list[Limits]
    curves: list[ThroughputCurve]
    skipped: list[Skipped]

    @property
    def passed(self) -> bool:
        """Whether everything could be measured."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """What failed, and where."""
        return [reason for curve in self.curves for reason in curve.failures]

    def limits_of(self, threads: int) -> Limits | None:
        """The machine's, with so many threads."""
        return next((found for found in self.limits if found.threads == threads), None)

    def reference(self, curve: ThroughputCurve) -> ThroughputCurve | None:
        """The baseline in the same runtime."""
        if curve.artefact == self.baseline:
            return None
        return next((c for c in self.curves if (c.artefact, c.runtime) == (self.baseline, curve.runtime)), None)


@dataclass(frozen=True)
class Grid:
    """What is measured: every prompt × batch × number of threads, in so many rounds."""

    prompts: Sequence[int] = (128, 512)
    generate: int = 64
    batches: Sequence[int] = (1,)
    threads: Sequence[int] = ()
    rounds: int = 3

    @property
    def tokens(self) -> int:
        """The longest context."""
        return max(self.prompts) + self.generate

    def tests(self, threads: int) -> list[SpeedTest]:
        """Those with so many threads."""
        sizes = [(batch, prompt) for batch in self.batches for prompt in self.prompts]
        return [SpeedTest(threads=threads, batch=b, prompt=p, generate=self.generate) for b, p in sizes]


def throughput_curves(
    paths: Sequence[Path],
    grid: Grid,
    *,
    baseline: Path | None = None,
    runtimes: Sequence[str] | None = None,
    device: str = CPU,
) -> ThroughputReport:
    """Every artefact in every runtime that takes it on `device` (of `runtimes`, where given); the baseline is first in every
    round.

    Raises UserError for bad input; a runtime that fails is a reason in its curve.
    """
    for prompt in grid.prompts:
        check_sizes(prompt, grid.generate, grid.rounds)
    threads = [checked_threads(None)] if not grid.threads else list(grid.threads)
    if any(checked_threads(count) != count for count in threads):
        raise UserError(f"threads {max(threads)} is out of range: there are {checked_threads(None)} cores here")
    skipped: list[Skipped] = []
    named = list(dict.fromkeys([*([Path(baseline)] if baseline else []), *map(Path, paths)]))
    subjects = named_subjects(named, runtimes, skipped, device)
    shapes = {path: _shapes(open_artefact(path), skipped) for path in named}
    limits = [machine_limits(count) for count in threads] if device == CPU else []
    busy = others_busy()
    measured = Measured({i: [] for i in range(len(subjects))}, shapes)
    for count in threads:
        for name in dict.fromkeys(s.row.name for s in subjects):
            group = {i: s for i, s in enumerate(subjects) if s.row.name == name and not s.reasons}
            _measure(group, grid, count, measured)
    return ThroughputReport(
        **run_record(max(threads)),
        packages=packages(),
        others_busy=busy,
        rounds=grid.rounds,
        baseline=str(baseline) if baseline else None,
        limits=limits,
        curves=[_curve(subject, measured.points[i]) for i, subject in enumerate(subjects)],
        skipped=skipped,
    )


def _shapes(artefact: Artefact, skipped: list[Skipped]) -> Shapes | None:
    """None, and a note, where the file does not say."""
    try:
        return shapes_of(artefact)
    except UserError as error:
        skipped.append(Skipped(what=f"shares of {artefact.path}", reason=str(error)))
        return None


@dataclass
class Measured:
    """Points by number of the subject, and the shapes in its file, where it tells them."""

    points: dict[int, list[ThroughputPoint]]
    shapes: dict[Path, Shapes | None]


def _curve(subject: Subject, points: list[ThroughputPoint]) -> ThroughputCurve:
    return ThroughputCurve(**subject.measured(), points=points)


def _measure(group: dict[int, Subject], grid: Grid, threads: int, measured: Measured) -> None:
    """All tests with so many threads of the artefacts of one runtime, which live in their processes for that long."""
    with ExitStack() as stack:
        for subject in group.values():
            try:
                subject.start(stack, threads, grid.tokens + 1)
            except CheckError as error:
                subject.reasons.append(str(error))
        for test in grid.tests(threads):
            able = {i: s for i, s in group.items() if not s.reasons}
            for i, (first, decode) in _rounds(able, test, grid.rounds).items():
                point = _point(able[i], measured.shapes[able[i].artefact.path], test, first, decode)
                measured.points[i].append(point)


Seconds = tuple[list[float], list[float]]


def _rounds(able: dict[int, Subject], test: SpeedTest, rounds: int) -> dict[int, Seconds]:
    """Seconds to the first token and of the steps, by round, of those that did not fail; the first round warms up."""
    found: dict[int, Seconds] = {i: ([], []) for i in able}
    turns = [(number, i) for number in range(rounds + 1) for i in able]
    for number, i in track(turns, _title(able.values(), test)):
        subject = able[i]
        if subject.reasons:
            continue
        ids = random_prompt(test.prompt, VOCABULARY_OF_ANY_MODEL)
        steps = test.generate if number else 1
        try:
            seconds = subject.running().ask("batch", prompt=ids, generate=steps, sequences=test.batch)
        except CheckError as error:
            subject.reasons.append(f"batch of {test.batch}, prompt of {test.prompt}: {error}")
            continue
        if number:
            found[i][0].append(seconds["first"])
            found[i][1].append(seconds["decode"])
    return {i: both for i, both in found.items() if not able[i].reasons}


def _title(subjects: Iterable[Subject], test: SpeedTest) -> str:
    names = ", ".join(s.artefact.path.name for s in subjects)
    return f"speed of {names}: {test.prompt} + {test.generate} tokens × {test.batch}, {test.threads} threads"


def _point(
    subject: Subject, shapes: Shapes | None, test: SpeedTest, first: list[float], decode: list[float]
) -> ThroughputPoint:
    if shapes is None:
        return ThroughputPoint(test=test, first_token=first, decode=decode, step_bytes=None, prompt_flops=None)
    cache = shapes.kv_values * element_bytes(subject.row.name, subject.artefact.precision)
    held = test.prompt + test.generate // 2
    scored = test.prompt if subject.row.every_logit else 1
    return ThroughputPoint(
        test=test,
        first_token=first,
        decode=decode,
        step_bytes=shapes.step_bytes + test.batch * held * cache,
        prompt_flops=test.batch * shapes.flops(test.prompt, scored),
    )
