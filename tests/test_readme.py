"""The README's commands run, in order, as it prints them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sola_edge.texts import load_text

README = Path(__file__).parents[1] / "README.md"
SECTION = "## Your own model"


def commands() -> list[str]:
    """Lines of the first sh block under `SECTION`, continuation lines joined."""
    section = README.read_text(encoding="utf-8").split(SECTION, 1)[1]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block is not None
    lines = block.group(1).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


@pytest.mark.slow
@pytest.mark.usefixtures("llama_cpp_build")
def test_own_model_section_runs(smollm2: Path, tmp_path: Path) -> None:
    text = load_text("python-docstrings").joined
    (tmp_path / "notes.txt").write_text(text[:40_000], newline="")
    (tmp_path / "other.txt").write_text(text[40_000:60_000], newline="")
    for command in commands():
        program, *arguments = shlex.split(command)
        assert program == "sola-edge"
        filled = [str(smollm2) if argument == "MODEL" else argument for argument in arguments]
        done = subprocess.run(
            [sys.executable, "-m", "sola_edge.cli", *filled], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
