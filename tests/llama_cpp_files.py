"""GGUF files that the tests of our llama.cpp make out of exported ones: damaged, or adapters for them."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from llama_cpp_runner import architecture_of, llama_cpp_logits, rewritten

from exporters.gguf import export
from exporters.llama_cpp import Build

DAMAGES: dict[str, Callable[[np.ndarray], np.ndarray | None]] = {
    "missing": lambda values: None,
    "a row less": lambda values: values[:-1],
    "a column less": lambda values: values[:, :-1],
    "a row more": lambda values: np.vstack([values, values[:1]]),
    "transposed": lambda values: values.T,
    "one row": lambda values: values[:1],
}


def damaged(model: Path, target: Path, name: str, change: str) -> Path:
    return rewritten(model, target, lambda found, values: DAMAGES[change](values) if found == name else values)


def lora_adapter(path: Path, architecture: str, shapes: dict[str, tuple[int, int]], neurons: int | None = None) -> Path:
    """A random rank-4 adapter for weights of these (n_out, n_in); `neurons`: as many in down, the last ones as zeros."""
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for name, (n_out, n_in) in shapes.items():
        a = rng.normal(size=(4, n_in)).astype(np.float32) / 8
        if neurons and "ffn_down" in name:
            a = np.pad(a, ((0, 0), (0, neurons - n_in)))
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", rng.normal(size=(n_out, 4)).astype(np.float32) / 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check_adapter(build: Build, model: Path, shapes: dict[str, tuple[int, int]], neurons: int, folder: Path) -> None:
    """Check that an adapter does to the model what it does to the same model with its factors multiplied out."""
    dense = export(model.parent / "checkpoint", folder / "dense.gguf", "f32", dense=True).path
    architecture = architecture_of(model)
    of_dense = str(lora_adapter(folder / "of_dense.gguf", architecture, shapes, neurons))
    expected = llama_cpp_logits(build, dense, lora=of_dense)
    found = llama_cpp_logits(build, model, lora=str(lora_adapter(folder / "lora.gguf", architecture, shapes)))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.abs(expected - llama_cpp_logits(build, dense)).max() > 0.1
