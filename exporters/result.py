"""What an exporter returns."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportResult:
    """An export: `path` is what a runtime is given, `files` all that was written, `bytes` their total size."""

    path: Path
    files: tuple[Path, ...]
    bytes: int
