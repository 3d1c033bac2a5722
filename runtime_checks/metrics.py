"""What two sets of logits say: negative log-likelihood and KL divergence, per position, in float64.

Everything takes the logits of one window, (n, vocab) float32, in which row i predicts token i + 1; so the last row
scores nothing and the first token is never scored. Units: nats. Only numpy is imported: the child processes use this.
Rows are worked on in blocks that fit the processor's cache.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
ROWS = 4
TOP = 5


def log_softmax(logits: npt.NDArray[np.floating]) -> Floats:
    """Row-wise log-softmax in float64, (n, vocab)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def window_nll(logits: npt.NDArray[np.float32], ids: npt.NDArray[np.integer]) -> Floats:
    """Negative log-likelihood of ids[1:], (n - 1,) nats; NaN where the position's logits are not all finite."""
    n = len(ids) - 1
    nll = np.full(n, np.nan)
    for start in range(0, n, ROWS):
        rows = np.asarray(logits[start : min(start + ROWS, n)])
        good = np.isfinite(rows).all(axis=1)
        if good.any():
            positions = start + np.flatnonzero(good)
            log_p = log_softmax(rows[good])
            nll[positions] = -log_p[np.arange(len(positions)), ids[positions + 1]]
    return nll


@dataclass(frozen=True)
class Comparison:
    """Reference against candidate on one window: arrays of (n - 1,); NaN where either has a non-finite logit."""

    kl: Floats  # KL(reference || candidate), nats
    same_top1: npt.NDArray[np.bool_]
    top5: Floats  # share of the reference's five most likely tokens that are among the candidate's five
    logit_difference: Floats  # largest |reference - candidate| of a position
    nll_reference: Floats
    nll_candidate: Floats

    @property
    def nonfinite(self) -> int:
        """Positions that could not be compared."""
        return int(np.isnan(self.kl).sum())


def compare_window(
    reference: npt.NDArray[np.float32], candidate: npt.NDArray[np.float32], ids: npt.NDArray[np.integer]
) -> Comparison:
    """Compare the logits of one window, both (n, vocab), where ids is (n,)."""
    n = len(ids) - 1
    kl, delta, nll_r, nll_c, top5 = (np.full(n, np.nan) for _ in range(5))
    same = np.zeros(n, dtype=bool)
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        rows_r, rows_c = np.asarray(reference[start:stop]), np.asarray(candidate[start:stop])
        good = np.isfinite(rows_r).all(axis=1) & np.isfinite(rows_c).all(axis=1)
        if not good.any():
            continue
        at, rows_r, rows_c = start + np.flatnonzero(good), rows_r[good], rows_c[good]
        log_r, log_c = log_softmax(rows_r), log_softmax(rows_c)
        targets = (np.arange(len(at)), ids[at + 1])
        nll_r[at], nll_c[at] = -log_r[targets], -log_c[targets]
        difference = log_r - log_c
        # A true divergence is never negative; rounding of the order of 1e-16 is cut off.
        kl[at] = np.maximum(np.einsum("ij,ij->i", np.exp(log_r), difference), 0.0)
        same[at] = rows_r.argmax(axis=1) == rows_c.argmax(axis=1)
        top5[at] = _shared(_most_likely(rows_r), _most_likely(rows_c))
        delta[at] = np.abs(rows_r - rows_c).max(axis=1)
    return Comparison(kl, same, top5, delta, nll_r, nll_c)


def _most_likely(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
    """The `TOP` most likely tokens of each row, in any order: (rows, TOP), or all of a smaller vocabulary."""
    count = min(TOP, logits.shape[1])
    return np.argpartition(logits, -count, axis=1)[:, -count:]


def _shared(a: npt.NDArray[np.intp], b: npt.NDArray[np.intp]) -> Floats:
    """Share of each row's tokens that the other has in that row too."""
    found: Floats = (a[:, :, None] == b[:, None, :]).any(axis=2).mean(axis=1)
    return found
