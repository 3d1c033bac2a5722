"""llama.cpp's own judge: `llama-perplexity --kl-divergence` on a GGUF file, beside log-probabilities that PyTorch wrote.

The base file (little-endian): `_logits_`, int32 context, vocabulary and windows, the int32 ids of all windows, then a row for
every scored position. A row is float32 step and least log-probability, then a uint16 for each token (one more where they are
odd in number) that counts steps above the least; what is more than 16 nats below the most likely token counts as the least.
llama-perplexity scores the second half of a window (the tokens after position context // 2) and puts a BOS in the place of a
window's first token where the file's tokenizer adds one. Its figures have six decimals; rounding to a step (2.4e-4 nats at
most) costs some 1e-9 nats.
"""

import hashlib
import math
import re
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from pydantic import Field

from exporters.llama_cpp import find
from exporters.llama_cpp.tools import run_tool
from runtime_checks.checks import reference_logits, reference_subject, subjects_of
from runtime_checks.frozen import Frozen
from runtime_checks.machine import checked_threads
from runtime_checks.perplexity import perplexity
from runtime_checks.process import CheckError
from runtime_checks.protocol import Protocol, make_protocol
from runtime_checks.reference import Reference, check_space
from runtime_checks.schema import Perplexity, ProtocolRecord, Skipped
from sola_edge.checkpoint import load_tokenizer
from sola_edge.errors import UserError
from sola_edge.progress import status

OTHER_VOCABULARY = "inconsistent vocabulary"  # what the tool says of a base file of another model
MAGIC = b"_logits_"
REACH = 16.0  # nats below the most likely token that a base file tells apart
STEPS = 65535
LEAST = 100  # scored tokens, or it prints no figures
SHORT = 32  # tokens of a context that nothing is computed in
NUMBER = r"(-?[\d.]+(?:e-?\d+)?|-?nan|-?inf)"
FIGURES = {
    "perplexity": rf"Mean PPL\(Q\)\s*:\s*{NUMBER}",
    "reference_perplexity": rf"Mean PPL\(base\)\s*:\s*{NUMBER}",
    "mean_kl": rf"Mean\s+KLD:\s*{NUMBER}",
    "mean_kl_error": rf"Mean\s+KLD:\s*{NUMBER} ±\s*{NUMBER}",
    "kl_99": rf"99\.0%\s+KLD:\s*{NUMBER}",
    "max_kl": rf"Maximum KLD:\s*{NUMBER}",
    "top1": rf"Same top p:\s*{NUMBER}",
}
"""What is read of its output; the last group counts."""


class Judgement(Frozen):
    """What llama-perplexity says of a file: KL divergences from the reference in nats, top1 as a share (0 to 1)."""

    artefact: str
    perplexity: float
    reference_perplexity: float
    mean_kl: float
    mean_kl_error: float
    kl_99: float
    max_kl: float
    top1: float


class Judgements(Frozen):
    """Files against one reference; `protocol` has the windows, of which the second halves are scored.

    perplexity: of the reference's logits, by our own sums. Where reference and file are the same it is to be the tool's.
    """

    reference: str
    protocol: ProtocolRecord
    perplexity: Perplexity
    judged: list[Judgement] = Field(default_factory=list)


def judge_by_llama_perplexity(
    reference: Path,
    candidates: list[Path],
    text: Path | str,
    *,
    text_name: str = "",
    context: int = 512,
    windows: int = 4,
    threads: int | None = None,
) -> Judgements:
    """Let llama.cpp's tool compare GGUF files with a checkpoint that runs in PyTorch, or any other reference.

    Raises UserError for bad input, without a llama.cpp build, and where the reference or the tool fails.
    """
    build, threads = find(), checked_threads(threads)
    if build is None:
        raise UserError("llama-perplexity is part of llama.cpp; run `sola-edge llama-cpp build` first")
    for path in candidates:
        if not path.is_file():
            raise UserError(f"{path} is no file; llama-perplexity judges .gguf files")
    first = reference_subject(Path(reference), [])
    protocol = make_protocol(text, load_tokenizer(Path(reference)), context, windows, text_name)
    scored = windows * (context - 1 - context // 2)
    if scored < LEAST:
        raise UserError(
            f"llama-perplexity tells nothing of {scored} tokens; give more or longer windows ({LEAST} tokens)"
        )
    protocol = replace(protocol, tokens_scored=scored)
    protocol = _with_bos(protocol, {path: _bos(path, threads) for path in candidates})
    with tempfile.TemporaryDirectory(prefix="sola-edge-") as folder:
        base = Path(folder) / "base.kld"
        logits = reference_logits(first, protocol, threads, Path(folder))
        write_base(logits, protocol, base)
        tool = build.tool("llama-perplexity")
        judged = [_judge(tool, Path(path), base, context, threads) for path in candidates]
    ours = perplexity([nll[context // 2 :] for nll in logits.nll])
    return Judgements(reference=str(reference), protocol=protocol.record(), perplexity=ours, judged=judged)


def _options(path: Path) -> list[str]:
    """Those of a file of F32 weights, which llama.cpp's F16 cache and flash attention would round (see llama_cpp_.py)."""
    kind = gguf.GGUFReader(path).fields.get("general.file_type")
    exact = kind is not None and kind.contents() == gguf.LlamaFileType.ALL_F32
    return ["-ctk", "f32", "-ctv", "f32", "-fa", "off"] if exact else []


def _bos(path: Path, threads: int) -> int | None:
    """The id that llama.cpp puts first, where it adds one. Raises UserError for a file that it does not load."""
    skipped: list[Skipped] = []
    subjects = subjects_of("", path, skipped)
    if not subjects:
        raise UserError(skipped[0].reason)
    try:
        with ExitStack() as stack:
            found: int | None = subjects[0].start(stack, threads, SHORT).ask("bos")["bos"]
    except CheckError as error:
        raise UserError(str(error)) from error
    return found


def _with_bos(protocol: Protocol, wanted: dict[Path, int | None]) -> Protocol:
    """The protocol as the tool feeds it. Raises UserError where the files differ in it."""
    ids = set(wanted.values())
    if len(ids) > 1:
        raise UserError("the files differ in whether their tokenizers add a BOS; judge them one by one")
    bos = next(iter(ids), None)
    if bos is None:
        return protocol
    changed = protocol.ids.copy()
    changed[:, 0] = bos
    return replace(protocol, ids=changed, ids_sha256=hashlib.sha256(changed.tobytes()).hexdigest(), bos=True)


def write_base(reference: Reference, protocol: Protocol, path: Path) -> None:
    """Write the base file of a reference's logits. Raises UserError where the disk is too full."""
    check_space(path.parent, protocol.tokens_scored * (reference.vocab + 5) * 2)
    with path.open("wb") as stream:
        stream.write(MAGIC)
        np.array([protocol.context, reference.vocab, protocol.windows], "<i4").tofile(stream)
        protocol.ids.astype("<i4").tofile(stream)
        for index in range(protocol.windows):
            rows = np.asarray(reference.window(index)[protocol.context // 2 : -1], np.float64)
            packed(rows).tofile(stream)


def packed(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """Rows of the base file, (positions, vocabulary rounded up to even + 4), for logits (positions, vocabulary)."""
    positions, vocab = logits.shape
    top = logits.max(axis=1, keepdims=True)
    least = np.maximum(logits.min(axis=1, keepdims=True), top - REACH)
    total = np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    step = ((top - least) / STEPS).astype("<f4")
    counted = np.rint((np.maximum(logits, least) - least) / np.where(step > 0, step, 1.0))
    rows = np.zeros((positions, 4 + vocab + vocab % 2), "<u2")
    rows[:, :4] = np.hstack([step, (least - top - total).astype("<f4")]).view("<u2")
    rows[:, 4 : 4 + vocab] = np.minimum(counted, STEPS)
    return rows


def _judge(tool: Path, model: Path, base: Path, context: int, threads: int) -> Judgement:
    command = [str(tool), "-m", str(model), "--kl-divergence", "--kl-divergence-base", str(base), "-c", str(context)]
    command += ["-b", str(context), "-t", str(threads), "-ngl", "0", "-dev", "none", *_options(model)]
    with status(f"llama-perplexity on {model.name}"):
        done, told = run_tool(command, lambda told: len(_figures(told)) == len(FIGURES) or OTHER_VOCABULARY in told)
    found = _figures(told)
    if OTHER_VOCABULARY in told:
        raise UserError(f"{model} has another vocabulary than the reference; it is no file of that model")
    if done.returncode or len(found) < len(FIGURES):
        lines = [line for line in told.splitlines() if "error" in line.lower() or "failed" in line.lower()]
        raise UserError(f"llama-perplexity on {model}: {(lines or [f'code {done.returncode}, no figures'])[0][:300]}")
    values = {name: float(value) for name, value in found.items()}
    if not all(map(math.isfinite, values.values())):
        raise UserError(f"llama-perplexity finds no finite figures for {model}: {values}; its weights are damaged")
    return Judgement(artefact=str(model), **{**values, "top1": values["top1"] / 100})


def _figures(told: str) -> dict[str, str]:
    """Those of `FIGURES` that stand in the tool's output."""
    return {name: match[match.lastindex or 1] for name, line in FIGURES.items() if (match := re.search(line, told))}
