"""What this machine can do at most: the bandwidth of its memory and its rate of fp32 matrix products.

`python -m runtime_checks.limits THREADS` measures both in PyTorch and prints them as JSON; `machine_limits` does that in a
process of its own, for the library's threads to be as many as asked. As STREAM (McCalpin) has it, arrays are at least four
times the last caches, where memory allows, and the best of several runs counts: it is a limit. Bandwidth is that of the
fastest of three kernels (bytes that they read and write, without what a processor reads in order to write): a sum, matrix ×
vector, which is what decoding does, and STREAM's triad.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from runtime_checks.frozen import Frozen
from sola_edge.errors import UserError

LEAST, CACHES = 256_000_000, 4  # bytes of an array at least; times the last cache
SIDE = 2048  # of the matrices that are multiplied
RUNS = 5
ROOT = Path(__file__).resolve().parent.parent


class Limits(Frozen):
    """With so many threads. bandwidth: bytes/s by kernel; gemm: floating point operations (fp32) per second."""

    threads: int
    array: int  # bytes of an array
    bandwidth: dict[str, float]
    gemm: float

    @property
    def memory(self) -> float:
        """Bytes per second of the fastest kernel."""
        return max(self.bandwidth.values())


def machine_limits(threads: int) -> Limits:
    """Measured in a fresh process, in some seconds. Raises UserError where that process fails."""
    pools = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [sys.executable, "-m", "runtime_checks.limits", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **pools})
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
        raise UserError(f"the machine's limits cannot be measured ({last}); free some memory, then run this again")
    return Limits.model_validate_json(done.stdout)


def last_caches(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of the last caches of all cores that we may use, each counted once; 0 where Linux tells of none."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    found: dict[str, tuple[int, int]] = {}
    for core in cores:
        levels = [_cache(folder) for folder in (root / f"cpu{core}" / "cache").glob("index*")]
        if levels:
            level, size, shared = max(levels)
            found[shared] = (level, size)
    return sum(size for _, size in found.values())


def _cache(folder: Path) -> tuple[int, int, str]:
    """Its level, bytes, and the cores that share it."""
    text = (folder / "size").read_text().strip()
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
    level, shared = ((folder / name).read_text().strip() for name in ("level", "shared_cpu_list"))
    return int(level), int(text.rstrip("KMG")) * unit, shared


def array_bytes() -> int:
    """Of the arrays that are read: past the caches, but no more than a sixteenth of the memory that is free."""
    import psutil

    return min(max(LEAST, CACHES * last_caches()), psutil.virtual_memory().available // 16)


def _best(run: Callable[[], object]) -> float:
    """Seconds of the fastest run but the first."""
    seconds = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _measure(threads: int) -> Limits:
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    count = array_bytes() // 4
    a, b, c = (torch.full((count,), 1.0 + i) for i in range(3))
    width = 4096
    rows = count // width
    matrix, vector = a[: rows * width].view(rows, width), torch.ones(width)
    moved: dict[str, tuple[Callable[[], object], int]] = {  # kernel: what is run, and how many bytes it moves
        "sum": (partial(torch.sum, a), 4 * count),
        "matrix × vector": (lambda: torch.mv(matrix, vector), 4 * rows * width),
        "triad": (lambda: torch.add(b, c, alpha=3.0, out=a), 3 * 4 * count),
    }
    bandwidth = {name: size / _best(run) for name, (run, size) in moved.items()}
    left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    gemm = 2 * SIDE**3 / _best(lambda: left @ right)
    return Limits(threads=threads, array=4 * count, bandwidth=bandwidth, gemm=gemm)


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1])).model_dump()))
