"""Log-likelihoods of continuations in PyTorch: the decoder over trees of tokens, the output head only where it is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from runtime_checks.metrics import Floats
from runtime_checks.task_trees import Request, Tree, batches, plant
from sola_edge.progress import track
from sola_edge.runner import soft_capped

BATCH_TOKENS = 1024
SLIDING = "sliding_attention"  # transformers' name of a kind of layer
HEAD_ROWS = 256  # positions whose logits are in memory at once


@dataclass(frozen=True)
class Scores:
    """`values[i]`: log-likelihood of request i's targets, nats; NaN or infinite where a logit was not finite."""

    values: Floats
    nonfinite: int  # of the scored tokens
    scored: int  # tokens
    positions: int  # that the head was computed at
    tokens: int  # that the decoder was computed at, padding included


class NothingToScore(Exception):
    """No ids are left of the continuation, or there are none before it. `index` is the pair's."""

    def __init__(self, index: int) -> None:
        super().__init__(f"nothing to score in pair {index}")
        self.index = index


def encode(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """(context, continuation) as ids, split as lm-evaluation-harness does; no BOS.

    Both are encoded together and cut at the length of the encoded context, whose trailing spaces are the continuation's.
    Raises NothingToScore.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    heads = tokenizer(contexts, add_special_tokens=False, verbose=False)["input_ids"]
    wholes = tokenizer([a + b for a, b in pairs], add_special_tokens=False, verbose=False)["input_ids"]
    requests = []
    for index, (head, whole) in enumerate(zip(heads, wholes, strict=True)):
        targets = whole[len(head) :]
        if not head or not targets:
            raise NothingToScore(index)
        requests.append(Request((*head, *targets[:-1]), tuple(targets)))
    return requests


@torch.inference_mode()
def log_likelihoods(
    model: Any, requests: Sequence[Request], description: str = "", batch_tokens: int = BATCH_TOKENS
) -> Scores:
    """Score all requests with a transformers causal language model on the CPU."""
    values = np.zeros(len(requests))
    nonfinite = positions = tokens = 0
    for batch in track(list(batches(plant(requests), batch_tokens)), description):
        hidden = _hidden(model, batch)
        width = hidden.shape[1]
        where, targets, owners = (np.array(column) for column in zip(*_scored(batch, width), strict=True))
        rows, which = np.unique(where, return_inverse=True)
        found = _at(model, hidden.flatten(0, 1)[torch.from_numpy(rows)], which, targets)
        np.add.at(values, owners, found)
        nonfinite += int((~np.isfinite(found)).sum())
        positions += len(rows)
        tokens += len(batch) * width
    return Scores(values, nonfinite, sum(len(r.targets) for r in requests), positions, tokens)


def _scored(batch: list[Tree], width: int) -> list[tuple[int, int, int]]:
    """(row of the flattened batch, target id, request) of every scored token."""
    return [(i * width + node, target, owner) for i, tree in enumerate(batch) for node, target, owner in tree.scored]


def _hidden(model: Any, batch: list[Tree]) -> torch.Tensor:
    """What the decoder gives for trees padded at their ends: (trees, largest tree, hidden)."""
    width = max(map(len, batch))
    ids, depths = torch.zeros((2, len(batch), width), dtype=torch.int64)
    seen = torch.eye(width, dtype=torch.bool).repeat(len(batch), 1, 1)
    for i, tree in enumerate(batch):
        size = len(tree)
        ids[i, :size], depths[i, :size] = torch.tensor(tree.ids), torch.tensor(tree.depths)
        seen[i, :size, :size] = torch.from_numpy(tree.visible())
    mask = _mask(model, seen, depths)
    output = model.get_decoder()(input_ids=ids, position_ids=depths, attention_mask=mask, use_cache=False)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


def _mask(model: Any, seen: torch.Tensor, depths: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
    """What transformers adds to the attention scores, (trees, 1, nodes, nodes): one mask, or one for each kind of layer.

    seen (trees, nodes, nodes): ancestors; those that a sliding window leaves out are taken away here.
    """
    kinds, window = set(getattr(model.config, "layer_types", None) or ()), getattr(model.config, "sliding_window", None)
    near = seen & (depths[:, :, None] - depths[:, None, :] < window) if window else seen
    if len(kinds) > 1:
        return {kind: _added(near if kind == SLIDING else seen, model.dtype) for kind in kinds}
    return _added(near if kinds <= {SLIDING} else seen, model.dtype)


def _added(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _at(model: Any, hidden: torch.Tensor, which: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> Floats:
    """Log-probability of each target at row `which` of hidden (rows, hidden size): (targets,) float64."""
    head = model.get_output_embeddings()
    found = np.empty(len(targets))
    for start in range(0, len(hidden), HEAD_ROWS):
        logits = soft_capped(head(hidden[start : start + HEAD_ROWS]).float(), model.config)
        here = np.flatnonzero((which >= start) & (which < start + HEAD_ROWS))
        picked = logits[torch.from_numpy(which[here] - start), torch.from_numpy(targets[here])]
        total = torch.logsumexp(logits, dim=-1)[torch.from_numpy(which[here] - start)]
        found[here] = (picked - total).double().numpy()
    return found
