"""The resident peak of a command, as the system counts it.

Linux lets a child begin with its parent's peak (it is the parent until it executes), so the command is started by an
interpreter that has loaded nothing: what is below some 10 MB cannot be told.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence

LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) and 1)
"""


def peak_of(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """(bytes, what it wrote to stderr). Raises CalledProcessError, with its stderr, when it fails."""
    launched = [sys.executable, "-S", "-c", LAUNCHER, *command]
    done = subprocess.run(launched, capture_output=True, text=True, errors="replace", check=True, env=environment)
    return int(done.stdout) * 1024, done.stderr
