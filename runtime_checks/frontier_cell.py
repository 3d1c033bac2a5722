"""One cell of a frontier: a file in a runtime; its perplexity, memory, and speed in turn with the dense model's."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_checks.artefacts import open_artefact
from runtime_checks.checks import WARM_UP, bench_group
from runtime_checks.frontier_schema import FrontierCell
from runtime_checks.process import CheckError
from runtime_checks.protocol import Protocol
from runtime_checks.runtimes import RUNTIMES
from runtime_checks.subject import Subject


@dataclass(frozen=True)
class Gauge:
    """How every file is measured: ids to score, tokens of the prefill and decode tests, rounds in turn with the baseline."""

    protocol: Protocol
    prompt: int
    generate: int
    rounds: int
    threads: int

    @property
    def memory_context(self) -> int:
        """Tokens that a runtime is loaded for when its memory is read."""
        return max(self.prompt, self.generate) + WARM_UP


def measure(path: Path, runtime: str, label: str, baseline: Path | None, gauge: Gauge) -> dict[str, Any]:
    """Figures of a cell (fields of FrontierCell), with `reason` where one is missing. baseline None: it is the baseline."""
    row = RUNTIMES[runtime]
    subject = Subject(label, open_artefact(path), row)
    start = time.perf_counter()
    try:
        with ExitStack() as stack:
            subject.start(stack, gauge.threads, gauge.protocol.context)
            subject.score(gauge.protocol)
    except CheckError as error:
        return {"reason": str(error)}
    scored = time.perf_counter()
    found = subject.found["perplexity"]
    figures = {"perplexity": found, "version": subject.version, "memory_context": gauge.memory_context}
    if found.value is None:
        return {**figures, "reason": f"{found.nonfinite} positions have non-finite logits"}
    base = subject if baseline is None else Subject("baseline", open_artefact(baseline), row)
    group = [subject] if baseline is None else [base, subject]
    bench_group(group, gauge.prompt, gauge.generate, gauge.rounds, gauge.threads)
    reasons = [reason for member in group for reason in member.reasons]
    figures |= {
        "memory": subject.found.get("memory"),
        "throughput": subject.found.get("throughput"),
        "baseline": base.found.get("throughput"),
        "seconds": {"perplexity": scored - start, "speed": time.perf_counter() - scored},
    }
    return {**figures, "reason": "; ".join(reasons)} if reasons else figures


def known(cell: FrontierCell | None, compression: dict[str, Any] | None) -> bool:
    """Whether a cell needs no more measuring. Those without figures are tried again: the cause may be gone."""
    return cell is not None and cell.status == "measured" and cell.compression == compression
