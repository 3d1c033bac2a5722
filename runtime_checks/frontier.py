"""The frontier of a model: what bytes buy in perplexity and speed, dense and compressed, rounded to many types.

Everything is checked before anything is computed. The result is written after every cell, so that an interrupted run loses
the current one; a checkpoint that is already compressed is used again.
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporters.gguf import Importance
from runtime_checks.artefacts import open_artefact
from runtime_checks.compare_labels import folder_name
from runtime_checks.estimates import exponential, paired_rise
from runtime_checks.frontier_cell import Gauge, known, measure
from runtime_checks.frontier_export import FORMATS, Written, describe
from runtime_checks.frontier_grid import Asked, Grid, Scale, base_type, ordered, protocol_of
from runtime_checks.frontier_schema import (
    DENSE,
    FRONTIER,
    Frontier,
    FrontierCell,
    Setting,
    read_frontier,
    write_frontier,
)
from runtime_checks.machine import run_record
from runtime_checks.memory_model import growth
from runtime_checks.runtimes import RUNTIMES
from runtime_checks.study import Common, begun, check_place
from runtime_checks.study_schema import Status, StudyProtocol
from sola_edge.checkpoint import Checkpoint, open_checkpoint
from sola_edge.compress import prepare
from sola_edge.errors import NotFinite, Unreachable, UserError
from sola_edge.files import remove
from sola_edge.progress import console

ARTEFACTS = "artefacts"
FOLDER = Path("build/frontier")


def model_name(model: str | Path) -> str:
    """What a model is called: the last part of its path or hub id."""
    return Path(model).resolve().name.removesuffix(".gguf")


def default_folder(model: str | Path) -> Path:
    """Where a model's frontier goes unless a folder is named."""
    return FOLDER / model_name(model)


def frontier(
    model: str | Path,
    out: Path,
    asked: Asked,
    common: Common,
    scale: Scale,
    *,
    fresh: bool = False,
    keep: bool = False,
) -> Frontier:
    """Fill the folder `out` with frontier.json, .csv, .md and .png. fresh: nothing measured earlier counts; keep: the files.

    Raises UserError for bad input before anything is computed, and for what goes wrong later with the machine (a full
    disk), when what was measured is kept.
    """
    from runtime_checks.frontier_plot import write_plot
    from runtime_checks.frontier_table import write_tables

    out = Path(out)
    check_place(out, FRONTIER)
    source = open_checkpoint(model)
    grid = Grid(source, asked, common)
    protocol, gauge = protocol_of(model_name(model), source, asked, common, scale)
    run = _Run(source, out, asked, common, gauge, keep)
    instead = "give another folder, or --fresh to measure all anew"
    earlier = None if fresh else begun(out / FRONTIER, read_frontier, protocol, "frontier", instead)
    run.begin(earlier, protocol, grid)
    run.all(grid)
    write_tables(run.found, out)
    write_plot(run.found, out / "frontier.png")
    return run.found


class _Run:
    """The frontier as it grows; on disk after every cell."""

    def __init__(self, source: Checkpoint, out: Path, asked: Asked, common: Common, gauge: Gauge, keep: bool) -> None:
        self.source, self.out, self.common, self.gauge, self.keep = source, out, common, gauge, keep
        self.importance = Importance(asked.importance) if asked.importance else None
        self.folder = out / ARTEFACTS
        self.written: dict[Path, Written] = {}
        self.found: Frontier

    def begin(self, earlier: Frontier | None, protocol: StudyProtocol, grid: Grid) -> None:
        """What is known goes on; files that were left are of the same protocol then, and of none otherwise."""
        if earlier is None:
            remove(self.folder)
        self._save(
            Frontier(
                **(self._record if earlier is None else {name: getattr(earlier, name) for name in self._record}),
                protocol=protocol,
                reference=earlier.reference if earlier and earlier.cells else grid.baselines[0],
                cells=earlier.cells if earlier else [],
            )
        )

    @property
    def _record(self) -> dict[str, Any]:
        return run_record(self.gauge.threads)

    def _save(self, found: Frontier) -> None:
        self.found = found
        write_frontier(found, self.out / FRONTIER)

    def all(self, grid: Grid) -> None:
        """Every cell that is not done, a model at a time."""
        todo = [s for s in grid.settings if not known(self.found.cell(s), grid.compression(s))]
        done = 0
        for (label, rate), group in itertools.groupby(todo, key=lambda s: (s.label, s.rate)):
            settings = list(group)
            folder = self.folder / folder_name(label, rate)
            model = self._model(settings[0], grid, folder)
            for setting in settings:
                done += 1
                console.print(f"{done} of {len(todo)}: {setting}", markup=False, highlight=False)
                self._add(self._cell(setting, grid, model), grid)
                if not self.keep and self._last_of_its_file(setting, settings):
                    remove(self._file(setting))
            if not self.keep:
                remove(folder)
        if todo and not self.keep:
            remove(self.folder)

    def _last_of_its_file(self, setting: Setting, settings: Sequence[Setting]) -> bool:
        """Baselines stay to the end, the others until their last runtime is done."""
        later = settings[settings.index(setting) + 1 :]
        base = setting.dense and setting.type == base_type(setting.runtime)
        return not base and self._file(setting) not in map(self._file, later)

    def _model(self, setting: Setting, grid: Grid, folder: Path) -> Path | tuple[Status, str]:
        """The model's checkpoint, or how and why there is none. Raises UserError for what would spoil other cells too."""
        settings = grid.compressions.get((setting.label, setting.rate))
        if settings is None:
            return self.source.path
        if not folder.exists():
            try:
                prepare(self.source, settings, self.common.calibration).write(folder)
            except Unreachable as error:
                return "unreachable", str(error)
            except NotFinite as error:
                return "failed", str(error)
        return folder

    def _file(self, setting: Setting) -> Path:
        """Where the setting's export goes."""
        model = DENSE if setting.dense else folder_name(setting.label, setting.rate)
        return self.folder / f"{model}-{setting.type}{FORMATS[RUNTIMES[setting.runtime].kind].suffix}"

    def _export(self, setting: Setting, model: Path) -> Path:
        """The setting's file, written unless this run has written it. Raises UserError."""
        path = self._file(setting)
        if path not in self.written:
            self.folder.mkdir(parents=True, exist_ok=True)
            row = FORMATS[RUNTIMES[setting.runtime].kind]
            self.written[path] = row.write(model, path, setting.type, self.importance)
        return path

    def _cell(self, setting: Setting, grid: Grid, model: Path | tuple[Status, str]) -> FrontierCell:
        about: dict[str, Any] = {"setting": setting, "compression": grid.compression(setting)}
        if isinstance(model, tuple):
            return FrontierCell(**about, status=model[0], reason=model[1])
        base = next(s for s in grid.baselines if s.runtime == setting.runtime)
        start = time.perf_counter()
        try:
            path = self._export(setting, model)
            baseline = None if setting == base else self._export(base, self.source.path)
        except UserError as error:
            return FrontierCell(**about, status="failed", reason=str(error))
        checkpoint = open_checkpoint(model)
        artefact = describe(path, self.written[path])
        exported = time.perf_counter() - start
        figures = measure(path, setting.runtime, setting.model, baseline, self.gauge)
        figures |= {
            "achieved": 0.0 if setting.dense else checkpoint.provenance["rate"],
            "parameters": checkpoint.parameters(),
            "artefact": artefact,
            "growth": growth(setting.runtime, open_artefact(path)),
        }
        if "seconds" in figures:
            figures["seconds"] = {"export": exported, **figures["seconds"]}
        status = "failed" if figures.get("reason") else "measured"
        return FrontierCell.model_validate({**about, "status": status, **figures})

    def _add(self, cell: FrontierCell, grid: Grid) -> None:
        """The cell among the others, compared with the reference. Raises UserError when the reference has no figures."""
        reference = self.found.cell(self.found.reference)
        if cell.setting == self.found.reference:
            reference = cell
            if cell.status != "measured":
                raise UserError(f"there is nothing to compare with: {cell.setting} failed: {cell.reason}")
        if cell.status == "measured" and cell.perplexity and reference and reference.perplexity:
            rise = paired_rise(reference.perplexity, cell.perplexity)
            cell = cell.model_copy(update={"rise": rise, "ratio": exponential(rise)})
        others = [c for c in self.found.cells if c.setting != cell.setting]
        self._save(self.found.model_copy(update={"cells": ordered([*others, cell], grid.settings), **self._record}))
