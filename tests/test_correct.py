"""The sequential correction: what two halves of the text confirm is fitted, noise is not."""

import pytest
import torch

from sola_edge.correct import RIDGES, Problem, corrected
from sola_edge.sequential import HEAVIEST, winsorized
from sola_edge.view import Correction, Moments

N_OUT, N_IN, TOKENS = 6, 12, 400


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(x_hat: torch.Tensor, x: torch.Tensor, drift: torch.Tensor | None = None) -> Correction:
    """Two halves of the tokens (rows)."""
    found = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        parts = [x_hat[half].T @ x_hat[half], x[half].T @ x_hat[half]]
        gone = None if drift is None else drift[half].T @ x_hat[half] / len(x)
        found.append(Moments(parts[0] / len(x), parts[1] / len(x), gone))
    return Correction((found[0], found[1]))


def test_without_correction_nothing_changes() -> None:
    start = normal(N_OUT, N_IN, seed=0)
    assert corrected([Problem(start, start)], None)[0] is start


def test_inputs_that_did_not_change_change_nothing() -> None:
    x, start = normal(TOKENS, N_IN, seed=1).float(), normal(N_OUT, N_IN, seed=0)
    s = (x.T @ x).double() / TOKENS
    rounded = s + 1e-8 * normal(N_IN, N_IN, seed=2)
    half = Moments(s / 2, rounded / 2, None)
    assert corrected([Problem(start, start)], Correction((half, half)))[0] is start


def test_moments_of_halves_add_up() -> None:
    x_hat, x, drift = normal(TOKENS, 3, seed=1), normal(TOKENS, 4, seed=2), normal(TOKENS, 2, seed=3)
    found = moments(x_hat, x, drift)
    torch.testing.assert_close(found.s, x_hat.T @ x_hat / TOKENS)
    start, original = normal(2, 3, seed=4), normal(2, 4, seed=5)
    expected = (x @ original.T + drift - x_hat @ start.T).T @ x_hat / TOKENS
    one, other = (half.residual(start, original) for half in found.halves)
    torch.testing.assert_close(one + other, expected)


@pytest.mark.parametrize("weighed", [False, True])
def test_what_the_inputs_explain_is_fitted(weighed: bool) -> None:
    """x = x̂ Mᵀ exactly: W M on x̂ is W on x."""
    x_hat, mixing, weight = normal(TOKENS, N_IN, seed=1), normal(N_IN, N_IN, seed=2), normal(N_OUT, N_IN, seed=3)
    g = normal(N_OUT, N_OUT, seed=4)
    problems = [Problem(weight, weight, g @ g.T if weighed else None), Problem(weight[:2], weight[:2])]
    found, part = corrected(problems, moments(x_hat, x_hat @ mixing.T))
    torch.testing.assert_close(part, found[:2])
    change, wanted = found - weight, weight @ mixing - weight
    assert (change - wanted).norm() < 3 * RIDGES[0] * wanted.norm()


def test_drift_is_made_up_for() -> None:
    x_hat, lack, weight = normal(TOKENS, N_IN, seed=1), normal(N_OUT, N_IN, seed=2), normal(N_OUT, N_IN, seed=3)
    (found,) = corrected([Problem(weight, weight)], moments(x_hat, x_hat, x_hat @ lack.T))
    assert (found - weight - lack).norm() < 3 * RIDGES[0] * lack.norm()


def test_noise_is_hardly_fitted() -> None:
    """What the inputs do not explain: least squares would follow it, and would be wrong on other tokens by as much."""
    weight = normal(N_OUT, N_IN, seed=3)
    worse = plain = 0.0
    for seed in range(10, 40):
        x_hat, noise = normal(60, N_IN, seed=seed), normal(60, N_OUT, seed=seed + 100)
        plain += float(torch.linalg.lstsq(x_hat, noise).solution.square().sum())
        (found,) = corrected([Problem(weight, weight)], moments(x_hat, x_hat, noise))
        worse += float((found - weight).square().sum())
    assert worse < 0.2 * plain


def test_token_weights_have_mean_one_and_a_ceiling() -> None:
    squares = torch.cat([normal(1000, seed=1).square(), torch.tensor([1e6, 1e9, 0.0], dtype=torch.float64)])
    weights = winsorized(squares)
    assert weights.mean() == pytest.approx(1, rel=1e-5)
    assert weights.max() == HEAVIEST and weights[1002] == 0
    assert torch.equal(winsorized(torch.zeros(3)), torch.zeros(3))
