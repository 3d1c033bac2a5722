"""What a compressed model gained and cost against its baseline, artefact by artefact (ratios: model / baseline)."""

from typing import Literal

from runtime_checks.metrics import Comparison
from runtime_checks.parity import COARSE, judge
from runtime_checks.schema import Cost, Parity, Perplexity, Result


def compression_parity(comparisons: list[Comparison], baseline: str) -> Parity:
    """KL and agreement of two models in PyTorch; its pass or fail means nothing."""
    return judge(comparisons, COARSE, baseline, "torch")


def costs_of(
    baseline: str, results: list[Result], parity: list[tuple[str, Parity]], any_precision: bool = False
) -> list[Cost]:
    """A row for every result of another model that has a counterpart of the baseline in the same runtime and precision.

    `parity` holds (model, comparison with the baseline in PyTorch).
    """
    found = []
    for result in results:
        if result.model == baseline:
            continue
        before = next((r for r in results if r.model == baseline and _alike(r, result, any_precision)), None)
        if before is not None:
            seen = next((p for model, p in parity if model == result.model and result.runtime == "torch"), None)
            found.append(_cost(before, result, seen))
    return found


def _alike(a: Result, b: Result, any_precision: bool) -> bool:
    return a.runtime == b.runtime and (any_precision or a.precision == b.precision)


def _cost(before: Result, after: Result, parity: Parity | None) -> Cost:
    return Cost(
        baseline=before.model,
        model=after.model,
        runtime=after.runtime,
        precision=after.precision,
        bytes_ratio=after.bytes / before.bytes,
        parameters_ratio=_ratio(after.parameters, before.parameters),
        peak_memory_ratio=_ratio(_peak(after), _peak(before)),
        prefill_ratio=_ratio(_speed(after, "prefill"), _speed(before, "prefill")),
        decode_ratio=_ratio(_speed(after, "decode"), _speed(before, "decode")),
        perplexity_baseline=_value(before.perplexity),
        perplexity=_value(after.perplexity),
        perplexity_ratio=_ratio(_value(after.perplexity), _value(before.perplexity)),
        kl_mean=parity.kl_mean if parity else None,
        top1=parity.top1 if parity else None,
    )


def _peak(result: Result) -> int | None:
    return result.memory.peak if result.memory is not None else None


def _speed(result: Result, which: Literal["prefill", "decode"]) -> float | None:
    found = result.throughput
    return getattr(found, which).median if found is not None else None


def _value(found: Perplexity | None) -> float | None:
    return found.value if found is not None else None


def _ratio(after: float | None, before: float | None) -> float | None:
    return after / before if after is not None and before else None
