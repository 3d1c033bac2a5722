"""The parent's side of a child process: start it, ask it, and say clearly what happened when it died."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from runtime_checks.launcher import SUPPORTED, launched, peak_told
from runtime_checks.machine import others_busy, waiting_policy
from runtime_checks.runtimes import RuntimeRow

ROOT = Path(__file__).resolve().parent.parent


class CheckError(Exception):
    """A runtime failed on an artefact: one line that names both. A failed check, not a mistake of the user's."""


class Child:
    """One model in one runtime in a fresh process; a context manager. Requests raise CheckError when they fail.

    counted: `system_peak` is then, once it is closed, the resident peak that the system itself counted (see launcher.py).
    """

    def __init__(self, row: RuntimeRow, path: Path, threads: int, context: int, *, counted: bool = False) -> None:
        self.row, self.path = row, path.resolve()
        self.system_peak: int | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="sola-edge-")
        self._told = Path(self._folder.name) / "peak"
        command = [sys.executable, "-m", "runtime_checks.child", row.module]
        self._launched = counted and SUPPORTED
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed in close)
        self._process = subprocess.Popen(
            launched(command, self._told) if self._launched else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            cwd=ROOT,  # found there even when the package is not installed
            env=_environment(row, threads),
            text=True,
            start_new_session=self._launched,  # so that a launcher can be killed with what it launched
        )
        try:
            self.loaded = self.ask("load", path=str(self.path), threads=threads, context=context, device=row.known)
        except BaseException:
            self._kill()
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The number of the process that holds the model, which is not the launcher's."""
        return int(self.loaded["pid"])

    def ask(self, request: str, **arguments: Any) -> Any:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": request, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise CheckError(
                f"{self._where()}: the process {self._how_it_ended()} during {request!r}{self._last_words()}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise CheckError(f"{self._where()}: {request} failed: {answer['error']}")
        return answer["ok"]

    def _where(self) -> str:
        return f"{self.row.label} on {self.path}"

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        if code < 0:
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"was killed by {signal.Signals(-code).name}{hint}"
        return f"ended with code {code}"

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return f": {lines[-1]}" if lines else ""

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()
        self.system_peak = peak_told(self._told)
        self._folder.cleanup()
        self._stderr.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._kill()
        self.close()

    def _kill(self) -> None:
        if self._launched:  # its group: the launcher may have ended before what it launched
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()


def _environment(row: RuntimeRow, threads: int) -> dict[str, str]:
    quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    pools = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {**os.environ, **quiet, **pools, **waiting_policy(others_busy()), **row.environment()}
