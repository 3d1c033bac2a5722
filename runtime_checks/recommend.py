"""Which setting of a measured frontier suits a device: of those that fit, the one of least perplexity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime_checks.estimates import exponential, paired_rise
from runtime_checks.frontier import default_folder
from runtime_checks.frontier_front import ratio, size
from runtime_checks.frontier_schema import FRONTIER, Frontier, FrontierCell, Setting, read_frontier
from runtime_checks.frozen import Frozen
from runtime_checks.runtimes import check_runtimes
from runtime_checks.study_schema import Estimate
from runtime_checks.summary import megabytes, number
from sola_edge.checkpoint import open_checkpoint
from sola_edge.errors import UserError

RUNNERS_UP = 3


@dataclass(frozen=True)
class Wanted:
    """What a device has and a user wants: bytes for the process, tokens per second, tokens of context (None: as measured)."""

    memory: int
    decode: float = 0.0
    prefill: float = 0.0
    context: int | None = None
    runtimes: Sequence[str] | None = None


class Option(Frozen):
    """A setting and what it needs and gives. memory: the resident peak that was measured, and what any further tokens of
    context should take. behind: its perplexity ÷ that of the chosen one, paired by window.
    """

    setting: Setting
    bytes: int
    memory: int
    ratio: Estimate  # perplexity ÷ the dense reference's
    prefill: float
    decode: float
    behind: Estimate | None = None


class RuledOut(Frozen):
    """A setting that does not suit, with every reason; `short`: by which share it misses what it misses most."""

    option: Option
    reasons: list[str]
    short: float


class Recommendation(Frozen):
    """chosen is null where nothing fits; `nearest` is then the setting that misses least."""

    frontier: str
    reference: Setting
    wanted: str
    chosen: Option | None
    reason: str
    runners_up: list[Option]
    ruled_out: list[RuledOut]
    nearest: RuledOut | None


def frontier_of(source: str) -> tuple[Path, Frontier]:
    """The frontier that is meant by a frontier.json, its folder, or a model that was measured into the default folder.

    Raises UserError where there is none, or where it is of another model's weights.
    """
    path = Path(source)
    if path.suffix == ".json":
        return path, read_frontier(path)
    if (path / FRONTIER).exists():
        return path / FRONTIER, read_frontier(path / FRONTIER)
    place = default_folder(source) / FRONTIER
    if not place.exists():
        raise UserError(
            f"there is no frontier in {source}, and none of a model of that name in {place.parent}; make one with "
            f"sola-edge check frontier {source}, or name its folder"
        )
    found = read_frontier(place)
    if found.protocol.weights_sha256 != open_checkpoint(source).weights_sha256:
        raise UserError(
            f"{place} is of another model than {source}: the weights differ; measure it with check frontier"
        )
    return place, found


def recommend(measured: tuple[Path, Frontier], wanted: Wanted) -> Recommendation:
    """Choose. Raises UserError when the frontier has no figures at all, or none of the runtimes asked for."""
    place, found = measured
    check_runtimes(wanted.runtimes)
    cells = [c for c in found.measured if wanted.runtimes is None or c.setting.runtime in wanted.runtimes]
    if not cells:
        known = ", ".join(dict.fromkeys(c.setting.runtime for c in found.measured)) or "none"
        raise UserError(f"{place} has no measured setting of what is asked for; its runtimes are: {known}")
    if wanted.context is not None and wanted.context < 1:
        raise UserError(f"context {wanted.context} is out of range: give at least 1 token")
    judged = [(cell, _judge(_option(found, cell, wanted), wanted)) for cell in cells]
    fitting = sorted((c for c, j in judged if not j.reasons), key=lambda cell: (ratio(cell), size(cell)))
    ruled_out = sorted((j for _, j in judged if j.reasons), key=lambda j: (j.short, j.option.ratio.value))
    best = fitting[0] if fitting else None
    chosen = _option(found, best, wanted) if best else None
    runners = [_option(found, cell, wanted, best) for cell in fitting[1 : 1 + RUNNERS_UP]]
    return Recommendation(
        frontier=str(place),
        reference=found.reference,
        wanted=_in_words(wanted, max(cell.memory_context or 0 for cell in cells)),
        chosen=chosen,
        reason=_reason(len(fitting), len(cells), chosen),
        runners_up=runners,
        ruled_out=ruled_out,
        nearest=None if fitting else ruled_out[0],
    )


def _option(found: Frontier, cell: FrontierCell, wanted: Wanted, best: FrontierCell | None = None) -> Option:
    assert cell.artefact and cell.ratio and cell.memory and cell.throughput and cell.perplexity
    more = max(0, (wanted.context or 0) - (cell.memory_context or 0)) * (cell.growth or 0)
    behind = exponential(paired_rise(best.perplexity, cell.perplexity)) if best and best.perplexity else None
    return Option(
        setting=cell.setting,
        bytes=cell.artefact.bytes,
        memory=cell.memory.peak + more,
        ratio=cell.ratio,
        prefill=found.speed(cell, "prefill") or 0.0,
        decode=found.speed(cell, "decode") or 0.0,
        behind=behind,
    )


LIMITS: tuple[tuple[Callable[[Option], float], Callable[[Wanted], float], Callable[[float], str], str, int], ...] = (
    (lambda o: o.memory, lambda w: w.memory, megabytes, "peak memory {} is more than {}", 1),
    (lambda o: o.decode, lambda w: w.decode, number, "decodes {} tokens/s, fewer than {}", -1),
    (lambda o: o.prefill, lambda w: w.prefill, number, "prefills {} tokens/s, fewer than {}", -1),
)
"""(what a setting needs or gives, what is wanted, how it is written, what is said of a miss, 1: at most or -1: at least)."""


def _judge(option: Option, wanted: Wanted) -> RuledOut:
    """What the setting misses; no reasons: it fits."""
    reasons, short = [], 0.0
    for has, wants, written, said, sign in LIMITS:
        own, limit = has(option), wants(wanted)
        if sign * (own - limit) > 0:
            reasons.append(said.format(written(own), written(limit)))
            short = max(short, max(own, limit) / max(min(own, limit), 1e-9) - 1)
    return RuledOut(option=option, reasons=reasons, short=short)


def _in_words(wanted: Wanted, measured: int) -> str:
    """measured: tokens that memory was measured with."""
    parts = [f"at most {megabytes(wanted.memory)} of memory"]
    parts += [f"at least {number(wanted.decode)} tokens/s of decode"] if wanted.decode else []
    parts += [f"at least {number(wanted.prefill)} tokens/s of prefill"] if wanted.prefill else []
    parts += [f"{max(wanted.context or 0, measured):,} tokens of context"]
    return ", ".join([*parts, *([f"in {' or '.join(wanted.runtimes)}"] if wanted.runtimes else [])])


def _reason(fitting: int, all_cells: int, chosen: Option | None) -> str:
    if chosen is None:
        return f"none of {all_cells} measured settings fits"
    return f"least perplexity of the {fitting} settings that fit, of {all_cells} measured"
