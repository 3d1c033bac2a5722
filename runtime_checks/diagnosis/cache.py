"""A runtime's logits of a text that it reads token by token, with its cache, beside those of the same text in one go.

The windows of the check are computed in one go, from an empty context: a cache that is off by one shows here alone.
"""

from pathlib import Path

import numpy as np

from runtime_checks.metrics import compare_window
from runtime_checks.process import Child
from runtime_checks.protocol import Protocol
from runtime_checks.reference import read_logits
from runtime_checks.schema import Finding

POSITIONS, AT_ONCE = 32, 4  # tokens that are read, and of them in the first step
# KL(in one go || by the cache) of a position at most, nats: what kernels for one token and for many round differently. Of
# rounded types it is a share of what their rounding costs, where that is more.
EXACT, ROUNDED, SHARE = 1e-6, 1e-3, 0.05
EXACT_TYPES = ("fp32", "f32")


def compare_cache(child: Child, protocol: Protocol, scratch: Path, limit: float) -> list[Finding]:
    """A finding where the two differ by more than the limit, nats. Raises CheckError."""
    ids = protocol.ids[0][:POSITIONS]
    whole, stepwise = scratch / "whole.f32", scratch / "steps.f32"
    vocab = child.ask("logits", ids=ids.tolist(), out=str(whole))["shape"][1]
    child.ask("steps", ids=ids.tolist(), first=min(AT_ONCE, len(ids) - 1), out=str(stepwise))
    kl = compare_window(read_logits(whole, vocab), read_logits(stepwise, vocab), ids).kl
    wrong = np.flatnonzero(~(kl <= limit))  # NaN is wrong too
    if not len(wrong):
        return []
    first = int(wrong[0])
    detail = (
        f"with a KV cache {len(wrong)} of {len(kl)} positions differ from the same text read in one go, from position "
        f"{first} on (there by KL {kl[first]:.2g}, at most {limit:g} is rounding): the cache or its positions are off"
    )
    return [Finding(what="cache", where=child.row.name, detail=detail)]
