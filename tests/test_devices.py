"""Devices: one that is not here is refused in a line, and no runtime computes elsewhere than it was asked to."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from runtime_checks.checks import bench, check_parity, measure_perplexity
from runtime_checks.gpu_memory import gpu_memory
from runtime_checks.memory_curve import memory_curves
from runtime_checks.process import CheckError, Child
from runtime_checks.runtimes import RUNTIMES, RuntimeRow
from runtime_checks.runtimes.devices import DEVICES, Device, listed_device
from runtime_checks.throughput_grid import Grid, throughput_curves
from sola_edge.cli import app
from sola_edge.errors import UserError


def elsewhere(runtime: str, device: str) -> RuntimeRow:
    """The runtime's row on that device; the test is skipped where there is one."""
    row = replace(RUNTIMES[runtime], device=device)
    if row.absent() is None:
        pytest.skip(f"{runtime} has {device} here")
    return row


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_device_of_the_table_is_one_that_can_be_asked_for() -> None:
    for row in RUNTIMES.values():
        assert set(row.devices) < set(DEVICES)
        assert (row.label, row.known) == (row.name, "cpu")
        for name, device in row.devices.items():
            there = replace(row, device=name)
            assert (there.label, there.known) == (f"{row.name} ({name})", device.known)


def test_a_device_that_a_runtime_does_not_know_is_told_with_those_that_it_does() -> None:
    row = RuntimeRow("some", "some", "onnx", lambda: None, devices={"cuda": Device("x", lambda: "no x here")})
    assert replace(row, device="metal").absent() == "some knows no metal; it runs on cpu, cuda"
    assert replace(row, device="cuda").absent() == "no x here"
    assert row.absent() is None
    assert replace(row, device="cuda", missing=lambda: "not installed").absent() == "not installed"


@pytest.mark.parametrize(("runtime", "device"), [(r.name, d) for r in RUNTIMES.values() for d in r.devices])
def test_a_device_that_is_not_here_is_told_in_a_line_with_what_to_do(
    runtime: str, device: str, llama_cpp_build: object
) -> None:
    reason = elsewhere(runtime, device).absent()
    assert reason is not None and "\n" not in reason
    assert ("pip install" in reason) or ("llama-cpp build" in reason) or runtime == "torch"


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["throughput", "memory", "bench", "perplexity", "parity", "accuracy --tasks questions.jsonl"]
)
def test_a_check_on_a_device_that_is_not_here_ends_with_a_line_and_code_2(dense: Path, command: str) -> None:
    elsewhere("torch", "cuda")
    name, *options = command.split()
    if name == "accuracy":
        pytest.importorskip("lm_eval")
    paths = [str(dense)] * (2 if name == "parity" else 1)
    done = CliRunner().invoke(app, ["check", name, *paths, *options, "--device", "cuda"])
    assert done.exit_code == 2 or isinstance(done.exception, UserError)
    assert "finds no cuda device" in str(done.exception or done.output)


def test_a_name_that_is_no_device_is_refused_with_those_that_are(dense: Path) -> None:
    complaint = r"there is no device 'tpu'; choose of: cpu, cuda, vulkan, metal, directml"
    for run in (
        lambda: throughput_curves([dense], Grid(), device="tpu"),
        lambda: memory_curves([dense], [64], device="tpu"),
        lambda: bench([dense], device="tpu"),
        lambda: measure_perplexity(dense, "text", device="tpu"),
        lambda: check_parity(dense, [dense], "text", device="tpu"),
    ):
        with pytest.raises(UserError, match=complaint):
            run()


# --- in the process --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "device", "complaint"),
    [
        ("onnxruntime", "cuda", "could not start CUDAExecutionProvider"),
        ("onnxruntime-genai", "cuda", "(cuda|CUDA|Cuda)"),
        ("torch", "cuda", "(cuda|CUDA|Cuda)"),
    ],
)
def test_a_runtime_does_not_fall_back_to_the_cpu(
    dense: Path, onnx_folder: Path, runtime: str, device: str, complaint: str
) -> None:
    row = elsewhere(runtime, device)
    with pytest.raises(CheckError, match=rf"{runtime} \({device}\) on .*load failed.*{complaint}"):
        Child(row, dense if runtime == "torch" else onnx_folder, 1, 16)


@pytest.mark.slow
def test_llama_cpp_does_not_fall_back_to_the_cpu(dense: Path, llama_cpp_build: object, tmp_path: Path) -> None:
    pytest.importorskip("exporters.gguf").export(dense, tmp_path / "m.gguf", "f16")
    row = elsewhere("llama.cpp", "vulkan")
    with pytest.raises(CheckError, match=r"llama.cpp \(vulkan\) on .*this llama.cpp finds no Vulkan device"):
        Child(row, tmp_path / "m.gguf", 1, 16)


def test_llama_bench_s_list_is_read_by_the_beginning_of_a_name(tmp_path: Path) -> None:
    tool = tmp_path / "llama-bench"
    lines = "Available devices:\n  CUDA0: NVIDIA A100 (40960 MiB, 40000 MiB free)\n  CUDA1: another\n  Vulkan0: NVIDIA A100\n"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}END\n")
    tool.chmod(0o755)
    assert listed_device(str(tool), "CUDA") == "CUDA0"
    assert listed_device(str(tool), "Vulkan") == "Vulkan0"
    assert listed_device(str(tool), "MTL") is None


class Driver:
    """NVIDIA's library as far as it is asked: two devices, of which processes 7 and 8 hold memory."""

    NVMLError = RuntimeError
    HELD: ClassVar = [[(7, 100), (8, 50)], [(7, 30), (9, None)]]

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int:
        return len(self.HELD)

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in self.HELD[handle]]


def test_memory_of_a_gpu_is_summed_over_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver())
    assert [gpu_memory(pid) for pid in (7, 8, 9, 10)] == [130, 50, None, None]


def test_memory_of_a_gpu_is_not_told_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Driver) -> None:
        raise Driver.NVMLError("no driver")

    monkeypatch.setattr(Driver, "nvmlInit", absent)
    monkeypatch.setitem(sys.modules, "pynvml", Driver())
    assert gpu_memory(7) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # an ImportError
    assert gpu_memory(7) is None
