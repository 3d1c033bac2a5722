"""The checks that the command line and the demo call.

check_parity   one reference, any candidates: same weights, other runtime?
bench          speed of artefacts in turn
measure_perplexity   one artefact, any number of windows, nothing kept on disk
(Whole models, dense against compressed: see campaign.py.)

All return a `Report`; `.passed` says whether everything measured is within tolerance. A runtime that fails on an artefact
(crash, wrong shapes) is a failed result with its reason; a mistake in the arguments is a UserError.
"""

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from runtime_checks.artefacts import open_artefact
from runtime_checks.costs import costs_of
from runtime_checks.diagnosis.examine import Examiner
from runtime_checks.frozen import Frozen
from runtime_checks.kept import Kept
from runtime_checks.machine import checked_threads, packages, run_record
from runtime_checks.process import CheckError
from runtime_checks.protocol import Protocol, make_protocol, read_text
from runtime_checks.reference import Reference
from runtime_checks.runtimes import check_device, check_runtimes, runtimes_for
from runtime_checks.runtimes.devices import CPU
from runtime_checks.schema import Comparison, Report, Result, Skipped, Tolerance
from runtime_checks.subject import Subject
from runtime_checks.throughput import interleave
from sola_edge.checkpoint import load_tokenizer
from sola_edge.errors import UserError

VOCABULARY_OF_ANY_MODEL = 256  # prompts of a speed test use ids below this when no tokenizer is at hand
WARM_UP = 8


def subjects_of(
    model: str,
    path: Path,
    skipped: list[Skipped],
    every_runtime: bool = True,
    device: str = CPU,
    runtimes: Sequence[str] | None = None,
) -> list[Subject]:
    """One subject per runtime (of `runtimes`, where given) that can run the artefact on that device here; the others are noted
    in `skipped`.
    """
    artefact = open_artefact(path)
    found = []
    for row in runtimes_for(artefact.kind, artefact.path, device):
        if runtimes is not None and row.name not in runtimes:
            continue
        reason = row.absent()
        if reason is None:
            found.append(Subject(model, artefact, row))
        else:
            skipped.append(Skipped(what=f"{artefact.path} in {row.label}", reason=reason))
        if found and not every_runtime:
            break
    return found


def named_subjects(
    paths: Iterable[Path], runtimes: Sequence[str] | None, skipped: list[Skipped], device: str = CPU
) -> list[Subject]:
    """Subjects of every path in every runtime that takes it on that device, of `runtimes` where those are given.

    Raises UserError for a name that is no runtime's or device's, and where nothing is left to run.
    """
    check_runtimes(runtimes)
    check_device(device)
    found = [s for path in paths for s in subjects_of("", Path(path), skipped, device=device, runtimes=runtimes)]
    _refuse_nothing(found, skipped, "no runtime that was named takes it" if runtimes else "no candidates were named")
    return found


def new_report(threads: int, **fields: Any) -> Report:
    """A report with its provenance filled in."""
    return Report(**run_record(threads), packages=packages(), **fields)


def check_parity(
    reference: Path,
    candidates: list[Path],
    text: Path | str,
    *,
    text_name: str = "",
    context: int = 2048,
    windows: int | None = 4,
    threads: int | None = None,
    tokenizer_from: Path | None = None,
    scratch: Path | None = None,
    asked: Tolerance | None = None,
    comparison: Comparison = "export parity",
    device: str = CPU,
    kept: Kept | None = None,
) -> Report:
    """Compare every candidate, in every runtime that takes it on `device`, with the reference, on the CPU, on the same ids.

    asked: limits that stand before the precisions' own; see `schema.Parity` for the two comparisons. kept: where results of
    earlier runs are, to be used again.
    Raises UserError for bad input (missing paths, short text, no runtime for the reference, too little disk).
    """
    threads = checked_threads(threads)
    skipped: list[Skipped] = []
    first = reference_subject(Path(reference), skipped)
    subjects = named_subjects(candidates, None, skipped, device)
    tokenizer = load_tokenizer(Path(tokenizer_from or reference))
    protocol = make_protocol(text, tokenizer, context, windows, text_name)
    examiner = Examiner(first.artefact, tokenizer, read_text(text)[1], weights=comparison == "export parity")
    question = {
        "protocol": protocol.record().model_dump(),
        "asked": asked.model_dump() if asked else None,
        "comparison": comparison,
    }
    earlier = Earlier(kept, threads, question, [Path(reference), *([Path(tokenizer_from)] if tokenizer_from else [])])
    head, found = earlier.find(first, True), [earlier.find(subject) for subject in subjects]
    with tempfile.TemporaryDirectory(dir=scratch, prefix="sola-edge-") as folder:
        if head is None or None in found:
            logits = reference_logits(first, protocol, threads, Path(folder))
            head = earlier.keep(first, [], True)
        for place, subject in enumerate(subjects):
            if found[place] is not None:
                continue
            noted = len(examiner.skipped)
            try:
                with ExitStack() as stack:
                    subject.start(stack, threads, context)
                    subject.compare(logits, protocol, Path(folder), asked, comparison)
                    examiner.examine(subject, protocol, Path(folder))
            except CheckError as error:
                subject.reasons.append(str(error))
            found[place] = earlier.keep(subject, examiner.skipped[noted:])
    of_all = [one for one in (head, *found) if one is not None]
    skipped += [note for one in of_all for note in one.skipped]
    results = [one.result for one in of_all]
    return new_report(threads, protocols=[protocol.record()], results=results, skipped=skipped)


class KeptResult(Frozen):
    """A result, and what could not be compared of its artefact."""

    result: Result
    skipped: list[Skipped]


class Earlier:
    """What is kept of subjects that were asked the same question, beside the same files (a reference, a tokenizer)."""

    def __init__(self, kept: Kept | None, threads: int, question: dict[str, Any], files: list[Path]) -> None:
        self.kept, self.threads, self.question, self.files = kept, threads, question, files

    def find(self, subject: Subject, reference: bool = False) -> KeptResult | None:
        """The result of an earlier run, under the paths of this one."""
        if self.kept is None:
            return None
        found = self.kept.find(KeptResult, self._place(self.kept, subject, reference))
        if found is None:
            return None
        parity = found.result.parity
        if parity is not None:
            parity = parity.model_copy(update={"reference": str(self.files[0])})
        paths = {"artefact": str(subject.artefact.path), "parity": parity}
        return found.model_copy(update={"result": found.result.model_copy(update=paths)})

    def keep(self, subject: Subject, skipped: list[Skipped], reference: bool = False) -> KeptResult:
        """What this run measured, kept but where the runtime failed: it may not fail again."""
        measured = KeptResult(result=subject.result(), skipped=skipped)
        if self.kept is not None and not subject.reasons:
            moment = run_record(self.threads)["created"]
            dated = measured.result.model_copy(update={"measured": moment})
            place = self._place(self.kept, subject, reference)
            self.kept.keep(measured.model_copy(update={"result": dated}), place)
        return measured

    def _place(self, kept: Kept, subject: Subject, reference: bool) -> Path:
        asked = {
            **self.question,
            "beside": [kept.hashes(path) for path in self.files],
            "role": "reference" if reference else "candidate",
            "name": subject.artefact.path.name,  # it says a type too, which is compared
        }
        return kept.place(subject.artefact, subject.row.label, self.threads, **asked)


def reference_subject(path: Path, skipped: list[Skipped]) -> Subject:
    """The artefact in its plainest runtime. Raises UserError where none runs it here."""
    found = subjects_of("", path, skipped, every_runtime=False)
    if not found:
        raise UserError(f"the reference cannot be run: {skipped[-1].reason if skipped else path}")
    return found[0]


def reference_logits(subject: Subject, protocol: Protocol, threads: int, folder: Path) -> Reference:
    """Its logits on all windows, in files of the folder. Raises UserError where it fails or the disk is too full."""
    try:
        with ExitStack() as stack:
            subject.start(stack, threads, protocol.context)
            return subject.write_reference(protocol, folder)
    except CheckError as error:
        raise UserError(f"the reference cannot be run: {error}") from error


def bench(
    candidates: list[Path],
    baseline: Path | None = None,
    *,
    prompt: int = 512,
    generate: int = 128,
    rounds: int = 3,
    threads: int | None = None,
    device: str = CPU,
) -> Report:
    """Prefill and decode speed and peak memory of artefacts, in turn; with a baseline, the ratios to it.

    Each runtime's artefacts are one run: the baseline and the candidates alternate, round by round. Raises UserError.
    """
    check_sizes(prompt, generate, rounds)
    check_device(device)
    threads = checked_threads(threads)
    skipped: list[Skipped] = []
    named = [("baseline", Path(baseline))] if baseline else []
    named += [(f"candidate {i}" if len(candidates) > 1 else "candidate", Path(p)) for i, p in enumerate(candidates, 1)]
    subjects = [s for name, path in named for s in subjects_of(name, path, skipped, device=device)]
    _refuse_nothing(subjects, skipped)
    for name in dict.fromkeys(s.row.name for s in subjects):
        bench_group([s for s in subjects if s.row.name == name], prompt, generate, rounds, threads)
    results = [s.result() for s in subjects]
    costs = costs_of("baseline", results, [], any_precision=True)
    return new_report(threads, notes=notes(), results=results, costs=costs, skipped=skipped)


def _refuse_nothing(subjects: list[Subject], skipped: list[Skipped], why: str = "no candidates were named") -> None:
    """Raises UserError when no runtime here takes any of the artefacts: nothing compared is nothing passed."""
    if not subjects:
        raise UserError(f"nothing can be run: {skipped[-1].reason if skipped else why}")


def check_sizes(prompt: int, generate: int, rounds: int) -> None:
    """Raises UserError for a size below 1."""
    for name, value in (("prompt", prompt), ("generate", generate), ("rounds", rounds)):
        if value < 1:
            raise UserError(f"{name} {value} is out of range: give at least 1")


def bench_group(subjects: list[Subject], prompt: int, generate: int, rounds: int, threads: int) -> None:
    """Memory and interleaved speed of artefacts of one runtime."""
    with ExitStack() as stack:
        for subject in subjects:
            try:
                subject.start(stack, threads, max(prompt, generate) + WARM_UP)
                subject.measure_memory(max(prompt, generate), VOCABULARY_OF_ANY_MODEL, WARM_UP)
            except CheckError as error:
                subject.reasons.append(str(error))
        time_group(subjects, prompt, generate, VOCABULARY_OF_ANY_MODEL, rounds, threads)


def time_group(subjects: list[Subject], prompt: int, generate: int, vocab: int, rounds: int, threads: int) -> None:
    """Interleaved rounds of the subjects that have not failed."""
    able = [s for s in subjects if s.child is not None and not s.reasons]
    if not able:
        return
    row = able[0].row
    members = {i: s.once(prompt, generate, vocab, threads) for i, s in enumerate(able)}
    title = f"speed of {row.label} {able[0].precision}: " + ", ".join(s.model for s in able)
    found, failed = interleave(members, rounds, prompt, generate, threads, row.tool, title)
    for i, subject in enumerate(able):
        if i in found:
            subject.found["throughput"] = found[i]
        if i in failed:
            subject.reasons.append(failed[i])


def measure_perplexity(
    path: Path,
    text: Path | str,
    *,
    text_name: str = "",
    context: int = 2048,
    windows: int | None = None,
    threads: int | None = None,
    tokenizer_from: Path | None = None,
    device: str = CPU,
    kept: Kept | None = None,
) -> Report:
    """Perplexity of one artefact in its plainest runtime on `device`, of an earlier run where it is kept.

    Raises UserError; a runtime that fails is a failed result.
    """
    threads = checked_threads(threads)
    skipped: list[Skipped] = []
    check_device(device)
    subjects = subjects_of("", Path(path), skipped, every_runtime=False, device=device)
    if not subjects:
        raise UserError(f"{path} cannot be run: {skipped[-1].reason if skipped else 'no runtime takes it'}")
    protocol = make_protocol(text, load_tokenizer(Path(tokenizer_from or path)), context, windows, text_name)
    earlier = Earlier(kept, threads, {"protocol": protocol.record().model_dump(), "comparison": None}, [])
    found = earlier.find(subjects[0])
    if found is None:
        try:
            with ExitStack() as stack:
                subjects[0].start(stack, threads, context)
                subjects[0].score(protocol)
        except CheckError as error:
            subjects[0].reasons.append(str(error))
        found = earlier.keep(subjects[0], [])
    return new_report(threads, protocols=[protocol.record()], results=[found.result])


def notes() -> list[str]:
    """How the figures were measured, for the report."""
    from runtime_checks.runtimes import RUNTIMES

    prefill = "; ".join(f"{row.name}: {row.prefill_note}" for row in RUNTIMES.values())
    return [
        "Every runtime is given the same token ids, window by window from an empty context; no BOS is added.",
        "Perplexity scores every token of a window but its first; its standard error is over the windows.",
        "KL divergence is KL(PyTorch fp32 || runtime) in nats, same weights, over the scored positions.",
        "Peak memory is the resident peak of a fresh process (mapped weights included); it covers loading, one prompt "
        "and some decoding, not the parity run. Another process may take some per cent more: heaps find room by chance "
        "(check memory measures several).",
        "Speed is the median over rounds [minimum to maximum]; within a round the models take turns.",
        "llama.cpp runs as by default (F16 KV cache, flash attention where it chooses), an F32 file without either's rounding.",
        "Where other programs keep the cores busy, processes run with OMP_WAIT_POLICY=PASSIVE (and a warning is given).",
        f"Prefill computes, {prefill}.",
    ]
