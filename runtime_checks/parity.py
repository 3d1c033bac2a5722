"""Does another runtime compute what PyTorch computes? The tolerances, and the judgement.

Export parity compares the same weights in two runtimes, compression cost two models. KL(reference || candidate) in nats, top-1
and top-5 agreement are over the scored positions, the perplexity change is exp(mean NLL difference) - 1, its standard error is
paired over windows.
"""

import math

import numpy as np

from runtime_checks import schema
from runtime_checks.metrics import Comparison, Floats
from runtime_checks.perplexity import mean_and_error
from runtime_checks.schema import Parity, Tolerance
from sola_edge.errors import UserError

# What each precision may cost against PyTorch fp32 with the same weights: mean KL (nats), top-1 agreement, perplexity
# change (per cent). Measured on SmolLM2-135M and on it compressed by a fifth: fp32 in ONNX 1e-11; f16 4e-6 and 7e-6;
# q8_0 4e-3 and 7e-3 with 95 and 94 % top-1 (rounding the weights alone gives 1.3e-3: llama.cpp rounds activations to
# 8 bits too); ONNX int8 9e-4 with 98 %, and 5e-3 with 94 % where activations are rounded as well (a8). Types of fewer bits:
# their rows say only that nothing is broken.
TOLERANCES = {
    "fp32": Tolerance(kl_mean=1e-6, top1=0.999, ppl_change_percent=0.1),
    "f32": Tolerance(kl_mean=1e-6, top1=0.999, ppl_change_percent=0.1),
    "fp16": Tolerance(kl_mean=1e-4, top1=0.99, ppl_change_percent=0.1),
    "f16": Tolerance(kl_mean=1e-4, top1=0.99, ppl_change_percent=0.1),
    "bf16": Tolerance(kl_mean=1e-3, top1=0.97, ppl_change_percent=0.5),
    "q8_0": Tolerance(kl_mean=1e-2, top1=0.93, ppl_change_percent=2.0),
    "int8": Tolerance(kl_mean=3e-3, top1=0.95, ppl_change_percent=1.0),
    "int8-a8": Tolerance(kl_mean=1e-2, top1=0.93, ppl_change_percent=2.0),
    "q6_k": Tolerance(kl_mean=3e-2, top1=0.9, ppl_change_percent=3.0),
    "q5_k": Tolerance(kl_mean=5e-2, top1=0.85, ppl_change_percent=6.0),
}
COARSE = Tolerance(kl_mean=0.3, top1=0.6, ppl_change_percent=30.0)  # any type of fewer bits
RANGES = {"kl_mean": math.inf, "top1": 1.0, "ppl_change_percent": math.inf}  # what a limit can be, at most


def tolerance_for(precision: str) -> Tolerance:
    """The row of a precision or GGUF type."""
    return TOLERANCES.get(precision, COARSE)


def limits(**given: float | None) -> Tolerance:
    """What a user asks for, None: nothing. Raises UserError for a limit that nothing could reach."""
    for name, value in given.items():
        if value is not None and not 0 <= value <= RANGES[name]:
            raise UserError(f"{name.replace('_', '-')} {value:g} is out of range: give 0 to {RANGES[name]:g}")
    return Tolerance(**given)


def tolerance_of(precision: str, asked: Tolerance, comparison: schema.Comparison) -> Tolerance:
    """A precision's tolerance with what was asked for instead; a compression's cost has no other limits than those."""
    stated = Tolerance() if comparison == "compression cost" else tolerance_for(precision)
    return stated.model_copy(update=asked.model_dump(exclude_none=True))


def judge(
    comparisons: list[Comparison],
    tolerance: Tolerance,
    reference: str,
    reference_runtime: str,
    comparison: schema.Comparison = "export parity",
) -> Parity:
    """Summarise the windows' comparisons and hold them against a tolerance."""
    kl = np.concatenate([c.kl for c in comparisons])
    nonfinite = sum(c.nonfinite for c in comparisons)
    finite = kl[~np.isnan(kl)]
    whole = {} if nonfinite or not len(finite) else _figures(comparisons, finite)
    figures: dict[str, float | None] = {name: whole.get(name) for name in FIGURES}
    changes = [_mean(c.nll_candidate - c.nll_reference) for c in comparisons]
    windows: dict[str, list[float | None]] = {
        "window_kl": [_mean(c.kl) for c in comparisons],
        "window_top1": [None if c.nonfinite else float(c.same_top1.mean()) for c in comparisons],
        "window_ppl_change_percent": [None if change is None else _percent(change) for change in changes],
    }
    reasons = _reasons(figures, windows, nonfinite, tolerance)
    return Parity(
        comparison=comparison,
        reference=reference,
        reference_runtime=reference_runtime,
        **figures,  # type: ignore[arg-type]
        **windows,  # type: ignore[arg-type]
        nonfinite=nonfinite,
        tolerance=tolerance,
        passed=not reasons,
        reasons=reasons,
    )


FIGURES = (
    "kl_mean",
    "kl_median",
    "kl_p99",
    "kl_max",
    "top1",
    "top5",
    "max_logit_difference",
    "ppl_change_percent",
    "ppl_change_standard_error",
)


def _figures(comparisons: list[Comparison], kl: Floats) -> dict[str, float]:
    mean, error = mean_and_error([c.nll_candidate - c.nll_reference for c in comparisons])
    return {
        "kl_mean": float(kl.mean()),
        "kl_median": float(np.median(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_max": float(kl.max()),
        "top1": float(np.mean(np.concatenate([c.same_top1 for c in comparisons]))),
        "top5": float(np.mean(np.concatenate([c.top5 for c in comparisons]))),
        "max_logit_difference": float(max(c.logit_difference.max() for c in comparisons)),
        "ppl_change_percent": _percent(mean),
        "ppl_change_standard_error": 100 * math.exp(min(mean, 700.0)) * error,
    }


def _percent(nll_difference: float) -> float:
    return 100 * math.expm1(min(nll_difference, 700.0))


def _mean(values: Floats) -> float | None:
    return None if np.isnan(values).any() else float(values.mean())


def _reasons(
    figures: dict[str, float | None], windows: dict[str, list[float | None]], nonfinite: int, tolerance: Tolerance
) -> list[str]:
    if nonfinite:
        first = next(i for i, value in enumerate(windows["window_kl"]) if value is None)
        return [f"{nonfinite} positions have non-finite logits, the first in window {first + 1}"]
    kl, top1, change = figures["kl_mean"], figures["top1"], figures["ppl_change_percent"]
    error = figures["ppl_change_standard_error"]
    assert kl is not None and top1 is not None and change is not None and error is not None
    found = []
    if tolerance.kl_mean is not None and kl > (limit := tolerance.kl_mean):
        where = _first([value is not None and value > limit for value in windows["window_kl"]])
        found.append(f"mean KL {kl:.2g} > {limit:.2g} (first in window {where})")
    if tolerance.top1 is not None and top1 < (limit := tolerance.top1):
        where = _first([value is not None and value < limit for value in windows["window_top1"]])
        found.append(f"top-1 agreement {top1:.2%} < {limit:.2%} (first in window {where})")
    if tolerance.ppl_change_percent is not None and abs(change) > (limit := tolerance.ppl_change_percent):
        where = _first([value is not None and abs(value) > limit for value in windows["window_ppl_change_percent"]])
        changed = f"perplexity changed by {change:+.3g} ± {error:.2g} %"
        found.append(f"{changed}, more than {limit:g} % (first in window {where})")
    return found


def _first(beyond: list[bool]) -> int:
    """Number of the first window that is beyond a limit, from 1: where the mean is, one of them is (but for rounding)."""
    return beyond.index(True) + 1 if any(beyond) else 1
