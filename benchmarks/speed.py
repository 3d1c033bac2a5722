"""What the speed benchmarks share: an artefact against another in turn, as rows that say what was wanted, and their table.

Every artefact lives in a process of its own (llama.cpp: in one for each round of llama-bench), the two of a comparison take
turns (A B A B …, then, started anew, B A B A …) after a round that is dropped, and a ratio is that of one round: its median
over all rounds, and the least and the most.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from random_models import KINDS, Shape, describe, layouts_of, write_model
from rich import box
from rich.console import Console
from rich.table import Table

from runtime_checks.checks import VOCABULARY_OF_ANY_MODEL, WARM_UP, bench_group, check_sizes, subjects_of
from runtime_checks.machine import checked_threads, machine, packages
from runtime_checks.process import CheckError
from runtime_checks.schema import BUSY, Result, Skipped, Speed
from runtime_checks.subject import Subject
from sola_edge.errors import UserError
from sola_edge.progress import status


@dataclass(frozen=True)
class Load:
    """What is run: tokens of the prompt and of the decoding, rounds, threads."""

    prompt: int = 512
    generate: int = 128
    rounds: int = 5
    threads: int = 1


@dataclass(frozen=True)
class Spread:
    """A figure over rounds, `runs` in their order."""

    median: float
    minimum: float
    maximum: float
    runs: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values), tuple(values))


@dataclass(frozen=True)
class Row:
    """A graph against another of the same precision. ratio: candidate / baseline, round by round.

    test: pp512, tg128 (tokens per second), peak or buffer (bytes). wanted: the least ratio that is wanted of a speed, the
    greatest of a size. bytes: of what was exported. others_busy: share of the cores that other programs took just before the
    rounds; null where it was not noted. reason: why there are no figures.
    """

    candidate: str
    baseline: str
    precision: str
    test: str
    figures: Spread | None = None
    baseline_figures: Spread | None = None
    ratio: Spread | None = None
    wanted: float | None = None
    bytes: int | None = None
    baseline_bytes: int | None = None
    others_busy: float | None = None
    reason: str = ""

    @property
    def sized(self) -> bool:
        """Whether the test's figures are bytes, of which fewer are better."""
        return self.test.startswith(("peak", "buffer"))

    @property
    def reached(self) -> bool | None:
        """Whether the median is what was wanted; None without figures."""
        if self.ratio is None or self.wanted is None:
            return None
        return self.ratio.median <= self.wanted if self.sized else self.ratio.median >= self.wanted


@dataclass
class RandomModels:
    """Checkpoints under a folder, each made when it is first asked for; `facts`: of the random ones."""

    folder: Path
    shape: Shape = field(default_factory=Shape)
    rate: float = 0.3
    facts: dict[str, dict[str, object]] = field(default_factory=dict)

    def random(self, kind: str) -> Path:
        """A random checkpoint: dense, or of one of `KINDS`. Raises UserError where the shape is too small for the rate."""
        layouts = layouts_of(kind, self.shape, self.rate)
        self.facts[kind] = describe(self.shape, layouts)
        name = f"{kind}-{self.shape.name}" + (f"-{self.rate:g}" if layouts else "")
        target = self.folder / name / "checkpoint"
        return self.made(target, lambda: write_model(target, self.shape, layouts))

    def made(self, target: Path, make: Callable[[], Any]) -> Path:
        """The target, made if it is not there."""
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with status(f"making {target.relative_to(self.folder)}"):
                make()
        return target


@dataclass(frozen=True)
class Exported:
    """An export: the name that the table gives it, what its weights take (bytes), the runtimes of its speed and peak memory."""

    name: str
    path: Path
    bytes: int
    speed: str
    memory: str

    def subject(self, runtime: str) -> Subject:
        """To be run in that runtime. Raises CheckError where it cannot be run here."""
        skipped: list[Skipped] = []
        for found in subjects_of(self.name, self.path, skipped):
            if found.row.name == runtime:
                return found
        raise CheckError(skipped[0].reason if skipped else f"{runtime} does not take {self.path}")


def compared(
    candidate: Exported,
    baseline: Exported,
    precision: str,
    test: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    wanted: float,
    busy: float | None = None,
) -> Row:
    """The row of two series of figures, round by round."""
    ratio = Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])
    figures, sizes = (Spread.of(ours), Spread.of(theirs)), (candidate.bytes, baseline.bytes)
    return Row(candidate.name, baseline.name, precision, test, *figures, ratio, wanted, *sizes, busy)


def speeds(
    candidate: Exported, baseline: Exported, precision: str, load: Load, share: float, per_byte: bool = False
) -> list[Row]:
    """Prefill and decode of a candidate and its baseline, in turn, once with either of them started first.

    The same graph decoded 2 to 10 % slower where it was started first, so half of the ratios are of each order. The first round
    of each order is run and dropped: in it the graph that comes first was seen to read its prompt at half its speed. Wanted is
    that share of the baseline's speed; with `per_byte`, of that times baseline's bytes / candidate's. Raises CheckError.
    """
    runs: dict[tuple[str, int], list[float]] = {}
    busy, tests = 0.0, {}
    for order in ((0, 1), (1, 0)):
        subjects = [graph.subject(graph.speed) for graph in (candidate, baseline)]
        bench_group([subjects[i] for i in order], load.prompt, load.generate, 1 + load.rounds, load.threads)
        for i, result in enumerate(subject.result() for subject in subjects):
            for phase in ("prefill", "decode"):
                speed = _speed(result, phase)
                tests[phase] = speed.test
                runs.setdefault((phase, i), []).extend(speed.runs[1:])
            busy = max(busy, result.throughput.others_busy if result.throughput else 0.0)
    wanted = share * baseline.bytes / candidate.bytes if per_byte else share
    rows = []
    for phase, test in tests.items():
        rows.append(compared(candidate, baseline, precision, test, runs[phase, 0], runs[phase, 1], wanted, busy))
    return rows


def _speed(result: Result, phase: str) -> Speed:
    if result.throughput is None:
        raise CheckError("; ".join(result.reasons) or f"{result.model} was not measured")
    return result.throughput.prefill if phase == "prefill" else result.throughput.decode


def peaks(candidate: Exported, baseline: Exported, precision: str, load: Load, slack: float) -> Row:
    """Resident peak of fresh processes, candidate and baseline in turn, one at a time; slack: times the ratio of bytes.

    Raises CheckError.
    """
    rounds = [(_peak(candidate, load), _peak(baseline, load)) for _ in range(load.rounds)]
    ours, theirs = zip(*rounds, strict=True)
    return compared(candidate, baseline, precision, "peak", ours, theirs, slack * candidate.bytes / baseline.bytes)


def _peak(graph: Exported, load: Load) -> float:
    """Bytes."""
    subject = graph.subject(graph.memory)
    with ExitStack() as stack:
        subject.start(stack, load.threads, load.prompt + WARM_UP)
        subject.measure_memory(load.prompt, VOCABULARY_OF_ANY_MODEL, WARM_UP)
    return float(subject.found["memory"].peak)


def rows_of(comparisons: Sequence[tuple[str, str, str]], measure: Callable[[str, str, str], list[Row]]) -> list[Row]:
    """Rows of all comparisons (candidate, baseline, precision); one that fails is a row with its reason."""
    rows: list[Row] = []
    for comparison in comparisons:
        try:
            rows += measure(*comparison)
        except (UserError, CheckError) as error:
            rows.append(Row(*comparison, "", reason=str(error)))
    return rows


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """One table, then the sizes, what could not be measured, and what makes the figures doubtful."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("graph", "test", "median\n\\[over rounds]", "the other's", "ratio\n\\[of one round]", "wanted"):
        table.add_column(name, overflow="fold")
    for row in rows:
        if row.ratio is not None:
            table.add_row(*_cells(row), style="red" if row.reached is False else None)
    if table.row_count:
        console.print(table)
    told = [_size(row) for row in rows if row.bytes]
    told += [f"{_what(row)}: not measured: {row.reason}" for row in rows if row.reason]
    busy = max((row.others_busy or 0.0 for row in rows), default=0.0)
    if busy > BUSY:
        told.append(f"Other programs kept up to {busy:.0%} of the cores busy: speeds are not to be relied on.")
    for line in dict.fromkeys(told):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _what(row: Row) -> str:
    return f"{row.candidate} against {row.baseline}, {row.precision}"


def _size(row: Row) -> str:
    assert row.bytes and row.baseline_bytes
    ratio = row.baseline_bytes / row.bytes
    return f"{_what(row)}: {row.bytes / 1e6:,.1f} MB, {row.baseline_bytes / 1e6:,.1f} MB; bytes ratio {ratio:.3f}"


def _cells(row: Row) -> list[str]:
    assert row.figures and row.baseline_figures and row.ratio and row.wanted
    peak = row.sized
    figures = [_shown(spread, 1e6 if peak else 1.0, 1) for spread in (row.figures, row.baseline_figures)]
    test, wanted = f"{row.test}\n{'MB' if peak else 'tok/s'}", f"{'≤' if peak else '≥'} {row.wanted:.3f}"
    graph = f"{row.candidate} {row.precision}\nagainst {row.baseline}"
    return [graph, test, *figures, _shown(row.ratio, 1.0, 3), wanted]


def _shown(spread: Spread, unit: float, digits: int) -> str:
    shown = [value / unit for value in (spread.minimum, spread.median, spread.maximum)]
    low, middle, high = (f"{value:.{0 if shown[1] >= 1000 else digits}f}" for value in shown)
    return f"{middle}\n\\[{low}–{high}]"


def print_facts(facts: dict[str, dict[str, Any]], console: Console) -> None:
    """Parameters and rate of each random model."""
    for kind, known in facts.items():
        console.print(f"{kind}: {known['parameters']:,} parameters, rate {known['rate']:.4f}", highlight=False)


def record(
    asked: argparse.Namespace, facts: dict[str, dict[str, object]], rows: Sequence[Row], load: Load
) -> dict[str, Any]:
    """Everything for the JSON file."""
    return {
        "benchmark": asked.benchmark,
        "machine": machine(load.threads).model_dump(),
        "packages": packages(),
        "load": asdict(load),
        "shape": asdict(Shape.asked(asked)),
        "models": facts,
        "rows": [{**asdict(row), "reached": row.reached} for row in rows],
    }


def add_load(command: argparse.ArgumentParser) -> None:
    """The options that both benchmarks have."""
    for name in ("prompt", "generate", "rounds"):
        command.add_argument(f"--{name}", type=int, default=getattr(Load, name))
    command.add_argument("--threads", type=int, help="default: all cores")
    command.add_argument("--work", type=Path, help="folder that keeps models and exports for another run")
    command.add_argument("--out", type=Path, help="JSON file to write")
    Shape.add_options(command, Shape())


def load_of(asked: argparse.Namespace) -> Load:
    """What these options ask for. Raises UserError for what is impossible."""
    check_sizes(asked.prompt, asked.generate, asked.rounds)
    return Load(asked.prompt, asked.generate, asked.rounds, checked_threads(asked.threads))


def check_kinds(kinds: Sequence[str]) -> None:
    """Raises UserError for a kind of random model that there is not."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UserError(f"there is no kind {unknown[0]!r} of model; choose from: {', '.join(KINDS)}")


def main_of(run: Callable[[argparse.Namespace, Console], object], asked: argparse.Namespace) -> None:
    """A benchmark's command line: a user's error is one line."""
    try:
        run(asked, Console())
    except UserError as error:
        raise SystemExit(f"Error: {error}") from error
