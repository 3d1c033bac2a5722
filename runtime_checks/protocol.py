"""One protocol for all runtimes: which token ids are fed and which of them are scored.

The text is read with its line endings as they are, turned into ids once by the checkpoint's own tokenizer without
special tokens (no BOS: transformers would add one for some models where llama.cpp does not), and cut into
non-overlapping windows of `context` ids; what is left at the end is dropped. Every runtime is given these ids, each
window from an empty context. Every token of a window but its first is scored.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime_checks.schema import ProtocolRecord
from sola_edge.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """Ids (windows, context) int64, and what identifies them. `stride` = context: windows do not overlap."""

    text: str
    text_sha256: str
    ids_sha256: str  # of the ids used, as little-endian int64
    context: int
    windows: int
    stride: int
    tokens_scored: int
    bos: bool = False
    ids: npt.NDArray[np.int64] = field(repr=False, default_factory=lambda: np.zeros((0, 0), np.int64), compare=False)

    def record(self) -> ProtocolRecord:
        """The protocol without its ids, for the report."""
        names = ProtocolRecord.model_fields
        return ProtocolRecord(**{name: getattr(self, name) for name in names})


def read_text(source: Path | str) -> tuple[str, str]:
    """(name, text) of a file (newline-exact UTF-8) or of a string that is the text itself. Raises UserError."""
    if isinstance(source, str):
        return "given text", source
    try:
        with source.open(encoding="utf-8", newline="") as stream:
            return source.name, stream.read()
    except FileNotFoundError as error:
        raise UserError(f"no such text file: {source}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {source} as UTF-8 text: {error}") from error


def make_protocol(source: Path | str, tokenizer: Any, context: int, windows: int | None, name: str = "") -> Protocol:
    """Tokenize once and cut into windows (None: as many as there are).

    Raises UserError for an empty text, one that fills fewer windows than asked, or an impossible context.
    """
    if context < 2:
        raise UserError(f"context {context} is out of range: a window needs at least 2 tokens, or nothing is scored")
    if windows is not None and windows < 1:
        raise UserError(f"windows {windows} is out of range: give at least 1")
    found, text = read_text(source)
    name = name or found
    if not text.strip():
        raise UserError(f"the text {name!r} is empty; give a text of at least {context} tokens")
    enough = text if windows is None else text[: 64 * context * windows]
    ids = np.asarray(tokenizer(enough, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    if windows is not None and len(ids) <= context * windows and len(enough) < len(text):
        ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    available = len(ids) // context
    if available < (windows or 1):
        wanted = f"{windows or 1} window(s) of {context} tokens"
        raise UserError(f"the text {name!r} has {len(ids)} tokens, too short for {wanted}; give more text or fewer")
    count = windows or available
    cut = np.ascontiguousarray(ids[: count * context].reshape(count, context), dtype="<i8")
    return Protocol(
        text=name,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        ids_sha256=hashlib.sha256(cut.tobytes()).hexdigest(),
        context=context,
        windows=count,
        stride=context,
        tokens_scored=count * (context - 1),
        ids=cut,
    )
