"""Where figures were measured: processor, cores, memory, versions."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import psutil

from runtime_checks.schema import Machine

PACKAGES = (
    "sola-edge",
    "torch",
    "transformers",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "gguf",
)


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads not counted."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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


def packages() -> dict[str, str]:
    """Versions of what computes, where installed; llama.cpp's from its build."""
    found = {}
    for name in PACKAGES:
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
    return {"llama.cpp": ", ".join(told)} if told else {}
