"""What a frontier is asked: models × types × runtimes, checked before anything is computed, and how it is measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime_checks.artefacts import open_artefact
from runtime_checks.checks import check_sizes
from runtime_checks.frontier_cell import Gauge
from runtime_checks.frontier_export import EXPORT_FORMAT, FORMATS, check_types, runtime_rows, types_of
from runtime_checks.frontier_schema import DENSE, FrontierCell, Setting
from runtime_checks.machine import checked_threads, machine
from runtime_checks.protocol import make_protocol
from runtime_checks.runtimes import RUNTIMES
from runtime_checks.study import COMPUTING, Common, checked_settings, study_protocol
from runtime_checks.study_schema import StudyProtocol
from sola_edge.checkpoint import Checkpoint
from sola_edge.config import CompressionSettings
from sola_edge.errors import UserError
from sola_edge.texts import DEFAULT_SCORING, load_text

RUNNING = (
    "onnxruntime",
    "onnxruntime-genai",
    "gguf",
    "onnx",
    "llama.cpp",
)  # packages that speed and rounding depend on


@dataclass(frozen=True)
class Asked:
    """labels: METHOD[:OPTION…], see compare_labels.py; rate 0 is the dense model; types of GGUF and ONNX precisions."""

    labels: tuple[str, ...] = ("sola",)
    rates: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4)
    types: tuple[str, ...] = ("f16", "q8_0", "q6_k", "q4_k_m", "q3_k_m", "fp32", "int8", "int4")
    runtimes: tuple[str, ...] = ("llama.cpp", "onnxruntime-genai")
    importance: str | None = None  # the text of the importance matrix of K- and I-quants


@dataclass(frozen=True)
class Scale:
    """The text that perplexity is measured on, in windows of `context` tokens; tokens and rounds of the speed tests."""

    text: str = DEFAULT_SCORING
    context: int = 2048
    windows: int = 10
    prompt: int = 512
    generate: int = 128
    rounds: int = 3
    threads: int | None = None


class Grid:
    """Every setting that is asked for, checked, the dense baselines first. Raises UserError for the first that cannot be."""

    def __init__(self, source: Checkpoint, asked: Asked, common: Common) -> None:
        rows = runtime_rows(asked.runtimes)
        if not rows or not asked.types or not (asked.rates and asked.labels):
            raise UserError("nothing to measure: give at least one rate, one method, one type and one runtime")
        types = tuple(name.lower() for name in asked.types)
        check_types(rows, types)
        self.compressions: dict[tuple[str, float], CompressionSettings] = {
            (label, rate): checked_settings(source, label, rate, common)
            for label in asked.labels
            for rate in asked.rates
            if rate
        }
        self.baselines = [Setting(label=DENSE, rate=0.0, type=base_type(row.name), runtime=row.name) for row in rows]
        models = [(DENSE, 0.0)] if 0.0 in asked.rates else []
        wanted = [
            Setting(label=label, rate=rate, type=name, runtime=row.name)
            for label, rate in [*models, *self.compressions]
            for row in rows
            for name in types_of(row, types)
        ]
        self.settings = list(dict.fromkeys([*self.baselines, *wanted]))
        for row in rows:
            for name in types_of(row, types):
                FORMATS[row.kind].check(source, name)

    def compression(self, setting: Setting) -> dict[str, Any] | None:
        """All that the compression is asked."""
        found = self.compressions.get((setting.label, setting.rate))
        return found.as_dict() if found else None


def base_type(runtime: str) -> str:
    """The type in which the dense model is the baseline of a runtime."""
    return FORMATS[RUNTIMES[runtime].kind].base


def protocol_of(
    name: str, source: Checkpoint, asked: Asked, common: Common, scale: Scale
) -> tuple[StudyProtocol, Gauge]:
    """What all cells share. Raises UserError for texts that are missing or too short."""
    check_sizes(scale.prompt, scale.generate, scale.rounds)
    tokenizer, text = source.tokenizer(), load_text(scale.text)
    scored = make_protocol(text.joined, tokenizer, scale.context, scale.windows, text.name)
    gauge = Gauge(scored, scale.prompt, scale.generate, scale.rounds, checked_threads(scale.threads))
    options: dict[str, int | str | None] = {
        "format of exports": EXPORT_FORMAT,
        "stored as": open_artefact(source.path).precision,
        "importance matrix": load_text(asked.importance).sha256 if asked.importance else None,
        "prompt": scale.prompt,
        "generate": scale.generate,
        "rounds": scale.rounds,
        "threads": gauge.threads,
        "processor": machine(gauge.threads).processor,
    }
    return study_protocol(name, source, common, scored, tokenizer, (*COMPUTING, *RUNNING), **options), gauge


def ordered(cells: Sequence[FrontierCell], settings: Sequence[Setting]) -> list[FrontierCell]:
    """The dense model first; labels, runtimes and types in the order that they were asked, then those of earlier runs."""
    every = [*settings, *(cell.setting for cell in cells)]
    places = {name: list(dict.fromkeys(getattr(s, name) for s in every)) for name in ("label", "runtime", "type")}

    def place(cell: FrontierCell) -> tuple[float, ...]:
        at = {name: found.index(getattr(cell.setting, name)) for name, found in places.items()}
        return at["label"], cell.setting.rate, at["runtime"], at["type"]

    return sorted(cells, key=place)
