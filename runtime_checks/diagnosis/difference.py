"""How one matrix differs from another, in words: scaled, rows in another order, a few values, or by how much.

Matrices are (rows, columns) float32; a vector is one row. Limits say what rounding explains: value is a share of a value and
of its row's root mean square (RMS), noise of a row's norm, slope how far the matrix may be scaled.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]

# One unit in the last place of a type, as a share of a value; a float32 may have been computed in another order.
STEPS = {"F32": 2.0**-16, "F16": 2.0**-10, "BF16": 2.0**-7}
SLOPES = {"F32": 1e-5, "F16": 1e-3, "BF16": 2e-3}
# Rounding errors of types of so many bits, as a share of a row's norm: of Gaussian rows, with room for heavier tails.
NOISE = {8: 0.01, 6: 0.03, 5: 0.06, 4: 0.12, 3: 0.25, 2: 0.4, 1: 0.6}
# The same of what both sides rounded by one rule, one of them from values that had been in 16 bits before: at worst 1.9 % of a
# row in Q4_1, 1.6 in Q4_0, 0.9 in Q5_0, 0.26 in Q8_0 (a quarter of the limit is written here, see `_differing`).
AGAIN = {8: 0.0025, 5: 0.006, 4: 0.011}
ROUNDED_SLOPE = 5e-3  # of what was rounded to blocks by the same rule
FEW = 3  # values that are named one by one
MANY = 2048  # rows beyond which their order is not looked for
ALIKE = 0.9  # cosine from which on a row is another's
UNRELATED = 0.9  # share of a row's norm; of two rows that have nothing in common it is 1.4


@dataclass(frozen=True)
class Limits:
    """What rounding explains; see above. Types of blocks have no `value`, exact ones no `noise`."""

    value: float
    noise: float
    slope: float


def limits_of(kind: str, reproducible: bool) -> Limits:
    """Of a tensor type (F32, Q4_0, INT8, …); `reproducible`: both matrices were rounded by the same rule."""
    if kind in STEPS:
        return Limits(STEPS[kind], 0.0, SLOPES[kind])
    bits = bits_of(kind)
    if reproducible:
        return Limits(0.0, AGAIN[bits], ROUNDED_SLOPE)
    return Limits(0.0, NOISE[bits], max(NOISE[bits] / 2, ROUNDED_SLOPE))


def bits_of(kind: str) -> int:
    """Bits of a value by the name of its type."""
    return int(next(letter for letter in kind if letter.isdigit()))


def difference(found: Matrix, expected: Matrix, limits: Limits) -> str | None:
    """What happened to `expected` that it became `found`, None where rounding explains it."""
    if found.shape != expected.shape:
        return f"has shape {found.shape}, the checkpoint's {expected.shape}"
    found, expected = (np.atleast_2d(values) for values in (found, expected))
    if np.array_equal(found, expected):
        return None
    bad = int((~np.isfinite(found)).sum())
    if bad:
        return f"{bad} values are not finite"
    rows = _differing(found, expected, limits)
    if not len(rows):
        return None
    f, e = found[rows], expected[rows]
    told = _few(f, e, rows, limits) or _scaled(f, e, limits) or _reordered(f, e, rows, "row")
    where = _where(rows, len(found))
    if told is None:
        columns = np.flatnonzero(
            np.linalg.norm(f - e, axis=0) > max(4 * limits.noise, 1e-3) * np.linalg.norm(e, axis=0)
        )
        told = _reordered(f.T[columns], e.T[columns], columns, "column")
        told = told or f"differs by {_ratio(f - e, e):.2g} of its norm"
    return told if "each other" in told or " values" in told else f"{told}{where}"


def _differing(found: Matrix, expected: Matrix, limits: Limits) -> Rows:
    """Rows that differ by more than rounding; all of them where only the whole does."""
    apart = np.abs(found - expected)
    size = np.linalg.norm(expected, axis=1)
    if limits.value:
        rms = size / np.sqrt(expected.shape[1])
        beyond = (apart > limits.value * (np.abs(expected) + rms[:, None])).any(axis=1)
    else:
        beyond = np.linalg.norm(apart, axis=1) > min(4 * limits.noise, UNRELATED) * size
    whole = abs(_slope(found, expected) - 1) > limits.slope
    if limits.noise and _ratio(apart, expected) > min(2 * limits.noise, UNRELATED):
        whole = True
    all_rows = len(found) == 1 or (whole and beyond.mean() > 0.5) or not beyond.any()
    return np.arange(len(found)) if whole and all_rows else np.flatnonzero(beyond)


def _slope(found: Matrix, expected: Matrix) -> float:
    """The s with which s × expected is nearest to found; 1 of nothing."""
    size = float(np.vdot(expected, expected))
    return float(np.vdot(found, expected)) / size if size else 1.0


def _ratio(error: Matrix, expected: Matrix) -> float:
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(error)) / size if size else float("inf") if np.any(error) else 0.0


def _few(found: Matrix, expected: Matrix, rows: Rows, limits: Limits) -> str | None:
    """Single values, of types that are exact."""
    places = np.argwhere(np.abs(found - expected) > limits.value * np.abs(expected))
    if not limits.value or not 0 < len(places) <= FEW:
        return None
    row, column = (int(i) for i in places[0])
    values = f"{found[row, column]:.6g} where the checkpoint has {expected[row, column]:.6g}"
    return f"{len(places)} of its values differ{'' if len(places) > 1 else 's'}: row {rows[row]}, column {column} is {values}"


def _scaled(found: Matrix, expected: Matrix, limits: Limits) -> str | None:
    slope = _slope(found, expected)
    rest = _ratio(found - slope * expected, expected)
    if abs(slope - 1) <= limits.slope or rest > max(2e-3, 2 * limits.noise):
        return None
    return f"is {slope:.4g} times the checkpoint's"


def _reordered(found: Matrix, expected: Matrix, places: Rows, word: str) -> str | None:
    """Rows that are other rows; `places` are their numbers."""
    if not 2 <= len(places) <= MANY:
        return None
    cosines = _unit(found) @ _unit(expected).T
    best = cosines.argmax(axis=1)
    moved = cosines.max(axis=1).min() > ALIKE and sorted(best) == list(range(len(places)))
    if not moved or (best == np.arange(len(places))).any():
        return None
    if len(places) == 2:
        return f"{word}s {places[0]} and {places[1]} are each other's"
    return f"{len(places)} {word}s are in another order ({word} {places[0]} is the checkpoint's {places[best[0]]})"


def _unit(rows: Matrix) -> Matrix:
    unit: Matrix = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return unit


def _where(rows: Rows, total: int) -> str:
    if total == 1:
        return ""
    if len(rows) == total:
        return f" in all {total} rows"
    return f" in row {rows[0]}" if len(rows) == 1 else f" in {len(rows)} of {total} rows, the first of them {rows[0]}"
