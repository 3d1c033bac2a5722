"""Running the tools of a build."""

import subprocess
from collections.abc import Callable, Sequence

# On a busy machine they lose lines at their end now and then, and end with code 0 (ggml-org/llama.cpp#22142).
TRIES = 10


def run_tool(
    command: Sequence[str], whole: Callable[[str], bool] = lambda _: True
) -> tuple[subprocess.CompletedProcess[str], str]:
    """(the ended process, all that it told); run up to `TRIES` times where it succeeds and what it told is not `whole`."""
    for _ in range(TRIES):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        told = done.stderr + done.stdout
        if done.returncode or whole(told):
            break
    return done, told
