"""Results of earlier runs, in the cache folder: known by what they are of, and used again unless they are asked for afresh.

A result is of an artefact's files (their hashes), a runtime, this project's code, the versions of what computes, the processor,
the threads, and what was asked. Speeds are not kept: they compare artefacts that took turns on one machine at one time.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from runtime_checks.artefacts import Artefact
from runtime_checks.machine import machine, packages
from sola_edge.cache import cache_folder
from sola_edge.errors import UserError
from sola_edge.files import replace_file, sha256_file
from sola_edge.gguf_source import shards
from sola_edge.progress import console

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("runtime_checks", "exporters", "sola_edge")  # whose code says what is measured and how
Model = TypeVar("Model", bound=BaseModel)


class Kept:
    """Finds and keeps results. fresh: none is found, and what is measured takes the place of what was kept."""

    def __init__(self, *, fresh: bool = False, more_packages: Sequence[str] = ()) -> None:
        self.fresh, self.packages = fresh, packages(*more_packages)
        self._hashes: dict[Path, dict[str, str]] = {}

    def hashes(self, path: Path) -> dict[str, str]:
        """SHA-256 of an artefact's files by name, every shard of a GGUF file among them."""
        if path not in self._hashes:
            self._hashes[path] = {str(name): sha256_file(file) for name, file in sorted(_files(path).items())}
        return self._hashes[path]

    def place(self, artefact: Artefact, runtime: str, threads: int, **asked: Any) -> Path:
        """The file of a result. asked: all that it depends on beside the artefact, as JSON has it."""
        here = machine(threads)
        known = {
            "code": code_hash(),
            "files": self.hashes(artefact.path),
            "runtime": runtime,
            "packages": {**self.packages, "python": here.python},
            "processor": here.processor,
            "threads": threads,
            "asked": asked,
        }
        key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        return cache_folder("results") / f"{key[:32]}.json"

    def find(self, model: type[Model], place: Path) -> Model | None:
        """The result that is kept there, None where there is none that can be read."""
        if self.fresh or not place.is_file():
            return None
        try:
            return model.model_validate_json(place.read_bytes())
        except ValidationError:  # of another version of the model, or damaged: it is measured anew
            return None

    def keep(self, found: BaseModel, place: Path) -> None:
        """Keep a result. Where the cache cannot be written, a line on stderr says so: what was measured is worth more."""
        try:
            with replace_file(place) as partial:
                partial.write_text(found.model_dump_json(), encoding="utf-8")
        except (UserError, OSError) as error:
            console.print(f"the result is not kept for later runs: {error}", style="yellow", markup=False)


@cache
def code_hash() -> str:
    """SHA-256 of this project's own Python files."""
    total = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            total.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()


def _files(path: Path) -> dict[Path, Path]:
    """The files of an artefact by what the hash knows them by: names in a folder, numbers of a GGUF file and its shards."""
    if path.is_dir():
        return {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
    return {Path(str(number)): file for number, file in enumerate(shards(path))}
