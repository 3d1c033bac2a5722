"""onnxruntime-genai's own model builder, run offline in a process of its own on a local checkpoint folder.

    python benchmarks/genai_builder.py -i CHECKPOINT -o FOLDER -p int4 -e cpu -c CACHE      the builder's own options

Two things stand between the builder (0.18) and transformers 4, neither of which touches the graph of a llama: it imports
classes of models that only transformers 5 has, and it iterates over a config's `rope_scaling` though that may be null. Here
the missing classes are empty placeholders, and the checkpoint is shown with `rope_scaling` spelled out.
"""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from sola_edge.errors import UserError
from sola_edge.files import replace_folder

MODULE = "onnxruntime_genai.models.builder"
NOT_THERE = re.compile(r"cannot import name '(\w+)' from 'transformers'")


class BuilderError(UserError):
    """The builder could not make the graph: one line with its own reason."""


def build(checkpoint: Path, folder: Path, precision: str) -> Path:
    """Make the builder's graph for the CPU with its default options; `folder` appears whole. Raises BuilderError."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise BuilderError("onnxruntime-genai is not installed (pip install 'sola-edge[onnx]')")
    with tempfile.TemporaryDirectory() as scratch, replace_folder(folder) as partial:
        source = _legible(checkpoint.resolve(), Path(scratch) / "checkpoint")
        options = ["-i", str(source), "-o", str(partial), "-p", precision, "-e", "cpu", "-c", f"{scratch}/cache"]
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), *options],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode or not (partial / "model.onnx").exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"code {done.returncode}"]
            raise BuilderError(f"onnxruntime-genai's builder failed for {precision}: {lines[-1].strip()}")
    return folder


def _legible(checkpoint: Path, folder: Path) -> Path:
    """The same checkpoint by links, its config without a null `rope_scaling`."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((checkpoint / "config.json").read_text())
    if "rope_parameters" not in config and not config.get("rope_scaling"):
        config["rope_scaling"] = {"rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    """Run the builder on this process's arguments; classes that its imports miss are made up, each once."""
    made_up: set[str] = set()
    while True:
        try:
            runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
            return
        except ImportError as error:
            missing = NOT_THERE.match(str(error))
            if missing is None or missing[1] in made_up:
                raise
            made_up.add(missing[1])
            # the builder's imports replace the module that an earlier `import transformers` got
            setattr(sys.modules["transformers"], missing[1], type(missing[1], (), {}))


if __name__ == "__main__":
    main()
