"""Measure whole models: every artefact of each in every runtime, parity, cost, memory, speed and continuations.

Order: PyTorch first (its logits are the reference of each model's other artefacts), then one group per runtime and
precision. Within a group every model gets its own fresh process, in which come, in this order: loading; a prompt and
some decoding, after which the memory figures are read; the parity windows; the continuation. Then the group's models
take turns in the speed rounds.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from pathlib import Path

from runtime_checks.checks import WARM_UP, check_sizes, new_report, notes, subjects_of, time_group
from runtime_checks.costs import compression_parity, costs_of
from runtime_checks.generation import PROMPT
from runtime_checks.machine import checked_threads
from runtime_checks.metrics import compare_window
from runtime_checks.models import describe
from runtime_checks.process import CheckError
from runtime_checks.protocol import Protocol, make_protocol
from runtime_checks.reference import Reference
from runtime_checks.schema import Parity, Report, Skipped
from runtime_checks.subject import Prompt, Subject
from sola_edge.checkpoint import load_tokenizer, open_checkpoint
from sola_edge.errors import UserError


@dataclass
class _Run:
    """What all groups share."""

    protocol: Protocol
    prompt: Prompt
    scratch: Path
    threads: int
    prompt_tokens: int
    generate: int
    rounds: int
    vocab: int
    references: dict[str, Reference] = field(default_factory=dict)

    @property
    def context(self) -> int:
        """Tokens that every runtime is loaded for."""
        continuation = len(self.prompt.ids) + self.prompt.count
        return max(self.protocol.context, self.prompt_tokens + WARM_UP, self.generate + 1, continuation)


def measure_models(
    models: Mapping[str, Sequence[Path]],
    text: Path | str,
    *,
    text_name: str = "",
    context: int = 512,
    windows: int = 4,
    prompt: int = 512,
    generate: int = 128,
    rounds: int = 3,
    continuation: int = 64,
    continue_text: str = PROMPT,
    threads: int | None = None,
    skipped: Sequence[tuple[str, str]] = (),
    scratch: Path | None = None,
) -> Report:
    """Measure each model's artefacts; the first model is the baseline of the costs.

    models: {"dense": [checkpoint folder, ONNX folder, f16.gguf, …], "compressed": […]}; each needs one checkpoint folder.
    skipped: (what, reason) that the caller could not even make. Raises UserError for bad input.
    """
    check_sizes(prompt, generate, rounds)
    threads = checked_threads(threads)
    left_out = [Skipped(what=what, reason=reason) for what, reason in skipped]
    subjects = [s for name, paths in models.items() for p in paths for s in subjects_of(name, Path(p), left_out)]
    described = [describe(name, _checkpoint(name, subjects)) for name in models]
    protocol, asked = _inputs(subjects, text, text_name, context, windows, continue_text, continuation)
    for subject in subjects:
        subject.parameters = next(m.parameters for m in described if m.name == subject.model)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="sola-edge-") as folder:
        run = _Run(protocol, asked, Path(folder), threads, prompt, generate, rounds, _vocabulary(subjects))
        for group in _groups(subjects):
            _measure_group(group, run)
        parity = _compression(list(models), run)
    results = [s.result() for s in subjects]
    return new_report(
        threads,
        protocols=[protocol.record()],
        notes=notes(),
        models=described,
        results=results,
        costs=costs_of(next(iter(models)), results, parity),
        skipped=left_out,
    )


def _checkpoint(model: str, subjects: list[Subject]) -> Path:
    found = [s.artefact.path for s in subjects if s.model == model and s.artefact.kind == "checkpoint"]
    if not found:
        raise UserError(f"the model {model!r} has no checkpoint folder, which its other artefacts are compared with")
    return found[0]


def _vocabulary(subjects: list[Subject]) -> int:
    """Ids that every model has an embedding of (a tokenizer may know more)."""
    return min(open_checkpoint(s.artefact.path).config.vocab_size for s in subjects if s.artefact.kind == "checkpoint")


def _inputs(
    subjects: list[Subject], text: Path | str, name: str, context: int, windows: int, continue_text: str, count: int
) -> tuple[Protocol, Prompt]:
    """One protocol and one prompt. Raises UserError when the models' tokenizers differ."""
    checkpoints = {s.model: s.artefact.path for s in subjects if s.artefact.kind == "checkpoint"}
    tokenizers = {model: load_tokenizer(path) for model, path in checkpoints.items()}
    protocols = {m: make_protocol(text, t, context, windows, name) for m, t in tokenizers.items()}
    first, *others = protocols.values()
    if any(other.ids_sha256 != first.ids_sha256 for other in others):
        raise UserError("the models' tokenizers turn the text into different ids, so their figures cannot be compared")
    tokenizer = next(iter(tokenizers.values()))
    ids = tokenizer(continue_text, add_special_tokens=False)["input_ids"]
    eos = open_checkpoint(next(iter(checkpoints.values()))).end_ids(tokenizer)
    return first, Prompt(continue_text, ids, count, eos, tokenizer)


def _groups(subjects: list[Subject]) -> list[list[Subject]]:
    """Subjects of one runtime and precision together, PyTorch first, otherwise in the order given."""
    keys = dict.fromkeys((s.row.name, s.precision) for s in subjects)
    ordered = sorted(keys, key=lambda key: key[0] != "torch")
    return [[s for s in subjects if (s.row.name, s.precision) == key] for key in ordered]


def _measure_group(group: list[Subject], run: _Run) -> None:
    with ExitStack() as stack:
        for subject in group:
            try:
                subject.start(stack, run.threads, run.context)
                subject.measure_memory(run.prompt_tokens, run.vocab, WARM_UP)
                _parity_and_text(subject, run)
            except CheckError as error:
                subject.reasons.append(str(error))
        time_group(group, run.prompt_tokens, run.generate, run.vocab, run.rounds, run.threads)


def _parity_and_text(subject: Subject, run: _Run) -> None:
    if subject.artefact.kind == "checkpoint":
        reference = subject.write_reference(run.protocol, run.scratch)
        continued = subject.generate(run.prompt, None)
        run.references[subject.model] = replaced(reference, continuation=continued)
        return
    known = run.references.get(subject.model)
    if known is None:
        raise CheckError("not compared: the PyTorch reference failed")
    subject.compare(known, run.protocol, run.scratch)
    subject.generate(run.prompt, known.continuation)


def _compression(models: list[str], run: _Run) -> list[tuple[str, Parity]]:
    """Every model's PyTorch logits against the first model's."""
    base = run.references.get(models[0])
    found = []
    for model in models[1:]:
        other = run.references.get(model)
        if base is not None and other is not None:
            windows = enumerate(run.protocol.ids)
            compared = [compare_window(base.window(i), other.window(i), ids) for i, ids in windows]
            found.append((model, compression_parity(compared, base.artefact)))
    return found
