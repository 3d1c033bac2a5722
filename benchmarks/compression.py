"""Time and memory of compression, measured on this machine: against layers, against tokens, and of one large layer.

    python benchmarks/compression.py scaling [--out FILE.json]     random models, each compressed in a fresh process
    python benchmarks/compression.py smollm2 [--windows 16]        SmolLM2-135M: forward-only and the full method
    python benchmarks/compression.py layer [--hidden 4096 --ffn 11008]     the dearest linear algebra of one decoder layer

Time is of the wall, memory the resident peak of the process (both include starting Python and PyTorch). Nothing is asserted: a
line says how far doubling is from doubling.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from peak import peak_of
from rich.console import Console
from rich.table import Table

from sola_edge.calibration import LayerStatistics
from sola_edge.factorize import Metric, damped, factors, spectrum
from sola_edge.neurons import neuron_order, prime_split, refit
from sola_edge.smollm2 import smollm2_gguf
from sola_edge.testing import tiny_checkpoint

HIDDEN, FFN, WINDOW = 256, 768, 256
LAYERS, TOKENS = (4, 8, 16), (4096, 8192, 16384)
COMPRESS = "import sys; from sola_edge.cli import main; sys.argv[0] = 'sola-edge'; main()"


@dataclass(frozen=True)
class Run:
    """One compression in a fresh process with an empty cache: wall seconds, resident peak in bytes."""

    what: str
    layers: int
    tokens: int
    seconds: float
    peak: int


def compressed(what: str, model: Path, layers: int, tokens: int, window: int, options: Sequence[str]) -> Run:
    """Compress in a process of its own. Raises CalledProcessError when it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-c", COMPRESS, "compress", str(model), f"{scratch}/out", "--rate", "0.2"]
        command += ["--window", str(window), "--windows", str(tokens // window), *options]
        environment = {**os.environ, "SOLA_EDGE_CACHE": f"{scratch}/cache"}
        start = time.perf_counter()
        peak, _ = peak_of(command, environment)
        return Run(what, layers, tokens, time.perf_counter() - start, peak)


def scaling() -> list[Run]:
    """Twice the layers, twice the tokens, twice again; the full method."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        models = {n: tiny_checkpoint(Path(folder) / f"{n}", hidden=HIDDEN, ffn=FFN, layers=n) for n in LAYERS}
        for layers in LAYERS:
            found.append(compressed("layers", models[layers], layers, TOKENS[0], WINDOW, full(TOKENS[0], WINDOW)))
        for tokens in TOKENS:
            found.append(compressed("tokens", models[LAYERS[0]], LAYERS[0], tokens, WINDOW, full(tokens, WINDOW)))
    return found


def full(tokens: int, window: int) -> list[str]:
    """Options of the full method: corrected on all windows."""
    return ["--align", "8", "--correction-windows", str(tokens // window)]


def smollm2(windows: int) -> list[Run]:
    """The default method and the forward-only one on so many windows of 2,048 tokens of the built-in text."""
    model, tokens = smollm2_gguf(), windows * 2048
    asked: dict[str, list[str]] = {"no gradients": ["--no-gradients"], "full": []}
    return [compressed(what, model, 30, tokens, 2048, options) for what, options in asked.items()]


def layer(hidden: int, ffn: int) -> dict[str, float]:
    """Seconds of the dearest single steps of `sola` for a decoder layer of that shape, on random statistics, float64.

    A layer has four attention matrices, and its FFN is examined in seven forms.
    """
    torch.manual_seed(0)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str):
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start
        print(f"  {name}: {seconds[name]:.1f} s", flush=True)

    def gram(n: int) -> torch.Tensor:
        x = torch.randn(n, n + n // 4)
        return (x @ x.T / n).double()

    statistics = LayerStatistics(
        {"attention": gram(hidden), "down": gram(ffn)}, torch.empty(0), torch.empty(0), {"q": gram(hidden)}, {}
    )
    metric = Metric(statistics.inputs["attention"], damped(statistics.outputs["q"]))
    square = torch.randn(hidden, hidden)
    with timed("spectrum of one attention matrix"):
        spectrum(square, metric)
    with timed("factors of one attention matrix"):
        factors(square, metric, hidden // 2)
    down = torch.randn(hidden, ffn)
    with timed("order of the neurons"):
        order = neuron_order(down, Metric(statistics.inputs["down"], metric.g)).order
    kept = order[: ffn * 4 // 5]
    with timed("refit after dropping a fifth"):
        narrow = refit(down, statistics.inputs["down"], kept)
    with timed("spectrum of down"):
        spectrum(narrow, Metric(prime_split(statistics.inputs["down"][kept][:, kept], 0).marginal, metric.g))
    return seconds


def ratios(runs: Sequence[Run], size: Callable[[Run], int]) -> str:
    """What each doubling cost."""
    steps = [
        f"×{size(b) / size(a):.2g} costs ×{b.seconds / a.seconds:.2f} time, ×{b.peak / a.peak:.2f} memory"
        for a, b in pairwise(runs)
    ]
    return "; ".join(steps)


def main() -> None:
    """Run one benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("scaling", "smollm2", "layer"))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.benchmark == "layer":
        seconds = layer(asked.hidden, asked.ffn)
        result: object = seconds
    else:
        runs = scaling() if asked.benchmark == "scaling" else smollm2(asked.windows)
        table = Table("what", "layers", "tokens", "seconds", "peak MB")
        for run in runs:
            table.add_row(run.what, *map(str, (run.layers, run.tokens)), f"{run.seconds:.1f}", f"{run.peak / 1e6:.0f}")
        Console().print(table)
        if asked.benchmark == "scaling":
            print("layers:", ratios([r for r in runs if r.what == "layers"], lambda r: r.layers))
            print("tokens:", ratios([r for r in runs if r.what == "tokens"], lambda r: r.tokens))
        result = [asdict(run) for run in runs]
    if asked.out:
        asked.out.write_text(json.dumps({"threads": torch.get_num_threads(), "result": result}, indent=2))


if __name__ == "__main__":
    main()
