"""The tokenizer inside a GGUF file, as a transformers tokenizer that gives the ids llama.cpp gives.

transformers' own conversion keeps a llama-architecture file's vocabulary but not its pre-tokenizer (SmolLM2 splits digits)
nor `add_bos_token`. For byte-level BPE vocabularies (`tokenizer.ggml.model` = gpt2) the tokenizer is built here with the
`tokenizers` library from the file's own tokens, merges and pre-tokenizer name; a row of `PRE_TOKENIZERS` per name.
"""

from pathlib import Path

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sola_edge.errors import UserError
from sola_edge.gguf_source import GGUFFile, field, open_gguf

CONTROL, USER_DEFINED = int(gguf.TokenType.CONTROL), int(gguf.TokenType.USER_DEFINED)
IGNORE_MERGES = {"llama-bpe"}  # a word that is in the vocabulary is one token, whatever the merges say
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, _byte_level(use_regex=False)])


PRE_TOKENIZERS = {
    "gpt-2": _byte_level,
    "smollm": _digits,
    "llama-bpe": lambda: _split(_LLAMA3),
}


def tokenizer_from_gguf(path: Path) -> PreTrainedTokenizerFast:
    """The file's tokenizer. Raises UserError for a kind that has no row."""
    reader = open_gguf(path)
    kind, pre = field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre", "none")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UserError(
            f"{path} has a {kind!r} tokenizer with pre-tokenizer {pre!r}, which a GGUF source cannot carry over "
            f"(known: gpt2 with {known}); give the model's folder instead"
        )
    tokens, merges = (field(reader, f"tokenizer.ggml.{key}", []) for key in ("tokens", "merges"))
    types = field(reader, "tokenizer.ggml.token_type", [])
    if not tokens or not merges or len(types) != len(tokens):
        raise UserError(f"{path} has an incomplete vocabulary; give the model's folder instead")
    backend = _byte_level_bpe(tokens, merges, pre)
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in added if kind == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, kind in added if kind == USER_DEFINED])
    special = _special_tokens(reader, tokens)
    if field(reader, "tokenizer.ggml.add_bos_token", False):
        bos = special["bos_token"]
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
                ),
            ]
        )
    inputs = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, model_input_names=inputs, **special
    )
    tokenizer.chat_template = field(reader, "tokenizer.chat_template")
    return tokenizer


def _byte_level_bpe(tokens: list[str], merges: list[str], pre: str) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in IGNORE_MERGES))
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _special_tokens(reader: GGUFFile, tokens: list[str]) -> dict[str, str]:
    keys = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
    ids = {name: field(reader, f"tokenizer.ggml.{key}") for name, key in keys.items()}
    found = {name: i for name, i in ids.items() if i is not None}
    for name, i in found.items():
        if not (isinstance(i, int) and 0 <= i < len(tokens)):
            raise UserError(f"{reader.path} has {len(tokens)} tokens and {name} as number {i}; fetch it again")
    return {f"{name}_token": tokens[i] for name, i in found.items()}
