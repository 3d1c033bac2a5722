"""The runtimes: one row each. A row names the module whose `Runtime` class runs in a child process of its own.

Such a class has (ids: list[int]; times in seconds; logits float32):
    __init__(path, threads, context, device)   imports the runtime library, nothing else; device: the runtime's name for it
    load()                             the model, for up to `context` tokens
    version                            of the library
    logits(ids) -> (n, vocab)          of every position, from an empty context
    nll(ids) -> (n - 1,)               optional: what metrics.window_nll makes of the logits, float64
    reset()                            to an empty context
    append(ids) -> (n, vocab)          of ids from where the context is
    tokens(text) -> ids                optional: what it makes of a text of its own accord
    prefill(ids) -> seconds            ids in one go, computing what a user of the runtime would need next
    decode(count) -> seconds           count single-token steps from where the context is
    batch(ids, count, sequences) -> (seconds, seconds, ids)    that many sequences of the same ids from an empty context until
                                       the first new token of each is chosen; then count greedy steps of all of them
    generate(ids, count, eos) -> (ids, logits (steps, vocab) or None)    greedy, up to and including an EOS
    bos() -> id or None                optional: what it puts before a text of its own accord
    parts() -> {name: bytes}           what the runtime itself tells of its memory
and imports neither sola_edge nor another runtime (torch_ excepted: it needs sola_edge to load a checkpoint).
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from runtime_checks.runtimes.devices import (
    CPU,
    DEVICES,
    Device,
    genai_provider,
    ggml_device,
    provider,
    torch_device,
)


@dataclass(frozen=True)
class RuntimeRow:
    """One runtime on the CPU or on `device`: what it is called, what it runs, what it needs, how its speed is measured."""

    name: str
    module: str
    kind: str
    missing: Callable[[], str | None]  # why it cannot run here, None when it can
    environment: Callable[[], dict[str, str]] = dict
    needs_file: str | None = None  # of a folder artefact
    tool: str = "child process"
    every_logit: bool = False  # whether a prefill computes the logits of all positions
    devices: Mapping[str, Device] = field(default_factory=dict)  # beside the CPU
    device: str = CPU

    @property
    def label(self) -> str:
        """What results call it: its name, and the device where that is not the CPU."""
        return self.name if self.device == CPU else f"{self.name} ({self.device})"

    @property
    def known(self) -> str:
        """The runtime's own name for its device."""
        return CPU if self.device == CPU else self.devices[self.device].known

    def absent(self) -> str | None:
        """Why it cannot run here on its device, None when it can."""
        reason = self.missing()
        if reason is not None or self.device == CPU:
            return reason
        if self.device not in self.devices:
            return f"{self.name} knows no {self.device}; it runs on {', '.join((CPU, *self.devices))}"
        return self.devices[self.device].absent()

    @property
    def prefill_note(self) -> str:
        """What a prefill computes, in words."""
        return (
            "logits of all positions, as the graph has them" if self.every_logit else "logits of the last position only"
        )


def _package(name: str, extra: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        if importlib.util.find_spec(name) is None:
            return f"the Python package {name.replace('_', '-')} is not installed (pip install 'sola-edge[{extra}]')"
        return None

    return missing


def _llama_cpp_missing() -> str | None:
    try:
        from exporters import llama_cpp
    except ImportError as error:
        return f"exporters.llama_cpp cannot be imported: {error}"
    build = llama_cpp.find()
    if build is None:
        return "no llama.cpp build was found (make one with `sola-edge llama-cpp build`; it needs a C++ compiler)"
    if not build.python.is_dir():
        return f"the llama.cpp in {build.folder} has no Python bindings: they fit the pinned version alone"
    return None


def _llama_cpp_environment() -> dict[str, str]:
    from exporters import llama_cpp

    build = llama_cpp.find()
    if build is None:
        raise RuntimeError("no llama.cpp build")
    return {"SOLA_EDGE_LLAMA_CPP_PYTHON": str(build.python), "LLAMA_CPP_LIB_PATH": str(build.lib)}


RUNTIMES = {
    row.name: row
    for row in (
        RuntimeRow(
            "torch",
            "torch_",
            "checkpoint",
            _package("torch", "all"),
            devices={"cuda": torch_device("cuda", "cuda"), "metal": torch_device("mps", "backends.mps")},
        ),
        RuntimeRow(
            "onnxruntime",
            "onnxruntime_",
            "onnx",
            _package("onnxruntime", "onnx"),
            needs_file="model.onnx",
            every_logit=True,
            devices={
                "cuda": provider("CUDAExecutionProvider", "onnxruntime-gpu"),
                "directml": provider("DmlExecutionProvider", "onnxruntime-directml"),
            },
        ),
        RuntimeRow(
            "onnxruntime-genai",
            "genai_",
            "onnx",
            _package("onnxruntime_genai", "onnx"),
            needs_file="genai_config.json",
            every_logit=True,
            devices={
                "cuda": genai_provider("cuda", "is_cuda_available", "onnxruntime-genai-cuda"),
                "directml": genai_provider("dml", "is_dml_available", "onnxruntime-genai-directml"),
            },
        ),
        RuntimeRow(
            "llama.cpp",
            "llama_cpp_",
            "gguf",
            _llama_cpp_missing,
            _llama_cpp_environment,
            tool="llama-bench",
            devices={
                "cuda": ggml_device("CUDA", "-DGGML_CUDA=ON"),
                "vulkan": ggml_device("Vulkan", "-DGGML_VULKAN=ON"),
                "metal": ggml_device("MTL", "-DGGML_METAL=ON"),
            },
        ),
    )
}


def runtimes_for(kind: str, path: Path, device: str = CPU) -> list[RuntimeRow]:
    """The rows, on a device, that run an artefact of this kind at this path, the plainest first."""
    rows = [row for row in RUNTIMES.values() if row.kind == kind]
    return [replace(row, device=device) for row in rows if row.needs_file is None or (path / row.needs_file).exists()]


def check_runtimes(names: Iterable[str] | None) -> None:
    """Raises UserError for a name that is no runtime's."""
    from sola_edge.errors import UserError  # here, for the children import this table and nothing of sola_edge

    for name in names or ():
        if name not in RUNTIMES:
            raise UserError(f"there is no runtime {name!r}; choose of: {', '.join(RUNTIMES)}")


def check_device(name: str) -> None:
    """Raises UserError for a name that is no device's."""
    from sola_edge.errors import UserError

    if name not in DEVICES:
        raise UserError(f"there is no device {name!r}; choose of: {', '.join(DEVICES)}")
