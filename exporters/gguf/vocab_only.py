"""Run llama.cpp's converter with --vocab-only in a process of its own.

    python vocab_only.py CONVERTER MODEL_FOLDER OUT_FILE [PRE_TOKENIZER]

PRE_TOKENIZER names llama.cpp's pre-tokenizer for a byte-level BPE vocabulary whose hash the converter does not know.
"""

import runpy
import sys
from pathlib import Path
from typing import Any


def main(converter: str, model: str, out: str, pre_tokenizer: str = "") -> None:
    """Run the converter as if it had been called from the command line."""
    folder = Path(converter).parent
    sys.path[0:1] = [str(folder), str(folder / "gguf-py")]  # instead of this file's folder
    if pre_tokenizer:
        _know(pre_tokenizer)
    sys.argv = [converter, "--vocab-only", "--outfile", out, model]
    runpy.run_path(converter, run_name="__main__")


def _know(pre_tokenizer: str) -> None:
    from conversion import base  # type: ignore[import-not-found]

    by_hash = base.TextModel.get_vocab_base_pre

    def by_hash_or_rule(self: Any, tokenizer: Any) -> str:
        try:
            return by_hash(self, tokenizer)
        except NotImplementedError:
            return pre_tokenizer

    base.TextModel.get_vocab_base_pre = by_hash_or_rule


if __name__ == "__main__":
    main(*sys.argv[1:])
