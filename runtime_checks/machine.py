"""Where figures were measured: processor, cores, memory, versions."""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import psutil

from runtime_checks.schema import BUSY, Machine
from sola_edge.cores import usable_cores

PACKAGES = (
    "sola-edge",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-genai",
    "onnxruntime-genai-cuda",
    "onnxruntime-genai-directml",
    "gguf",
    "nvidia-ml-py",
)


BUSY_SECONDS = 0.3


def others_busy() -> float:
    """Share of all cores that is in use right now, over `BUSY_SECONDS`; call it while nothing of ours runs."""
    return psutil.cpu_percent(interval=BUSY_SECONDS) / 100


def waiting_policy(busy: float) -> dict[str, str]:
    """Environment that lets OpenMP threads sleep while they wait, where other programs are busy; {} where they are not.

    Spinning is faster on a quiet machine (PyTorch's decode by half), and ruinous beside other work: 256 + 8 tokens of
    SmolLM2 in llama.cpp took 24 s against 1.3 s.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE"} if busy > BUSY else {}


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads not counted."""
    allowed = usable_cores()
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def checked_threads(threads: int | None) -> int:
    """The asked number of threads, never more than there are cores (llama.cpp's barriers would crawl)."""
    cores = physical_cores()
    return cores if not threads or threads < 1 else min(threads, cores)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(threads: int) -> Machine:
    """This machine."""
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        processor=_processor(),
        cores=physical_cores(),
        threads_used=threads,
        memory=psutil.virtual_memory().total,
        python=sys.version.split()[0],
    )


def run_record(threads: int) -> dict[str, Any]:
    """Who measures, when and where: `created` (UTC, ISO 8601), `command` and `machine` of a result on disk."""
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "machine": machine(threads),
    }


def packages(*more: str) -> dict[str, str]:
    """Versions of what computes, where installed, and of `more`; llama.cpp's from its build."""
    found = {}
    for name in (*PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, **_llama_cpp()}


def _llama_cpp() -> dict[str, str]:
    try:
        from exporters import llama_cpp

        build = llama_cpp.find()
        if build is None:
            return {}
        facts = build.manifest()
    except (ImportError, OSError, ValueError):
        return {}
    told = [str(facts[key]) for key in ("version", "llama_cpp_commit") if isinstance(facts.get(key), str)]
    if not told:
        return {}
    # two builds of one release differ by our addition, by what cmake was told, or by a checkout of one's own
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return {"llama.cpp": ", ".join([*told, f"build {digest}"])}
