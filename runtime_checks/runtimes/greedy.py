"""The one greedy loop of the runtimes that have none of their own, so that all of them stop by the same rule."""

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
