"""Token sequences that begin alike, merged into trees, so that a model runs every shared beginning once.

A node is a token after a particular beginning. It attends to its ancestors and itself, and its position is its depth: what
a model computes there is what it computes in the sequence alone. The choices of a question share its text, twin questions
share half of theirs: 4.75e5 tokens of ARC-Easy, PIQA and WinoGrande in SmolLM2's vocabulary become 2.1e5 nodes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

SHARED = 6  # tokens: a shorter common beginning does not pay for attention over a larger tree
NODES = 256  # of a tree, unless a single sequence is longer: attention's cost per token grows with it


@dataclass(frozen=True)
class Request:
    """Score `targets` (ids) after a context: `inputs` is the context and all targets but the last."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def first(self) -> int:
        """Index of the input that predicts the first target."""
        return len(self.inputs) - len(self.targets)


@dataclass
class Tree:
    """Nodes in an order in which parents come first. `scored`: (node, target id, index of the request)."""

    ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # -1: a root
    depths: list[int] = field(default_factory=list)
    scored: list[tuple[int, int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, token: int, parent: int) -> int:
        """A new node; returns its index."""
        self.ids.append(token)
        self.parents.append(parent)
        self.depths.append(0 if parent < 0 else self.depths[parent] + 1)
        return len(self.ids) - 1

    def visible(self) -> npt.NDArray[np.bool_]:
        """(nodes, nodes): whether the row's node attends to the column's."""
        seen = np.eye(len(self), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def plant(requests: Sequence[Request], shared: int = SHARED, nodes: int = NODES) -> list[Tree]:
    """Trees that hold every request. Sorted requests stand beside those that they share most with."""
    trees: list[Tree] = []
    path: list[int] = []
    before: tuple[int, ...] = ()
    for index in sorted(range(len(requests)), key=lambda i: requests[i].inputs):
        request = requests[index]
        common = _common(before, request.inputs)
        if not trees or common < shared or len(trees[-1]) + len(request.inputs) - common > nodes:
            trees.append(Tree())
            common = 0
        tree = trees[-1]
        path = path[:common]
        for token in request.inputs[common:]:
            path.append(tree.add(token, path[-1] if path else -1))
        at = path[request.first :]
        tree.scored += [(node, target, index) for node, target in zip(at, request.targets, strict=True)]
        before = request.inputs
    return trees


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def batches(trees: Sequence[Tree], tokens: int) -> Iterator[list[Tree]]:
    """Trees of similar size together, so many that they take at most `tokens` when padded to the largest (at least one)."""
    batch: list[Tree] = []
    for tree in sorted(trees, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > tokens:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch
