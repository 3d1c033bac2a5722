"""Speed and memory of the exported ONNX graphs, measured on this machine; run it on a quiet one.

    python benchmarks/onnx_speed.py builder smollm2    our graph against that of onnxruntime-genai's own builder, SmolLM2-135M
    python benchmarks/onnx_speed.py builder 1b         the same, a random model of TinyLlama-1.1B's shape
    python benchmarks/onnx_speed.py hybrid             compressed random models of that shape against the dense one
    python benchmarks/onnx_speed.py memory             resident peak of fresh onnxruntime processes, the same models

Options: --precision fp32,int4  --prompt 512 --generate 128 --rounds 5 --threads N  --work DIR (keeps models and exports;
what is there is used as it is)  --out FILE.json; `hybrid` and `memory` also --kinds hybrid,pivoted,narrow --rate 0.3; random
models --hidden, --ffn, --layers, --heads, --kv-heads, --vocab, --context.

Speed is that of onnxruntime-genai: prefill of a prompt and single-token decoding, tokens per second. Every graph lives in a
process of its own, the two of a comparison take turns (A B A B …, then, started anew, B A B A …) after a warm-up and a round
that is dropped, and a ratio is that of one round: its median over all rounds, and the least and the most. Memory is the peak
of a fresh process per round that loads the graph in onnxruntime, reads a prompt and decodes some tokens. The size of a graph
is that of model.onnx and its weights, without tokenizer and configuration. Nothing is asserted: a line says what was wanted.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genai_builder import build
from random_models import KINDS, Shape, work_folder
from rich.console import Console
from speed import (
    Exported,
    Load,
    RandomModels,
    Row,
    add_load,
    check_kinds,
    load_of,
    main_of,
    peaks,
    print_facts,
    print_rows,
    record,
    rows_of,
    speeds,
)

from exporters.onnx import PRECISIONS, export
from sola_edge.checkpoint import copy_checkpoint, open_checkpoint
from sola_edge.errors import UserError
from sola_edge.smollm2 import smollm2_gguf

AS_FAST = 0.98  # wanted of our dense graph against the builder's, and of narrow models per byte saved
HYBRID_SHARE = 0.95  # wanted of low-rank models, of the ratio of bytes
MEMORY_SLACK = 1.03  # times the ratio of bytes
SPEED, MEMORY = "onnxruntime-genai", "onnxruntime"


@dataclass
class Models(RandomModels):
    """Checkpoints and graphs."""

    def smollm2(self) -> Path:
        """SmolLM2-135M as a dense Hugging Face folder."""
        target = self.folder / "smollm2" / "checkpoint"
        return self.made(target, lambda: copy_checkpoint(open_checkpoint(smollm2_gguf()), target))

    def ours(self, checkpoint: Path, precision: str) -> Path:
        """Our graph of a checkpoint. Raises UserError, for a precision that there is not too."""
        if precision not in PRECISIONS:
            raise UserError(f"our exporter has no {precision} yet (it has {', '.join(PRECISIONS)})")
        target = checkpoint.with_name(precision)
        return self.made(target, lambda: export(checkpoint, target, graph="genai", precision=precision))

    def builders(self, checkpoint: Path, precision: str) -> Path:
        """The builder's graph of a dense checkpoint. Raises BuilderError."""
        target = checkpoint.with_name(f"builder-{precision}")
        return self.made(target, lambda: build(checkpoint, target, precision))


def graph(name: str, folder: Path) -> Exported:
    """An exported graph; its bytes are those of the graph and its weights."""
    return Exported(name, folder, sum(path.stat().st_size for path in folder.glob("model.onnx*")), SPEED, MEMORY)


def against_builder(models: Models, which: str, precisions: Sequence[str], load: Load) -> list[Row]:
    """Our dense graph against the builder's: `which` is smollm2 or 1b. Rows without figures say why."""
    checkpoint = models.smollm2() if which == "smollm2" else models.random("dense")

    def measure(candidate: str, baseline: str, precision: str) -> list[Row]:
        ours = graph(candidate, models.ours(checkpoint, precision))
        return speeds(ours, graph(baseline, models.builders(checkpoint, precision)), precision, load, AS_FAST)

    return rows_of([(f"{which} ours", "builder's", precision) for precision in precisions], measure)


def against_dense(
    models: Models, kinds: Sequence[str], precisions: Sequence[str], load: Load, memory: bool = False
) -> list[Row]:
    """Compressed random models against the dense one of their shape: speed, or with `memory` the resident peak.

    Rows without figures say why.
    """

    def measure(candidate: str, baseline: str, precision: str) -> list[Row]:
        first, second = (graph(kind, models.ours(models.random(kind), precision)) for kind in (candidate, baseline))
        if memory:
            return [peaks(first, second, precision, load, MEMORY_SLACK)]
        share = AS_FAST if candidate == "narrow" else HYBRID_SHARE
        return speeds(first, second, precision, load, share, per_byte=True)

    return rows_of([(kind, "dense", precision) for precision in precisions for kind in kinds], measure)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options, None for this process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    builder = commands.add_parser("builder", help="our dense graph against that of onnxruntime-genai's builder")
    builder.add_argument("model", choices=("smollm2", "1b"))
    against = [commands.add_parser("hybrid", help="compressed against dense: speed")]
    against.append(commands.add_parser("memory", help="compressed against dense: resident peak in onnxruntime"))
    for command in against:
        command.add_argument("--kinds", default=",".join(KINDS))
        command.add_argument("--rate", type=float, default=0.3)
    for command in (builder, *against):
        command.add_argument("--precision", default="fp32,int4")
        add_load(command)
    return parser.parse_args(arguments)


def run(asked: argparse.Namespace, console: Console) -> list[Row]:
    """Run one benchmark as asked, print it and write its JSON. Raises UserError for impossible options."""
    load = load_of(asked)
    precisions = asked.precision.split(",")
    with work_folder(asked.work) as folder:
        models = Models(folder, Shape.asked(asked), getattr(asked, "rate", 0.3))
        if asked.benchmark == "builder":
            rows = against_builder(models, asked.model, precisions, load)
        else:
            kinds = asked.kinds.split(",")
            check_kinds(kinds)
            rows = against_dense(models, kinds, precisions, load, memory=asked.benchmark == "memory")
        print_facts(models.facts, console)
        print_rows(rows, console)
        if asked.out:
            asked.out.write_text(json.dumps(record(asked, models.facts, rows, load), indent=2))
    return rows


if __name__ == "__main__":
    main_of(run, parse())
