"""check memory: what a runtime takes with a file, over lengths of context, beside what the file's shapes say it should.

For every length a fresh process loads the model for that context, takes a prompt that leaves room for some tokens, and decodes
those. Its peak is read twice: by the process itself, and by the system when it has ended. Where a heap finds room differs from
process to process (of PyTorch by a seventh), so several are started: the least peak is what the shapes can explain, and the
largest is what a device needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from runtime_checks.artefacts import open_artefact
from runtime_checks.checks import VOCABULARY_OF_ANY_MODEL, WARM_UP, named_subjects
from runtime_checks.frozen import Frozen
from runtime_checks.gpu_memory import gpu_memory
from runtime_checks.kept import Kept
from runtime_checks.machine import checked_threads, packages, run_record
from runtime_checks.memory_model import expected_memory
from runtime_checks.process import CheckError, Child
from runtime_checks.runtimes.devices import CPU
from runtime_checks.schema import MeasuredFile, Memory, RunRecord, Skipped
from runtime_checks.shapes import Shapes, shapes_of
from runtime_checks.subject import Subject, memory_of
from runtime_checks.throughput import random_prompt
from sola_edge.errors import UserError
from sola_edge.progress import track

TOLERANCE = 0.05  # of the least peak: how far the model may be from it
ROUNDS = 3
SYSTEM_TOLERANCE = 0.03  # how far the process's own peak may be from the system's


class MemoryPoint(Frozen):
    """One length of context. expected: bytes by part, see memory_model.py; empty where nothing is (another device than the CPU,
    fp16 and bf16 graphs on it), and then not judged.

    memory: of the process with the least peak; peaks: of all of them, ascending. system_peak: wait4's of that process, null
    where there is none; system_off: the largest (process's own peak - the system's) of all, as a share of the system's, null
    likewise. gpu: the most bytes of CUDA devices that a process held at its end, by NVIDIA's own library (allocators of these
    runtimes give nothing back before it), null where that tells nothing.

    measured: when (UTC, ISO 8601), where an earlier run's figures were used again.
    """

    context: int
    memory: Memory
    peaks: list[int]
    system_peak: int | None
    system_off: float | None
    gpu: int | None = None
    expected: dict[str, int]
    version: str = ""  # of the runtime
    measured: str | None = None

    @property
    def off(self) -> float | None:
        """The model's peak - the least measured one, as a share of that; None where nothing is expected."""
        return sum(self.expected.values()) / self.memory.peak - 1 if self.expected else None


class MemoryCurve(MeasuredFile):
    """A file in a runtime. reasons: what failed, and what is off by more than the tolerances."""

    points: list[MemoryPoint]


class MemoryReport(RunRecord):
    """Curves. Version 2; bytes. rounds: how many processes each figure is of."""

    schema_version: Literal[2] = 2
    packages: dict[str, str]
    tolerance: float
    rounds: int
    curves: list[MemoryCurve]
    skipped: list[Skipped]

    @property
    def passed(self) -> bool:
        """Whether everything was measured and is as large as it should be."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """What failed, and where."""
        return [reason for curve in self.curves for reason in curve.failures]


def memory_curves(
    paths: Sequence[Path],
    contexts: Sequence[int],
    *,
    threads: int | None = None,
    rounds: int = ROUNDS,
    tolerance: float = TOLERANCE,
    runtimes: Sequence[str] | None = None,
    device: str = CPU,
    kept: Kept | None = None,
) -> MemoryReport:
    """Every file in every runtime that takes it on `device` (of `runtimes`, where given) at every length.

    rounds: how many processes each peak is of. kept: where results of earlier runs are, to be used again. Raises UserError for
    bad input; a runtime that fails is a reason in its curve.
    """
    if not contexts or min(contexts) <= WARM_UP:
        raise UserError(f"context {min(contexts, default=0)} is out of range: give at least {WARM_UP + 1} tokens")
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance {tolerance:g} is out of range: give a share of the peak, such as {TOLERANCE:g}")
    if rounds < 1:
        raise UserError(f"rounds {rounds} is out of range: give at least 1")
    threads = checked_threads(threads)
    skipped: list[Skipped] = []
    subjects = named_subjects(dict.fromkeys(map(Path, paths)), runtimes, skipped, device)
    if device == "cuda" and find_spec("pynvml") is None:
        skipped.append(Skipped(what="memory of the GPU", reason="the Python package nvidia-ml-py is not installed"))
    shapes = {path: shapes_of(open_artefact(path)) for path in map(Path, paths)}
    record = run_record(threads)
    earlier = _Earlier(kept, threads, rounds, record["created"])
    return MemoryReport(
        **record,
        packages=packages(),
        tolerance=tolerance,
        rounds=rounds,
        curves=[_curve(s, shapes[s.artefact.path], contexts, earlier, tolerance) for s in subjects],
        skipped=skipped,
    )


@dataclass(frozen=True)
class _Earlier:
    """Points that are kept, and this run's, which will be."""

    kept: Kept | None
    threads: int
    rounds: int
    created: str

    def point(self, subject: Subject, shapes: Shapes, context: int) -> MemoryPoint:
        """Raises CheckError where it has to be measured and the runtime fails."""
        if self.kept is None:
            return _point(subject, shapes, context, self.threads, self.rounds)
        asked = {"context": context, "warm_up": WARM_UP, "rounds": self.rounds}
        place = self.kept.place(subject.artefact, subject.row.label, self.threads, **asked)
        found = self.kept.find(MemoryPoint, place)
        if found is None:
            found = _point(subject, shapes, context, self.threads, self.rounds)
            self.kept.keep(found.model_copy(update={"measured": self.created}), place)
        return found


def _curve(
    subject: Subject, shapes: Shapes, contexts: Sequence[int], earlier: _Earlier, tolerance: float
) -> MemoryCurve:
    points, reasons = [], []
    for context in track(list(contexts), f"memory of {subject.artefact.path.name} in {subject.row.label}"):
        try:
            points.append(earlier.point(subject, shapes, context))
        except CheckError as error:
            reasons.append(f"{context} tokens: {error}")
    for point in points:
        if point.off is not None and abs(point.off) > tolerance:
            reasons.append(
                f"{point.context} tokens: the shapes say {100 * point.off:+.1f} % of the least peak that was measured"
            )
        if point.system_off is not None and abs(point.system_off) > SYSTEM_TOLERANCE:
            reasons.append(
                f"{point.context} tokens: a process's peak is {100 * point.system_off:+.1f} % off the system's own"
            )
    return MemoryCurve(
        **{**subject.measured(), "version": points[0].version if points else "", "reasons": reasons},
        points=points,
    )


def _point(subject: Subject, shapes: Shapes, context: int, threads: int, rounds: int) -> MemoryPoint:
    prompt = context - WARM_UP
    measured = sorted((_process(subject, context, threads) for _ in range(rounds)), key=lambda one: one.memory.peak)
    memory = measured[0].memory
    judged = subject.row.device == CPU
    return MemoryPoint(
        context=context,
        memory=memory,
        peaks=[one.memory.peak for one in measured],
        system_peak=measured[0].system_peak,
        system_off=max((one.system_off for one in measured if one.system_off is not None), key=abs, default=None),
        gpu=max((one.gpu for one in measured if one.gpu is not None), default=None),
        expected=expected_memory(subject.row.name, subject.artefact, shapes, context, prompt, memory) if judged else {},
        version=measured[0].version,
    )


@dataclass(frozen=True)
class _Process:
    """What one process took."""

    memory: Memory
    system_peak: int | None
    gpu: int | None
    version: str

    @property
    def system_off(self) -> float | None:
        return self.memory.peak / self.system_peak - 1 if self.system_peak else None


def _process(subject: Subject, context: int, threads: int) -> _Process:
    prompt = context - WARM_UP
    with Child(subject.row, subject.artefact.path, threads, context, counted=True) as child:
        covers = f"loading for {context} tokens, a prompt of {prompt}, {WARM_UP} decoded"
        memory = memory_of(child, random_prompt(prompt, VOCABULARY_OF_ANY_MODEL), WARM_UP, covers)
        gpu = gpu_memory(child.pid) if subject.row.device == "cuda" else None
    return _Process(memory, child.system_peak, gpu, child.loaded["version"])
