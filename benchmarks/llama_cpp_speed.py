"""Speed and memory of exported GGUF files in llama.cpp, measured on this machine; run it on a quiet one.

    python benchmarks/llama_cpp_speed.py [hybrid] [stock] [memory] [nodes] [form]      all but form where none is named

hybrid   low-rank random models of TinyLlama-1.1B's shape against the dense one, in our llama.cpp
stock    narrow ones against the dense one, in an unmodified llama.cpp (built the first time)
memory   the hybrid ones' resident peak and model buffer, with the file mapped and read
nodes    operations of the graph for a layer, dense and hybrid: on a GPU, launches
form     the hybrid ones, an FFN as two networks (ours) against halves that are joined (another build, made the first time)

Options: --types f16,q8_0,q4_k_m  --rate 0.3  --prompt 512 --generate 128 --rounds 5 --threads N  --work DIR (keeps models
and exports; what is there is used as it is)  --out FILE.json; the models' --hidden, --ffn, --layers, --heads, --kv-heads,
--vocab, --context.

Speed is llama-bench's: prefill of a prompt and single-token decoding, tokens per second, each figure by a process of its own.
The two files of a comparison take turns (A B A B …, then B A B A …), the first round of each order is dropped, and a ratio is
that of one round: its median over all rounds, and the least and the most. Memory is a llama-bench process's: its resident
peak as the system counts it, and the model buffers that llama.cpp tells of. Bytes are those of the tensors. Nothing is
asserted: a line says what was wanted.
"""

import argparse
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
from llama_cpp_nodes import nodes
from peak import peak_of
from random_models import Shape, work_folder
from rich.console import Console
from speed import (
    Exported,
    Load,
    RandomModels,
    Row,
    add_load,
    compared,
    load_of,
    main_of,
    print_facts,
    print_rows,
    record,
    rows_of,
    speeds,
)

from exporters.gguf import export
from exporters.llama_cpp import Build, build, edits
from exporters.llama_cpp.build import CHOSEN
from runtime_checks.machine import others_busy
from runtime_checks.process import CheckError
from runtime_checks.throughput import llama_bench_once
from sola_edge.errors import UserError

PARTS = ("hybrid", "stock", "memory", "nodes")
MORE = ("form",)  # where it is named
TWO_NETWORKS = "factors->split("  # of the insertion that makes two networks of an FFN
SHARE = {"f16": 0.97, "q8_0": 0.97, "q4_k_m": 0.95}  # wanted of hybrid models, of the ratio of bytes
OF_BYTES = 0.97  # wanted of all others
SLACK = 1.02  # wanted of memory, times the ratio of bytes
MODES = {"mapped": "mmap", "read": "none"}  # how the file is loaded, and llama-bench's name of it
BUFFER = re.compile(r"model buffer size\s*=\s*([\d.]+) MiB")
FEW, FEW_TOKENS = (2, 4), 320  # layers of the models whose graphs' difference is counted, and their vocabulary
FEW_RATE = 0.1  # which the smallest of them can lose; the graph is the same at any


@dataclass
class Models(RandomModels):
    """Checkpoints and GGUF files."""

    def gguf(self, kind: str, type: str) -> Exported:
        """The random model of a kind in a type. Raises UserError."""
        checkpoint = self.random(kind)
        target = checkpoint.with_name(f"{type}.gguf")
        self.made(target, lambda: export(checkpoint, target, type))
        tensors = gguf.GGUFReader(target).tensors
        size, weights = sum(int(t.n_bytes) for t in tensors), sum(int(t.n_elements) for t in tensors)
        types = Counter(t.tensor_type.name for t in tensors)
        self.facts[kind][type] = {"bits_per_weight": 8 * size / weights, "tensors": dict(types)}
        return Exported(kind, target, size, "llama.cpp", "llama.cpp")


def hybrid(models: Models, types: Sequence[str], load: Load) -> list[Row]:
    """Speed of low-rank models against the dense one, in our llama.cpp."""
    return _speeds("hybrid", models, types, load, build(), SHARE)


def stock(models: Models, types: Sequence[str], load: Load) -> list[Row]:
    """Speed of narrow models against the dense one, in an unmodified llama.cpp."""
    return _speeds("narrow", models, types, load, build(addition=False), {})


def _speeds(
    kind: str, models: Models, types: Sequence[str], load: Load, used: Build, shares: Mapping[str, float]
) -> list[Row]:
    """Of a kind of model against the dense one in that build; shares: wanted of the ratio of bytes, else OF_BYTES."""

    def measure(candidate: str, baseline: str, type: str) -> list[Row]:
        pair = models.gguf(candidate, type), models.gguf(baseline, type)
        with _chosen(used):
            return speeds(*pair, type, load, shares.get(type, OF_BYTES), per_byte=True)

    return rows_of([(kind, "dense", type) for type in types], measure)


@contextmanager
def _chosen(used: Build) -> Iterator[None]:
    """The checks run that build meanwhile."""
    before = os.environ.get(CHOSEN)
    os.environ[CHOSEN] = str(used.folder)
    try:
        yield
    finally:
        del os.environ[CHOSEN]
        if before is not None:
            os.environ[CHOSEN] = before


def form(models: Models, types: Sequence[str], load: Load) -> list[Row]:
    """Speed of a hybrid file in our llama.cpp against the same one without two networks, where every matrix stands alone."""
    builds = (build(), _joined())

    def measure(candidate: str, baseline: str, type: str) -> list[Row]:
        file = models.gguf("hybrid", type)
        busy = others_busy()
        runs = _in_both(file.path, builds, load, busy)
        ours, theirs = (replace(file, name=name) for name in (candidate, baseline))
        tests = (f"pp{load.prompt}", f"tg{load.generate}")
        return [compared(ours, theirs, type, test, runs[0][i], runs[1][i], 1.0, busy) for i, test in enumerate(tests)]

    return rows_of([("two networks", "joined", type) for type in types], measure)


def _joined() -> Build:
    """Our llama.cpp without that insertion."""
    every = edits.INSERTIONS
    edits.INSERTIONS = tuple(one for one in every if TWO_NETWORKS not in one.text)
    try:
        if len(edits.INSERTIONS) != len(every) - 1:
            raise UserError(f"{len(every) - len(edits.INSERTIONS)} insertions have {TWO_NETWORKS!r}, one is wanted")
        return build(targets=("llama-bench",))
    finally:
        edits.INSERTIONS = every


def _in_both(path: Path, builds: Sequence[Build], load: Load, busy: float) -> list[tuple[list[float], list[float]]]:
    """(prefill, decode) speeds of a file by build, in turn, in both orders; the first round of each order is dropped."""
    runs: list[tuple[list[float], list[float]]] = [([], []) for _ in builds]
    once = llama_bench_once(path, load.prompt, load.generate, load.threads)
    for order in ((0, 1), (1, 0)):
        for number in range(1 + load.rounds):
            for i in order:
                with _chosen(builds[i]):
                    prefill, decode = once(busy)
                if number:
                    runs[i][0].append(load.prompt / prefill)
                    runs[i][1].append(load.generate / decode)
    return runs


def memory(models: Models, types: Sequence[str], load: Load) -> list[Row]:
    """Peak and model buffer of hybrid against dense, with the file mapped and read, a process each round and file."""
    used = build()

    def measure(candidate: str, baseline: str, type: str) -> list[Row]:
        pair = models.gguf(candidate, type), models.gguf(baseline, type)
        return [row for how in MODES for row in _memory(used, *pair, type, load, how)]

    return rows_of([("hybrid", "dense", type) for type in types], measure)


def _memory(used: Build, candidate: Exported, baseline: Exported, type: str, load: Load, how: str) -> list[Row]:
    rounds = [tuple(_use(used, file.path, load, how) for file in (candidate, baseline)) for _ in range(load.rounds)]
    wanted = SLACK * candidate.bytes / baseline.bytes
    rows = []
    for i, what in enumerate(("peak", "buffer")):
        ours, theirs = ([pair[side][i] for pair in rounds] for side in (0, 1))
        rows.append(compared(candidate, baseline, type, f"{what}, {how}", ours, theirs, wanted))
    return rows


def _use(used: Build, path: Path, load: Load, how: str) -> tuple[float, float]:
    """(resident peak, model buffers), bytes, of one llama-bench process. Raises CheckError."""
    sizes = ["-p", str(load.prompt), "-n", "8", "-r", "1", "-t", str(load.threads), "-ngl", "0", "-lm", MODES[how]]
    command = [str(used.tool("llama-bench")), "-m", str(path), *sizes, "-v"]
    try:
        peak, told = peak_of(command)
    except subprocess.CalledProcessError as error:
        raise CheckError(f"llama-bench on {path}: {error.stderr.strip().splitlines()[-1:]}") from error
    return float(peak), sum(float(size) for size in BUFFER.findall(told)) * 2**20


def graph_nodes(models: Models) -> dict[str, dict[str, float]]:
    """{kind: {operation: how many for one layer and one token}}, of models of few layers and the shape's other sizes."""
    used, found = build(), {}
    for kind in ("dense", "hybrid"):
        counts = []
        for layers in FEW:
            shape = Shape(**{**vars(models.shape), "layers": layers, "vocab": FEW_TOKENS})
            few = Models(models.folder, shape, FEW_RATE)
            counts.append(nodes(used, few.gguf(kind, "f16").path, 1))
        fewer, more = counts
        found[kind] = {name: (more[name] - fewer[name]) / (FEW[1] - FEW[0]) for name in more | fewer}
    return found


def print_nodes(found: dict[str, dict[str, float]], console: Console) -> None:
    """A line for each kind."""
    for kind, counts in found.items():
        told = ", ".join(f"{count:g} {name}" for name, count in sorted(counts.items()) if count)
        console.print(f"{kind}: {sum(counts.values()):g} operations a layer: {told}", highlight=False, soft_wrap=True)


def print_files(facts: dict[str, dict[str, Any]], console: Console) -> None:
    """Bits a weight and types of each file."""
    for kind, known in facts.items():
        for type, file in known.items():
            if isinstance(file, dict) and "bits_per_weight" in file:
                bits, types = file["bits_per_weight"], ", ".join(f"{n} {name}" for name, n in file["tensors"].items())
                console.print(f"{kind} {type}: {bits:.3f} bits a weight ({types})", highlight=False, soft_wrap=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options, None for this process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", nargs="*", help=f"of {', '.join((*PARTS, *MORE))}")
    parser.add_argument("--types", default=",".join(SHARE))
    parser.add_argument("--rate", type=float, default=0.3)
    add_load(parser)
    return parser.parse_args(arguments)


def run(asked: argparse.Namespace, console: Console) -> list[Row]:
    """Run what is asked, print it and write its JSON. Raises UserError for impossible options."""
    asked.benchmark = asked.benchmark or list(PARTS)
    unknown = [part for part in asked.benchmark if part not in (*PARTS, *MORE)]
    if unknown:
        raise UserError(f"there is no benchmark {unknown[0]!r}; choose from: {', '.join((*PARTS, *MORE))}")
    load, types = load_of(asked), asked.types.split(",")
    build()
    with work_folder(asked.work) as folder:
        models = Models(folder, Shape.asked(asked), asked.rate)
        rows: list[Row] = []
        for name, part in (("hybrid", hybrid), ("stock", stock), ("memory", memory), ("form", form)):
            if name in asked.benchmark:
                rows += part(models, types, load)
        counted = graph_nodes(models) if "nodes" in asked.benchmark else {}
        print_facts(models.facts, console)
        print_files(models.facts, console)
        print_rows(rows, console)
        print_nodes(counted, console)
        if asked.out:
            asked.out.write_text(json.dumps({**record(asked, models.facts, rows, load), "nodes": counted}, indent=2))
    return rows


if __name__ == "__main__":
    main_of(run, parse())
