"""One artefact in one runtime, and the figures collected about it while its child process lives."""

import tempfile
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime_checks import generation as gen
from runtime_checks.artefacts import Artefact
from runtime_checks.parity import judge, tolerance_of
from runtime_checks.perplexity import perplexity
from runtime_checks.process import CheckError, Child
from runtime_checks.protocol import Protocol
from runtime_checks.reference import Reference, compare_all, read_logits, write_reference
from runtime_checks.runtimes import RuntimeRow
from runtime_checks.schema import Comparison, Finding, Memory, Result, Tolerance
from runtime_checks.throughput import Once, child_once, llama_bench_once, random_prompt
from sola_edge.progress import status, track


def memory_of(child: Child, prompt: list[int], decode: int, covers: str) -> Memory:
    """Use a fresh process as a user would, and note its memory. Raises CheckError."""
    used = child.ask("use", prompt=prompt, decode=decode)
    return Memory(
        covers=covers,
        baseline=child.loaded["baseline"],
        after_load=child.loaded["after_load"],
        peak=used["peak"],
        anonymous=used.get("anonymous"),
        file_backed=used.get("file_backed"),
        libraries=used["libraries"],
        parts=used["parts"],
    )


@dataclass
class Subject:
    """An artefact of a model, the row of the runtime that runs it, and what has been found so far."""

    model: str
    artefact: Artefact
    row: RuntimeRow
    parameters: int | None = None
    child: Child | None = None
    found: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    version: str = ""

    @property
    def label(self) -> str:
        """Short name for progress bars and tables."""
        precision = "" if self.artefact.kind == "checkpoint" else f" {self.precision}"
        return f"{self.model} · {self.row.label}{precision}".strip(" ·")

    @property
    def precision(self) -> str:
        """What it is computed in: a checkpoint is always run in fp32, however it is stored."""
        return "fp32" if self.artefact.kind == "checkpoint" else self.artefact.precision

    def start(self, stack: ExitStack, threads: int, context: int) -> Child:
        """Load the model in a fresh process that lives as long as `stack`. Raises CheckError."""
        with status(f"loading {self.label}"):
            self.child = stack.enter_context(Child(self.row, self.artefact.path, threads, context))
        self.version = self.child.loaded["version"]
        return self.child

    def measured(self) -> dict[str, Any]:
        """The fields of a `MeasuredFile`."""
        return {
            "artefact": str(self.artefact.path),
            "kind": self.artefact.kind,
            "precision": self.precision,
            "bytes": self.artefact.bytes,
            "runtime": self.row.label,
            "version": self.version,
            "reasons": list(self.reasons),
        }

    def result(self) -> Result:
        """Everything found, as the report has it."""
        parity, continuation, ppl = (self.found.get(key) for key in ("parity", "generation", "perplexity"))
        reasons = list(self.reasons)
        if parity is not None:
            reasons += parity.reasons
        elif ppl is not None and ppl.nonfinite:
            reasons.append(f"{ppl.nonfinite} positions have non-finite logits")
        if continuation is not None and continuation.passed is False:
            reasons.append(f"its continuation {continuation.note}")
        failed = bool(reasons) or any(finding.fails for finding in self.findings)
        findings = self.findings if failed else []
        reasons += [finding.text for finding in findings]
        return Result(
            model=self.model,
            **{**self.measured(), "reasons": reasons},
            parameters=self.parameters,
            expected_bytes=self.artefact.expected_bytes(self.parameters),
            findings=findings,
            passed=not reasons,
            **self.found,
        )

    def measure_memory(self, prompt: int, vocab: int, decode: int) -> None:
        """Use the fresh process as a user would, and note its memory. Raises CheckError."""
        with status(f"memory of {self.label}"):
            self.found["memory"] = memory_of(
                self.running(),
                random_prompt(prompt, vocab),
                decode,
                f"loading, a prompt of {prompt} tokens, {decode} tokens decoded",
            )

    def score(self, protocol: Protocol) -> None:
        """Perplexity under the protocol; no logits are kept. Raises CheckError."""
        child, windows = self.running(), track(list(protocol.ids), f"perplexity of {self.label}")
        asked = (child.ask("nll", ids=ids.tolist())["nll"] for ids in windows)
        self.found["perplexity"] = perplexity([np.array([np.nan if v is None else v for v in nll]) for nll in asked])

    def write_reference(self, protocol: Protocol, scratch: Path) -> Reference:
        """Run the protocol and keep the logits: this is what others are compared with. Raises CheckError."""
        name = uuid.uuid4().hex
        reference = write_reference(self.running(), protocol, scratch, name, f"logits of {self.label}")
        self.found["perplexity"] = perplexity(reference.nll)
        return reference

    def compare(
        self,
        reference: Reference,
        protocol: Protocol,
        scratch: Path,
        asked: Tolerance | None = None,
        comparison: Comparison = "export parity",
    ) -> None:
        """Run the protocol against a reference's logits; `asked` stands before the precision's tolerance. Raises CheckError."""
        found = list(compare_all(self.running(), reference, protocol, scratch, f"parity of {self.label}"))
        tolerance = tolerance_of(self.precision, asked or Tolerance(), comparison)
        self.found["perplexity"] = perplexity([c.nll_candidate for c in found])
        self.found["parity"] = judge(found, tolerance, reference.artefact, reference.runtime, comparison)

    def generate(self, request: "Prompt", reference: gen.Continuation | None) -> gen.Continuation:
        """Continue the prompt greedily and compare with the reference's continuation, if any. Raises CheckError."""
        with status(f"continuation by {self.label}"), tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "steps.f32"
            asked = {"ids": request.ids, "count": request.count, "eos": request.eos, "out": str(out)}
            ids = self.running().ask("generate", **asked)["ids"]
            steps = np.array(read_logits(out, out.stat().st_size // 4 // len(ids))) if out.exists() else None
        parity = self.found.get("parity")
        allowed = parity.max_logit_difference if parity is not None else None
        text = request.tokenizer.decode(ids, skip_special_tokens=True)
        self.found["generation"] = gen.compare(request.text, text, ids, reference, self.precision, allowed)
        return gen.Continuation(ids, steps)

    def once(self, prompt: int, generate: int, vocab: int, threads: int) -> Once:
        """One round of the speed test by the tool of this runtime."""
        if self.row.tool == "llama-bench":
            return llama_bench_once(self.artefact.path, prompt, generate, threads, self.row.known)
        return child_once(self.running(), random_prompt(prompt, vocab), generate)

    def running(self) -> Child:
        """Its process. Raises CheckError where it was not started."""
        if self.child is None:
            raise CheckError(f"{self.label} was not started")
        return self.child


@dataclass(frozen=True)
class Prompt:
    """What every runtime continues: ids of the text (no BOS), how many tokens, and the ids that end a continuation."""

    text: str
    ids: list[int]
    count: int
    eos: list[int]
    tokenizer: Any
