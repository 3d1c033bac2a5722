"""Perplexities compared window by window: what the windows have in common is no error of the difference."""

import math

import numpy as np

from runtime_checks.perplexity import mean_and_error
from runtime_checks.schema import Perplexity
from runtime_checks.study_schema import Estimate


def paired_rise(dense: Perplexity, found: Perplexity) -> Estimate:
    """Mean over windows of NLL - the dense model's NLL, nats, and the standard error of that mean."""
    pairs = zip(found.window_nll, dense.window_nll, strict=True)
    each = [np.array([now - before]) for now, before in pairs if now is not None and before is not None]
    mean, error = mean_and_error(each)
    return Estimate(value=mean, standard_error=error if len(each) > 1 else None)


def exponential(rise: Estimate) -> Estimate:
    """exp of an estimate, its error by the delta method."""
    value = math.exp(min(rise.value, 700.0))  # exp overflows at 709
    return Estimate(value=value, standard_error=None if rise.standard_error is None else value * rise.standard_error)
