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
# Mean KL(in one go || by the cache) at most, nats: what kernels for one token and for many round differently. Of SmolLM2:
# 1e-11 in fp32, 4e-6 in F16, 4e-3 where activations are rounded too (int4), 7e-3 in Q4_K_M; off by one in int4: 0.1.
LIMITS = {**dict.fromkeys(("fp32", "f32", "int8"), 1e-6), **dict.fromkeys(("fp16", "f16", "bf16"), 1e-3)}
ROUNDED = 2e-2
SHARE = 0.05  # of what a type's rounding costs the model: where that is much, so is another order of sums


def limit_of(precision: str, cost: float) -> float:
    """Of a precision or type whose mean KL to the reference is `cost`."""
    limit = LIMITS.get(precision, ROUNDED)
    return limit if limit == min(LIMITS.values()) else max(limit, SHARE * cost)


def compare_cache(child: Child, protocol: Protocol, scratch: Path, limit: float) -> list[Finding]:
    """A finding where the two differ by more than the limit, nats. Raises CheckError."""
    ids = protocol.ids[0][:POSITIONS]
    first = min(AT_ONCE, len(ids) // 2)
    whole, stepwise = scratch / "whole.f32", scratch / "steps.f32"
    vocab = child.ask("logits", ids=ids.tolist(), out=str(whole))["shape"][1]
    child.ask("steps", ids=ids.tolist(), first=first, out=str(stepwise))
    kl = compare_window(read_logits(whole, vocab), read_logits(stepwise, vocab), ids).kl[first:]
    if not len(kl) or kl.mean() <= limit:
        return []
    worst = first + int(np.nan_to_num(kl, nan=np.inf).argmax())
    detail = (
        f"read token by token with a KV cache, from position {first} on the text gives other logits than in one go: mean "
        f"KL {kl.mean():.2g} > {limit:.2g}, most at position {worst}; the cache or its positions are off"
    )
    return [Finding(what="cache", where=child.row.label, detail=detail)]
