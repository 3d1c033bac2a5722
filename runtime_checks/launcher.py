"""Start a program so that the system's own count of its memory is its own, as `/usr/bin/time -v` would tell it.

wait4's ru_maxrss of a program begins with the resident peak of the process that started it (which it is, until it executes),
so it is started by an interpreter that has loaded nothing: what is below some 10 MB cannot be told.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

SUPPORTED = hasattr(os, "wait4")
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
LAUNCHER = """
import os, signal, subprocess, sys
child = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(child.pid, 0)
with open(sys.argv[1], "w") as told:
    told.write(str(usage.ru_maxrss))
code = os.waitstatus_to_exitcode(status)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def launched(command: Sequence[str], told: Path) -> list[str]:
    """The command that runs the command, ends as it ends, and leaves in `told` what `peak_told` reads."""
    return [sys.executable, "-S", "-c", LAUNCHER, str(told), *command]


def peak_told(told: Path) -> int | None:
    """Resident peak in bytes of what `launched` has run; None when it did not come to its end."""
    text = told.read_text() if told.exists() else ""
    return int(text) * UNIT if text else None
