"""What studies of one model share: compressions that are checked before anything is computed, one protocol, going on.

A study is a folder that holds a table of cells (methods × rates, and more), written after every cell.
"""

import importlib.util
import typing
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from runtime_checks.compare_labels import settings_of
from runtime_checks.machine import packages
from runtime_checks.protocol import Protocol
from runtime_checks.study_schema import CalibrationRecord, StudyProtocol
from sola_edge.calibration import read_calibration
from sola_edge.checkpoint import Checkpoint
from sola_edge.collect import FORMAT as STATISTICS_FORMAT
from sola_edge.compress import WORK_FORMAT, check_source
from sola_edge.config import CompressionSettings
from sola_edge.errors import UserError
from sola_edge.files import check_folder_target
from sola_edge.methods import method_named
from sola_edge.texts import DEFAULT_CALIBRATION, load_text

COMPUTING = ("sola-edge", "torch", "transformers", "numpy")  # packages whose version compressed weights depend on


@dataclass(frozen=True)
class Common:
    """What all methods are given; see CompressionSettings."""

    calibration: str = DEFAULT_CALIBRATION
    align: int | None = None
    window: int = CompressionSettings.window
    windows: int | None = CompressionSettings.max_windows
    gradient_windows: int | None = CompressionSettings.gradient_windows
    correction_windows: int = CompressionSettings.correction_windows
    device: str = CompressionSettings.device

    def __post_init__(self) -> None:
        if self.gradient_windows is None:  # as in CompressionSettings: studies that say the same are the same
            object.__setattr__(self, "gradient_windows", self.windows)

    def settings(self, rate: float) -> CompressionSettings:
        """Raises UserError for an impossible value."""
        return CompressionSettings(
            rate=rate,
            align=self.align,
            window=self.window,
            max_windows=self.windows,
            gradient_windows=self.gradient_windows,
            correction_windows=self.correction_windows,
            device=self.device,
        )


def check_place(out: Path, marker: str) -> None:
    """The folder is new or holds such a study (the file `marker`), and its picture can be drawn. Raises UserError."""
    check_folder_target(out, marker)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the picture is drawn by matplotlib: pip install 'sola-edge[report]'")


def checked_settings(source: Checkpoint, label: str, rate: float, common: Common) -> CompressionSettings:
    """Of a label at a rate. Raises UserError where the model cannot be compressed so."""
    settings = settings_of(label, common.settings(rate))
    check_source(source, settings, method_named(settings.method))
    return settings


def study_protocol(
    name: str,
    source: Checkpoint,
    common: Common,
    scored: Protocol,
    tokenizer: Any,
    computing: Iterable[str] = COMPUTING,
    **options: int | str | None,
) -> StudyProtocol:
    """What all cells share. Raises UserError for a calibration text that is missing or too short."""
    calibration = read_calibration(load_text(common.calibration), tokenizer, common.window, common.windows)
    shared = {name: value for name, value in asdict(common).items() if name not in ("calibration", "window", "windows")}
    wanted = set(computing)
    return StudyProtocol(
        model=name,
        weights_sha256=source.weights_sha256,
        scoring=scored.record(),
        calibration=CalibrationRecord(**calibration.describe()),
        options={
            **shared,
            "windows asked": common.windows,
            "format of statistics": STATISTICS_FORMAT,
            "format of layers": WORK_FORMAT,
            **options,
        },
        versions={name: version for name, version in packages().items() if name in wanted},
    )


class Study(typing.Protocol):
    """What a study's file holds, as far as going on with it needs it."""

    @property
    def protocol(self) -> StudyProtocol: ...


Begun = TypeVar("Begun", bound=Study)


def begun(path: Path, read: Callable[[Path], Begun], protocol: StudyProtocol, what: str, instead: str) -> Begun | None:
    """The study that the file holds, None where there is no file yet. Raises UserError when it is of another protocol."""
    if not path.exists():
        return None
    known = read(path)
    difference = known.protocol.difference(protocol)
    if difference:
        raise UserError(f"{path} is a {what} under another protocol ({difference}); {instead}")
    return known
