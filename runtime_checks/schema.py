"""The report's data: what `report.json` holds. Version 2; validated whenever it is written or read.

Units: bytes, tokens per second, nats; `*_percent` are per cent, everything else that is a share is a fraction.
A figure that was not measured is null. Perplexity is null when any logit was not finite.
"""

import statistics
from pathlib import Path
from typing import Literal

from pydantic import Field

from runtime_checks.explain_schema import Explanation
from runtime_checks.frozen import Frozen

SCHEMA_VERSION: Literal[2] = 2
BUSY = 0.2  # share of the cores in others' use from which on a speed is doubtful
Kind = Literal["checkpoint", "onnx", "gguf"]
Comparison = Literal["export parity", "compression cost"]


class ProtocolRecord(Frozen):
    """Which tokens were scored: see protocol.py."""

    text: str
    text_sha256: str
    ids_sha256: str
    context: int
    windows: int
    stride: int
    bos: bool
    tokens_scored: int


class Tolerance(Frozen):
    """What a precision is allowed against PyTorch fp32 with the same weights; null: not judged."""

    kl_mean: float | None = None  # at most, nats
    top1: float | None = None  # at least, fraction
    ppl_change_percent: float | None = None  # at most, either direction


class Perplexity(Frozen):
    """exp(mean NLL); the standard error is over the windows' means (one window: over tokens), by the delta method."""

    value: float | None
    standard_error: float | None
    window_nll: list[float | None]
    tokens: int
    nonfinite: int


class Parity(Frozen):
    """A candidate's logits against the reference's, over the scored positions.

    Export parity is the same weights in another runtime or type; compression cost a compressed model against another, which
    is judged by the limits alone that a user gives.
    """

    comparison: Comparison = "export parity"
    reference: str
    reference_runtime: str
    kl_mean: float | None
    kl_median: float | None
    kl_p99: float | None
    kl_max: float | None
    top1: float | None
    top5: float | None = None  # share of the reference's five most likely tokens that are among the candidate's five
    max_logit_difference: float | None
    ppl_change_percent: float | None
    ppl_change_standard_error: float | None  # per cent, paired over windows
    window_kl: list[float | None]
    window_top1: list[float | None] = Field(default_factory=list)
    window_ppl_change_percent: list[float | None]
    nonfinite: int
    tolerance: Tolerance
    passed: bool
    reasons: list[str]


class Speed(Frozen):
    """Tokens per second of one test, one figure per round."""

    test: str  # pp512, tg128
    tokens: int
    runs: list[float]
    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, test: str, tokens: int, runs: list[float]) -> "Speed":
        """Summary of the rounds' tokens per second."""
        return cls(
            test=test, tokens=tokens, runs=runs, median=statistics.median(runs), minimum=min(runs), maximum=max(runs)
        )


class Throughput(Frozen):
    """Prefill and decode speed, measured in turn with the other artefacts of the same run."""

    tool: str
    threads: int
    rounds: int
    others_busy: float  # share of all cores that other work took just before the rounds
    prefill: Speed
    decode: Speed


class Memory(Frozen):
    """Resident memory of a fresh process, bytes; `parts` is what the runtime itself tells (weights, kv, compute, …).

    baseline: interpreter and runtime library, before the model is loaded. anonymous, file_backed: of what is resident after the
    run, the process's own pages and those of mapped files (memory-mapped weights, shared libraries). libraries: pages of shared
    libraries' files that came to be resident after the baseline. Null where the system does not tell.
    """

    covers: str
    baseline: int
    after_load: int
    peak: int
    anonymous: int | None
    file_backed: int | None
    libraries: int | None = None
    parts: dict[str, int]


class Generation(Frozen):
    """A greedy continuation and where it leaves PyTorch's."""

    prompt: str
    text: str
    ids: list[int]
    first_difference: int | None  # position in the continuation, from 0; null when identical or not compared
    logit_gap: float | None  # PyTorch's logit of its own token minus that of the candidate's, at that position
    allowed_gap: float | None
    passed: bool | None  # null: nothing to compare with
    note: str


class Finding(Frozen):
    """Something in an artefact that is not what the reference says it should be.

    fails: it fails the check by itself; what does not is kept where something else failed, to explain that.
    """

    what: Literal["weight", "graph", "metadata", "precision", "ids", "cache", "model"]
    where: str  # tensor, node, key, file or position
    detail: str
    fails: bool = True

    @property
    def text(self) -> str:
        """One line."""
        return f"{self.what} {self.where}: {self.detail}"


class Result(Frozen):
    """One artefact in one runtime. measured: when (UTC, ISO 8601), where an earlier run's figures were used again."""

    model: str
    artefact: str
    kind: Kind
    precision: str
    runtime: str
    version: str
    bytes: int
    parameters: int | None = None
    expected_bytes: int | None = None  # parameters x bytes per weight of the precision
    memory: Memory | None = None
    throughput: Throughput | None = None
    perplexity: Perplexity | None = None
    parity: Parity | None = None
    generation: Generation | None = None
    findings: list[Finding] = Field(default_factory=list)
    passed: bool = True
    reasons: list[str] = Field(default_factory=list)
    measured: str | None = None


class Cost(Frozen):
    """A model against the baseline model, same runtime and precision: what was gained and what it cost."""

    baseline: str
    model: str
    runtime: str
    precision: str
    bytes_ratio: float  # model / baseline; so are the next two
    parameters_ratio: float | None
    peak_memory_ratio: float | None
    prefill_ratio: float | None  # tokens/s, model / baseline: above 1 is faster
    decode_ratio: float | None
    perplexity_baseline: float | None
    perplexity: float | None
    perplexity_ratio: float | None
    kl_mean: float | None  # KL(baseline || model), in PyTorch only
    top1: float | None


class Model(Frozen):
    """A model of the report and the checkpoint that it came from; `explained`: what was done to it, null of a dense one."""

    name: str
    checkpoint: str | None
    architecture: str | None
    parameters: int | None
    provenance: dict[str, object] = Field(default_factory=dict)
    explained: Explanation | None = None


class Skipped(Frozen):
    """Something that could not be measured, and why."""

    what: str
    reason: str


class MeasuredFile(Frozen):
    """A file or folder in a runtime. reasons: what failed."""

    artefact: str
    kind: Kind
    precision: str
    bytes: int
    runtime: str
    version: str  # of the runtime
    reasons: list[str]

    @property
    def name(self) -> str:
        """The file, its type and the runtime, for people."""
        return f"{Path(self.artefact).name} ({self.precision}) in {self.runtime}"

    @property
    def failures(self) -> list[str]:
        """The reasons, each with the name."""
        return [f"{self.name}: {reason}" for reason in self.reasons]


class Machine(Frozen):
    """Where it was measured."""

    system: str
    processor: str
    cores: int
    threads_used: int
    memory: int  # bytes
    python: str


class RunRecord(Frozen):
    """Who measured, when and where, as `machine.run_record` has it."""

    created: str  # UTC, ISO 8601
    command: list[str]
    machine: Machine


class Report(RunRecord):
    """Everything that one or more checks found."""

    schema_version: Literal[2] = SCHEMA_VERSION
    packages: dict[str, str]
    protocols: list[ProtocolRecord] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)  # how each figure was measured
    models: list[Model] = Field(default_factory=list)
    results: list[Result] = Field(default_factory=list)
    costs: list[Cost] = Field(default_factory=list)
    skipped: list[Skipped] = Field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every artefact that was measured is within tolerance."""
        return all(result.passed for result in self.results)
