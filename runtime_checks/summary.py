"""What the report says first, and how its figures are written: everything here is text made from a `Report`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime_checks.schema import BUSY, Cost, Memory, Report, Result, Speed

DASH = "–"


class Judged(Protocol):
    """A result or study that says whether it is as it should be."""

    @property
    def passed(self) -> bool:
        """Whether all of it is."""
        ...


COLUMNS = (
    "Runtime",
    "Model",
    "Check",
    "Size",
    "Peak memory",
    "Prefill tok/s",
    "Decode tok/s",
    "Perplexity",
    "KL to reference",
    "Same top-1",
    "Same top-5",
)


@dataclass(frozen=True)
class Card:
    """One headline figure with its explanation."""

    title: str
    figure: str
    detail: str


def megabytes(size: float) -> str:
    """Bytes as MB or GB (powers of ten)."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size < 1e7 else f"{size / 1e6:.0f} MB"


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits without an exponent where that reads well."""
    if value is None:
        return DASH
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.1e}"
    return f"{value:.{digits}g}" if abs(value) < 10 ** (digits - 1) else f"{value:,.0f}"


def size_text(result: Result) -> str:
    """Bytes, and how far they are from what the parameters alone would take."""
    if not result.expected_bytes or result.kind == "checkpoint":
        return megabytes(result.bytes)
    return f"{megabytes(result.bytes)} ({100 * (result.bytes / result.expected_bytes - 1):+.1f} %)"


def memory_text(memory: Memory | None) -> str:
    """Peak, and its parts where the runtime tells them."""
    if memory is None:
        return DASH
    told = {name: size for name, size in memory.parts.items() if size}
    if "weights" not in told:
        return megabytes(memory.peak)
    rest = max(0, memory.peak - sum(told.values()))
    parts = [f"{name} {size / 1e6:.0f}" for name, size in (*told.items(), ("rest", rest))]
    return f"{megabytes(memory.peak)} ({', '.join(parts)})"


def speed_text(speed: Speed | None) -> str:
    """Median [minimum to maximum]."""
    if speed is None:
        return DASH
    return f"{number(speed.median)} [{number(speed.minimum)}{DASH}{number(speed.maximum)}]"


def perplexity_text(result: Result) -> str:
    """Value ± standard error, and the change against the reference."""
    found = result.perplexity
    if found is None:
        return DASH
    if found.value is None:
        return f"{found.nonfinite} not finite"
    text = f"{number(found.value, 4)} ± {number(found.standard_error, 2)}"
    change = result.parity.ppl_change_percent if result.parity else None
    if change is None or result.parity is None:
        return text
    return f"{text} ({change:+.2g} ± {number(result.parity.ppl_change_standard_error, 2)} %)"


def check_text(result: Result) -> str:
    """Pass or fail in a word; the reasons are told elsewhere."""
    if result.reasons:
        return "FAIL"
    if result.parity is None:
        return "reference" if result.perplexity is not None else DASH
    return "pass" if result.parity.tolerance.model_dump(exclude_none=True) else "measured"


def row(result: Result) -> dict[str, str]:
    """The cell of each of COLUMNS."""
    parity, speed = result.parity, result.throughput
    cells = (
        label(result),
        result.model or DASH,
        check_text(result),
        size_text(result),
        memory_text(result.memory),
        speed_text(speed.prefill if speed else None),
        speed_text(speed.decode if speed else None),
        perplexity_text(result),
        number(parity.kl_mean, 2) if parity else DASH,
        f"{100 * parity.top1:.2f} %" if parity and parity.top1 is not None else DASH,
        f"{100 * parity.top5:.2f} %" if parity and parity.top5 is not None else DASH,
    )
    return dict(zip(COLUMNS, cells, strict=True))


def by_runtime(report: Report) -> list[Result]:
    """The results with those of one runtime and type together, so that the models stand below one another."""
    order = {name: i for i, name in enumerate(dict.fromkeys(label(r) for r in report.results))}
    return sorted(report.results, key=lambda r: order[label(r)])


def failures(report: Report) -> list[str]:
    """Every reason of every failed result, with its name."""
    return [f"{r.model} {label(r)}: {reason}".strip() for r in report.results for reason in r.reasons]


def label(result: Result | Cost) -> str:
    """Runtime and type: PyTorch runs every checkpoint in fp32."""
    return result.runtime if result.runtime == "torch" else f"{result.runtime} {result.precision}"


def verdict(report: Report, studies: Sequence[Judged] = ()) -> str:
    """One line on the whole report, and on the studies beside it."""
    judged = [r for r in report.results if r.parity is not None or r.reasons]
    failed = [r for r in report.results if not r.passed]
    lost = sum(not study.passed for study in studies)
    if failed or lost:
        parts = [f"{len(failed)} of {len(report.results)} results"] if failed else []
        parts += [f"parts of {lost} of {len(studies)} studies"] if lost else []
        return f"{' and '.join(parts)} failed"
    if not judged:
        return "Measured; nothing was compared with a reference"
    if any(r.parity is not None and r.parity.comparison == "compression cost" for r in judged):
        return f"What {len(judged)} models cost against the reference; limits that were given are kept"
    names = dict.fromkeys(r.parity.reference_runtime for r in judged if r.parity is not None)
    reference = " and ".join("PyTorch" if name == "torch" else name for name in names)
    return f"All {len(judged)} exports compute what {reference} computes, within tolerance"


def warnings(report: Report) -> list[str]:
    """What makes figures of this report doubtful."""
    busy = max((r.throughput.others_busy for r in report.results if r.throughput), default=0.0)
    if busy > BUSY:
        return [f"Other programs kept up to {busy:.0%} of the cores busy: speeds are not to be relied on."]
    return []


def reused(moments: Iterable[str | None]) -> list[str]:
    """A line about results that were measured by an earlier run, by when that was; none where all are of this run."""
    every = list(moments)
    earlier = sorted(moment for moment in every if moment)
    if not earlier:
        return []
    return [
        f"{len(earlier)} of {len(every)} results are kept of earlier runs, the oldest of {earlier[0]}; --fresh measures anew."
    ]


def cards(report: Report) -> list[Card]:
    """How much smaller, how much faster, at what cost: one set per compressed model."""
    found = []
    for model in dict.fromkeys(cost.model for cost in report.costs):
        costs = [c for c in report.costs if c.model == model]
        found += [card for card in (_smaller(costs), _faster(costs), _memory(costs), _price(costs)) if card is not None]
    return found


def _name(costs: list[Cost]) -> str:
    return f"{costs[0].model} / {costs[0].baseline}"


def _span(values: Iterable[float | None], unit: str) -> str:
    known = sorted(v for v in values if v is not None)
    if not known:
        return DASH
    low, high = f"{known[0]:.2f}", f"{known[-1]:.2f}"
    return f"{low}{unit}" if low == high else f"{low}{DASH}{high}{unit}"


def _smaller(costs: list[Cost]) -> Card | None:
    exports = [c for c in costs if c.runtime != "torch"] or costs
    parameters = next((c.parameters_ratio for c in costs if c.parameters_ratio), None)
    by_type = dict.fromkeys(f"{c.precision} {c.bytes_ratio:.3f}×" for c in exports)
    told = f"; the parameters: {parameters:.3f}×" if parameters else ""
    return Card(
        "Size of the files", _span((c.bytes_ratio for c in exports), "×"), f"{_name(costs)}: {', '.join(by_type)}{told}"
    )


def _faster(costs: list[Cost]) -> Card | None:
    timed = [c for c in costs if c.decode_ratio and c.prefill_ratio]
    if not timed:
        return None
    each = [f"{label(c)} {c.prefill_ratio:.2f}× / {c.decode_ratio:.2f}×" for c in timed]
    figure = _span((c.prefill_ratio for c in timed), "×") + " / " + _span((c.decode_ratio for c in timed), "×")
    return Card("Speed, prefill / decode", figure, f"above 1× is faster; {', '.join(each)}")


def _memory(costs: list[Cost]) -> Card | None:
    known = [c for c in costs if c.peak_memory_ratio]
    if not known:
        return None
    each = [f"{label(c)} {c.peak_memory_ratio:.2f}×" for c in known]
    return Card("Peak memory", _span((c.peak_memory_ratio for c in known), "×"), ", ".join(each))


def _price(costs: list[Cost]) -> Card | None:
    paid = next((c for c in costs if c.perplexity_ratio and c.runtime == "torch"), None)
    paid = paid or next((c for c in costs if c.perplexity_ratio), None)
    if paid is None:
        return None
    figure = f"{number(paid.perplexity_baseline, 4)} → {number(paid.perplexity, 4)}"
    detail = f"{paid.perplexity_ratio:.2f}× in {label(paid)}"
    if paid.kl_mean is not None and paid.top1 is not None:
        detail += f"; KL({paid.baseline} || {paid.model}) {number(paid.kl_mean)} nats, same top-1 token {paid.top1:.0%}"
    return Card("Cost: perplexity", figure, detail)


@dataclass(frozen=True)
class Continuations:
    """A text that one or more runtimes of a model wrote."""

    model: str
    writers: list[str]
    prompt: str
    text: str
    notes: list[str]


def continuations(report: Report) -> list[Continuations]:
    """The generated texts, each once, with who wrote it."""
    groups: dict[tuple[str, tuple[int, ...]], list[Result]] = {}
    for result in report.results:
        if result.generation is not None:
            groups.setdefault((result.model, tuple(result.generation.ids)), []).append(result)
    found = []
    for (model, _), results in groups.items():
        first = results[0].generation
        assert first is not None
        notes = [
            f"{label(r)} {r.generation.note}"
            for r in results
            if r.generation and r.generation.first_difference is not None
        ]
        found.append(Continuations(model, [label(r) for r in results], first.prompt, first.text, notes))
    return found
