"""The greedy loops of the runtimes that have none of their own, so that all of them stop, and are timed, by the same rule."""

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Step = Callable[[list[int]], npt.NDArray[np.float32]]  # ids appended to the context → logits (vocab,) of the last one


def greedy(step: Step, ids: list[int], count: int, eos: list[int]) -> list[int]:
    """The most likely token, `count` times or up to and including one of `eos`, from an empty context."""
    found: list[int] = []
    following = ids
    while len(found) < count and not (found and found[-1] in eos):
        found.append(int(step(following).argmax()))
        following = found[-1:]
    return found


Rows = npt.NDArray[np.int64]
BatchStep = Callable[
    [Rows], npt.NDArray[np.float32]
]  # ids (sequences, n) appended → logits (sequences, vocab) of the last


Timed = tuple[float, float, list[list[int]]]


def timed_batch(step: BatchStep, ids: list[int], count: int, sequences: int) -> Timed:
    """Seconds until every sequence has its first new token, from an empty context; of `count` steps from there; the new tokens
    of each sequence, one more than there are steps.
    """
    rows = np.tile(np.array(ids, dtype=np.int64), (sequences, 1))
    start = time.perf_counter()
    chosen = [step(rows).argmax(axis=1)]
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(count):
        chosen.append(step(chosen[-1][:, None]).argmax(axis=1))
    return first, time.perf_counter() - start, np.stack(chosen, axis=1).tolist()
