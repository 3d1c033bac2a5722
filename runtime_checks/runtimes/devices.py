"""Devices: what a runtime needs to be there for each, asked before anything is started. All of them run on the CPU.

A row of `RUNTIMES` has, by the device's name, what that runtime calls it and a probe: why it cannot be used, None when it can.
Probes import the library or start its tool, so they run in the parent and only for a device that was asked for.
"""

import importlib
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

CPU = "cpu"
PATIENCE = 60  # seconds for a tool to list its devices
ALL_LAYERS = 999  # of a model, on a device
DEVICES = (CPU, "cuda", "vulkan", "metal", "directml")
LISTED = re.compile(r"^\s+(\w+): ", re.MULTILINE)  # of llama-bench --list-devices


@dataclass(frozen=True)
class Device:
    """A device in a runtime: `known` is the runtime's name for it, `absent` says why it cannot be used here."""

    known: str
    absent: Callable[[], str | None]


def torch_device(known: str, module: str) -> Device:
    """Of PyTorch: `torch.<module>.is_available()`."""

    def absent() -> str | None:
        import torch

        if importlib.import_module(f"torch.{module}").is_available():
            return None
        return f"torch {torch.__version__} finds no {known} device"

    return Device(known, absent)


def provider(known: str, package: str) -> Device:
    """Of ONNX Runtime: an execution provider that the installed package has."""

    def absent() -> str | None:
        import onnxruntime

        if known in onnxruntime.get_available_providers():
            return None
        return f"this onnxruntime has no {known} (pip install {package} in its place)"

    return Device(known, absent)


def genai_provider(known: str, question: str, package: str) -> Device:
    """Of onnxruntime-genai: what `onnxruntime_genai.<question>()` answers."""

    def absent() -> str | None:
        genai = importlib.import_module("onnxruntime_genai")
        if getattr(genai, question)():
            return None
        return f"this onnxruntime-genai has no {known} (pip install {package} in its place)"

    return Device(known, absent)


def ggml_device(prefix: str, cmake: str) -> Device:
    """Of llama.cpp: the first device of the build whose name begins so."""

    def absent() -> str | None:
        from exporters import llama_cpp

        build = llama_cpp.find()
        if build is None:  # the runtime's own row says so
            return None
        try:
            tool = str(build.tool("llama-bench"))
        except KeyError:
            return f"the llama.cpp in {build.folder} has no llama-bench, which tells its devices"
        if listed_device(tool, prefix) is not None:
            return None
        return (
            f"the llama.cpp in {build.folder} finds no {prefix} device "
            f"(build one with `sola-edge llama-cpp build --cmake-arg={cmake}`)"
        )

    return Device(prefix, absent)


@cache
def listed_device(tool: str, prefix: str) -> str | None:
    """The full name of llama.cpp's first device whose name begins so, as llama-bench lists them; None: there is none."""
    try:
        done = subprocess.run([tool, "--list-devices"], capture_output=True, text=True, check=False, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((name for name in LISTED.findall(done.stdout) if name.startswith(prefix)), None)
