"""Everything that is compared of an artefact beside its logits.

Of an artefact once: its weights, what it says of itself, its tokenizer. Of each runtime: the ids that it makes of a text, and
its cache. What cannot be compared is noted with the reason and fails nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime_checks.artefacts import Artefact
from runtime_checks.diagnosis.cache import compare_cache, limit_of
from runtime_checks.diagnosis.declared import compare_declared
from runtime_checks.diagnosis.facts import compare_facts
from runtime_checks.diagnosis.gguf_weights import compare_gguf
from runtime_checks.diagnosis.ids import SAMPLE, compare_ids
from runtime_checks.diagnosis.model import compare_models
from runtime_checks.process import CheckError
from runtime_checks.protocol import Protocol
from runtime_checks.schema import Finding, Skipped
from runtime_checks.subject import Subject
from sola_edge.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from sola_edge.errors import UserError
from sola_edge.progress import status


@dataclass
class Examiner:
    """Compares candidates with one reference.

    text: what both tokenizers are given. weights: whether the candidates are to be the same model.
    """

    reference: Artefact
    tokenizer: Any
    text: str
    weights: bool = True
    skipped: list[Skipped] = field(default_factory=list)
    _known: dict[Path, list[Finding]] = field(default_factory=dict)

    def examine(self, subject: Subject, protocol: Protocol, scratch: Path) -> None:
        """Add what is found to the subject's findings; its process must run. Raises CheckError."""
        artefact = subject.artefact
        if artefact.path not in self._known:
            with status(f"parts of {artefact.path.name}"):
                self._known[artefact.path] = self._of_file(artefact)
        subject.findings += self._known[artefact.path]
        subject.findings += self._try(f"ids of {subject.label}", lambda: self._ids(subject))
        with status(f"cache of {subject.label}"):
            parity = subject.found.get("parity")
            limit = limit_of(subject.precision, (parity.kl_mean if parity else None) or 0.0)
            subject.findings += compare_cache(subject.running(), protocol, scratch, limit)

    def _of_file(self, artefact: Artefact) -> list[Finding]:
        """What needs no runtime."""
        if artefact.path == self.reference.path:
            return []
        findings = self._try(f"precision of {artefact.path}", lambda: compare_declared(artefact))
        facts = self._try(f"metadata of {artefact.path}", lambda: compare_facts(artefact, self.reference))
        if not self.weights:  # another model may have other sizes: they explain, and fail nothing
            return findings + [fact.model_copy(update={"fails": False}) for fact in facts]
        findings += facts
        other = self._try(f"model of {artefact.path}", lambda: compare_models(artefact, self.reference))
        return findings + (other or self._try(f"weights of {artefact.path}", lambda: self._weights(artefact)))

    def _try(self, what: str, compare: Callable[[], list[Finding]]) -> list[Finding]:
        try:
            return compare()
        except (UserError, CheckError, ValueError, AttributeError) as error:  # the last two: no JSON, or other JSON
            self.skipped.append(Skipped(what=what, reason=str(error)))
            return []

    def _weights(self, artefact: Artefact) -> list[Finding]:
        if self.reference.kind != "checkpoint":
            raise UserError("the reference is no checkpoint, so nobody knows what each tensor should be")
        checkpoint = open_checkpoint(self.reference.path)
        if artefact.kind == "gguf":
            return compare_gguf(artefact.path, checkpoint)
        if artefact.kind == "onnx":
            from runtime_checks.diagnosis.onnx_weights import compare_onnx

            return compare_onnx(artefact.path, checkpoint)
        return compare_checkpoints(open_checkpoint(artefact.path), checkpoint)

    def _ids(self, subject: Subject) -> list[Finding]:
        text = self.text[:SAMPLE]
        own = subject.running().ask("tokens", text=text)["ids"]
        if own is None:
            own = load_tokenizer(subject.artefact.path)(text, verbose=False)["input_ids"]
        expected = self.tokenizer(text, verbose=False)["input_ids"]
        return compare_ids(own, expected, self.tokenizer, subject.label)


def compare_checkpoints(found: Checkpoint, expected: Checkpoint) -> list[Finding]:
    """Two checkpoints under the same names, whatever they are stored in."""
    from runtime_checks.diagnosis.difference import difference, limits_of
    from runtime_checks.diagnosis.weights import names_differ

    findings = names_differ(found.names(), expected.names(), "tensor")
    kinds = {"torch.float16": "F16", "torch.bfloat16": "BF16"}
    for name in expected.names():
        if found.has(name):
            kind = kinds.get(str(found.tensors.dtype(name)), "F32")
            detail = difference(
                found.tensor(name).float().numpy(), expected.tensor(name).float().numpy(), limits_of(kind, True)
            )
            if detail is not None:
                findings.append(Finding(what="weight", where=name, detail=detail))
    return findings
