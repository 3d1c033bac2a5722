"""Greedy continuations: is what a runtime writes what PyTorch writes?

Identical continuations pass. In fp32 nothing else does; a rounded type may part from PyTorch where its own rounding is
larger than what was at stake: the gap between PyTorch's two logits must be below the largest logit difference that the
parity check measured for that file.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime_checks.schema import Generation

EXACT = {"fp32"}
PROMPT = "The capital of France is Paris. The capital of Italy is"


@dataclass(frozen=True)
class Continuation:
    """Ids that a runtime wrote; for the reference also the logits (len(ids), vocab) that chose them."""

    ids: list[int]
    logits: npt.NDArray[np.float32] | None = None


def first_difference(reference: list[int], candidate: list[int]) -> int | None:
    """Position where two continuations part, None when they are the same."""
    shorter = min(len(reference), len(candidate))
    at = next((i for i in range(shorter) if reference[i] != candidate[i]), shorter)
    return None if at == len(reference) == len(candidate) else at


def compare(
    prompt: str, text: str, candidate: list[int], reference: Continuation | None, precision: str, allowed: float | None
) -> Generation:
    """Judge a candidate's continuation; `allowed` is the largest logit difference measured (None: not measured)."""

    def result(passed: bool | None, note: str, at: int | None = None, gap: float | None = None) -> Generation:
        limit = None if precision in EXACT else allowed
        return Generation(
            prompt=prompt, text=text, ids=candidate, first_difference=at, logit_gap=gap, allowed_gap=limit,
            passed=passed, note=note,
        )  # fmt: skip

    if reference is None:
        return result(None, "not compared")
    at = first_difference(reference.ids, candidate)
    if at is None:
        return result(True, f"the same {len(candidate)} tokens as PyTorch")
    if reference.logits is None or at >= min(len(reference.ids), len(candidate)):
        return result(False, f"parts from PyTorch at token {at + 1}: one of the two ends there", at)
    row = reference.logits[at]
    gap = float(row[reference.ids[at]] - row[candidate[at]])
    note = f"parts from PyTorch at token {at + 1}, where the two tokens' logits are {gap:.3g} apart"
    if precision in EXACT:
        return result(False, note + f"; {precision} must be the same", at, gap)
    if allowed is None:
        return result(None, note, at, gap)
    return result(gap < allowed, note + f"; {precision} moves logits by up to {allowed:.3g}", at, gap)
