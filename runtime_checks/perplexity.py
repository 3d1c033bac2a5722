"""Perplexity with its standard error.

PPL = exp(m), m the mean negative log-likelihood of all scored tokens (nats). The windows have equally many tokens, so m
is also the mean of the windows' means, and its standard error is their sample standard deviation / sqrt(windows): tokens
of one window are correlated, windows hardly. With one window it is the tokens' standard deviation / sqrt(tokens).
By the delta method the perplexity's standard error is PPL times that of m.
"""

import math

import numpy as np

from runtime_checks.metrics import Floats
from runtime_checks.schema import Perplexity


def mean_and_error(windows: list[Floats]) -> tuple[float, float]:
    """Mean of equally long windows of values, and its standard error as above; 0 for a single value."""
    spread = np.array([w.mean() for w in windows]) if len(windows) > 1 else windows[0]
    error = float(spread.std(ddof=1)) / math.sqrt(len(spread)) if len(spread) > 1 else 0.0
    return float(np.mean([w.mean() for w in windows])), error


def perplexity(windows: list[Floats]) -> Perplexity:
    """From the NLL of each window's scored tokens; NaN marks a position whose logits were not finite."""
    nonfinite = int(sum(np.isnan(w).sum() for w in windows))
    value = error = None
    if nonfinite == 0:
        mean, mean_error = mean_and_error(windows)
        value = math.exp(min(mean, 700.0))  # exp overflows at 709; a finite logit difference can exceed that
        error = value * mean_error
    return Perplexity(
        value=value,
        standard_error=error,
        window_nll=[None if np.isnan(w).any() else float(w.mean()) for w in windows],
        tokens=sum(len(w) for w in windows),
        nonfinite=nonfinite,
    )
