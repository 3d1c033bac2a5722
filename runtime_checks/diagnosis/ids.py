"""The ids that a candidate makes of the text by itself, beside the reference tokenizer's, with what either puts around them.

The check feeds every runtime the same ids, so a BOS on one side only would not show in any logit. A runtime without a
tokenizer that puts one (onnxruntime-genai's encodes the text alone) is judged by the tokenizer files of its folder.
"""

from typing import Any

from runtime_checks.schema import Finding

SAMPLE = 2000  # characters of the text
AROUND = 2  # ids that a tokenizer may put before or after a text


def compare_ids(found: list[int], expected: list[int], tokenizer: Any, where: str) -> list[Finding]:
    """What differs; `tokenizer` is the reference's."""
    if found == expected:
        return []
    for place, own, other in _around(found, expected):
        ours, theirs = (_named(ids, tokenizer) for ids in (own, other))
        detail = f"{ours} is put {place} the text, the reference puts {theirs}"
        return [Finding(what="ids", where=where, detail=detail)]
    shorter = min(len(found), len(expected))
    at = next((i for i in range(shorter) if found[i] != expected[i]), shorter)
    parts = [tokenizer.decode(ids[at : at + 3]) for ids in (found, expected)]
    detail = f"the text is cut otherwise from token {at} on: {parts[0]!r} where the reference has {parts[1]!r}"
    return [Finding(what="ids", where=where, detail=detail)]


def _around(found: list[int], expected: list[int]) -> list[tuple[str, list[int], list[int]]]:
    """(before or after, the candidate's ids there, the reference's) where that is all in which they differ."""
    for i in range(AROUND + 1):
        for j in range(AROUND + 1):
            if found[i:] == expected[j:]:
                return [("before", found[:i], expected[:j])]
            if found[: len(found) - i] == expected[: len(expected) - j]:
                return [("after", found[len(found) - i :], expected[len(expected) - j :])]
    return []


def _named(ids: list[int], tokenizer: Any) -> str:
    if not ids:
        return "nothing"
    special = {tokenizer.bos_token_id: "a BOS", tokenizer.eos_token_id: "an EOS"}
    return " and ".join(f"{special.get(token, 'a token')} (id {token})" for token in ids)
