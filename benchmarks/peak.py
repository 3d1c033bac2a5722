"""The resident peak of a command, as the system counts it (how: see runtime_checks/launcher.py)."""

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime_checks.launcher import launched, peak_told


def peak_of(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """(bytes, what it wrote to stderr). Raises CalledProcessError, with its stderr, when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "peak"
        out = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        done = subprocess.run(launched(command, told), **out, text=True, errors="replace", check=True, env=environment)
        peak = peak_told(told)
    assert peak is not None, "a command that ended well told its peak"
    return peak, done.stderr
