"""A GGUF file as a source of weights: Hugging Face names and orientation, one dequantized tensor at a time.

Names come from gguf's own tensor table, dequantization from gguf's numpy kernels. The llama architecture stores the rows
of q and k permuted for interleaved RoPE; they are put back here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import Keys
from gguf.gguf_writer import SHARD_NAME_FORMAT
from gguf.quants import dequantize

from sola_edge.architecture import COMPONENTS, Architecture, kv_heads
from sola_edge.errors import UserError

SOURCES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)  # model types of which GGUF stores weights as they are, but for q's and k's rows
MOST_SHARDS = 2**16 - 1
INTERLEAVED_ROPE = {"llama", "deci"}  # GGUF architectures whose q and k rows are permuted


class GGUFFile(gguf.GGUFReader):
    """gguf's reader, which follows any length that a file names, but within the file."""

    data: Any

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(path)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if isinstance(self.data, np.memmap):
            self.data = self.data.view(np.ndarray)  # the same bytes; a memmap's slices cost four times as much
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"it ends before byte {int(offset)} + {int(count)}")
        return super()._get(offset, dtype, count, override_order)


def open_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file (parsing a vocabulary takes seconds, so once). Raises UserError when it is none or is cut short."""
    with _reading(path):
        return _open_once(path, path.stat().st_mtime_ns)


def shards(path: Path) -> list[Path]:
    """All files of the model whose first file this is, in their order. Raises UserError for a later shard, or a missing one."""
    reader = open_gguf(path)
    count, number = field(reader, Keys.Split.LLM_KV_SPLIT_COUNT, 1), field(reader, Keys.Split.LLM_KV_SPLIT_NO, 0)
    if not (isinstance(count, int) and isinstance(number, int) and 0 <= number < max(count, 1) <= MOST_SHARDS):
        raise UserError(f"{path} says that it is shard {number} of {count}; fetch it again")
    if count <= 1:
        return [path]
    stem = path.name.removesuffix(SHARD_NAME_FORMAT.format("", number + 1, count))
    files = [path.with_name(SHARD_NAME_FORMAT.format(stem, i + 1, count)) for i in range(count)]
    if number:
        raise UserError(f"{path} is shard {number + 1} of {count} of a model; give the first one, {files[0].name}")
    for file in (path, *files):
        if file not in files or not file.is_file():
            raise UserError(f"{path} is the first of {count} shards, and {files[-1].with_name(file.name)} is not there")
    return files


def stored_tensors(path: Path) -> list[gguf.ReaderTensor]:
    """The tensors of a GGUF file and of the shards that belong to it. Raises UserError."""
    first, *others = shards(path)
    found = list(open_gguf(first).tensors)
    for shard in others:
        with _reading(shard):
            found += GGUFFile(shard).tensors
    return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # the reader meets damage in many ways: ValueError, IndexError, UnicodeDecodeError, …
        raise UserError(f"{path} is no GGUF file, or is truncated or damaged ({error}); fetch it again") from error


@lru_cache(maxsize=2)
def _open_once(path: Path, _modified: int) -> GGUFFile:
    return GGUFFile(path)


def field(reader: GGUFFile, key: str, default: Any = None) -> Any:
    """A metadata value in Python types, `default` where the file lacks it. Raises UserError for text that is none."""
    found = reader.fields.get(key)
    try:
        return default if found is None else found.contents()
    except ValueError as error:
        raise UserError(f"{reader.path} has a damaged {key} ({error}); fetch it again") from error


class GGUFTensors:
    """The tensors of one GGUF file under their Hugging Face names."""

    def __init__(self, path: Path, architecture: Architecture, config: Any) -> None:
        if architecture.model_type not in SOURCES:
            known = ", ".join(SOURCES)
            raise UserError(
                f"{path}: a GGUF of the architecture {architecture.model_type!r} cannot be read (can: {known}); give the folder"
            )
        self._reader = open_gguf(path)
        self._config = config
        self._gguf_architecture = field(self._reader, "general.architecture")
        stored = {t.name: t for t in stored_tensors(path)}
        if "rope_freqs.weight" in stored:
            raise UserError(
                f"{path} has scaled RoPE frequencies, which a GGUF source cannot carry over; give the folder"
            )
        scaling = field(self._reader, f"{self._gguf_architecture}.rope.scaling.type", "none")
        if scaling != "none":
            raise UserError(
                f"{path} has {scaling} RoPE scaling, which a GGUF source cannot carry over; give the folder"
            )
        names = _hf_names(self._gguf_architecture, architecture, config.num_hidden_layers)
        self._tensors = {names[n]: t for n, t in stored.items() if n in names}
        unknown = sorted(set(stored) - set(names))
        if unknown:
            raise UserError(f"{path} has tensors that {architecture.model_type} does not: {', '.join(unknown[:3])}")
        rows = (architecture.q, architecture.k)
        self._permuted: tuple[str, ...] = rows if self._gguf_architecture in INTERLEAVED_ROPE else ()

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def tensor(self, name: str) -> torch.Tensor:
        stored = self._tensors[name]
        try:
            values = np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32).reshape(self.shape(name))
        except NotImplementedError as error:
            kind = stored.tensor_type.name
            raise UserError(
                f"{name} is of the type {kind}, which a GGUF source cannot be of; give the folder"
            ) from error
        module = name.rpartition(".")[0]
        if module.endswith(self._permuted):
            heads = self._config.num_attention_heads
            if module.endswith(self._permuted[1]):
                heads = kv_heads(self._config)
            values = _unpermute(values, heads)
        return torch.from_numpy(values)


def _hf_names(gguf_architecture: str, architecture: Architecture, layers: int) -> dict[str, str]:
    """GGUF tensor name → Hugging Face tensor name, by gguf's own table."""
    by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(by_name[gguf_architecture], layers)
    modules = [architecture.embedding, architecture.final_norm, architecture.head]
    within = [getattr(architecture, component) for component in COMPONENTS]
    within += [*architecture.hidden_norms, *architecture.head_norms]
    modules += [f"{architecture.layer.format(i)}.{part}" for i in range(layers) for part in within]
    names = {}
    for module in modules:
        for kind in ("weight", "bias"):
            base = table.get_name(f"{module}.{kind}", try_suffixes=(".weight", ".bias"))
            if base:
                names[base] = f"{module}.{kind}"
    return names


def _unpermute(values: Any, heads: int) -> Any:
    """Rows of interleaved pairs (x0, y0, x1, y1, …) per head back to halves (x0, x1, …, y0, y1, …)."""
    pairs = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
