"""The only reader and writer of weights.

A checkpoint is a Hugging Face folder (one safetensors file or shards, dense or compressed), a .gguf file, or a hub id.
It is opened lazily: names and shapes at once, one tensor at a time after that, so nobody holds the whole model.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sola_edge.architecture import COMPONENTS, Architecture, architecture_of, matrix_shape
from sola_edge.config import QUANT_METHOD, MatrixLayout
from sola_edge.errors import UserError
from sola_edge.files import replace_folder, sha256_file
from sola_edge.gguf_source import GGUFTensors, field, open_gguf, shards, stored_tensors
from sola_edge.identity import CARD, LEGAL_FILES
from sola_edge.model_card import write_copied_card

PROVENANCE = "sola.json"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 256 * 2**20
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


class Tensors(Protocol):
    """Named weights that are read one at a time."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def tensor(self, name: str) -> torch.Tensor: ...


class SafetensorsFolder:
    """The tensors of a folder's safetensors file or shards, without those named in `ignored`. Raises UserError on damage.

    Buffers that old transformers stored beside the weights are no parameters and are left out.
    """

    def __init__(self, folder: Path, ignored: tuple[str, ...] = ()) -> None:
        self._files = {}
        self._shapes = {}
        self._dtypes = {}
        for path in _shards(folder):
            with _reading(path), safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  (not a dict)
                    if name in ignored or name.endswith(BUFFERS):
                        continue
                    view = shard.get_slice(name)
                    self._files[name] = path
                    self._shapes[name] = tuple(view.get_shape())
                    self._dtypes[name] = _DTYPES.get(view.get_dtype(), torch.float32)

    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def tensor(self, name: str) -> torch.Tensor:
        path = self._files[name]
        with _reading(path), safe_open(path, framework="pt") as shard:
            return shard.get_tensor(name)

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of a tensor, the only ones that are read."""
        path = self._files[name]
        with _reading(path), safe_open(path, framework="pt") as shard:
            return shard.get_slice(name)[rows]


class UnfusedFolder:
    """A folder's tensors, but each fused matrix under the names of its components, which are rows of it.

    A folder that has the components' own tensors (a compressed one) is shown as it is. Raises UserError when the rows of a
    fused matrix are not those of its components.
    """

    def __init__(self, folder: SafetensorsFolder, architecture: Architecture, config: Any) -> None:
        self._folder = folder
        stored = set(folder.names())
        self._rows: dict[str, tuple[str, slice]] = {}
        for module, rows in architecture.fused_rows(config).items():
            for i in range(config.num_hidden_layers):
                for kind in ("weight", "bias"):
                    parent = f"{architecture.layer.format(i)}.{module}"
                    if f"{parent}.{kind}" in stored:
                        stored.remove(f"{parent}.{kind}")
                        self._split(parent, kind, rows)
        self._names = [*(name for name in folder.names() if name in stored), *self._rows]

    def _split(self, module: str, kind: str, rows: Mapping[str, int]) -> None:
        name, start = f"{module}.{kind}", 0
        for part, count in rows.items():
            self._rows[f"{module}.{part}.{kind}"] = name, slice(start, start + count)
            start += count
        found = self._folder.shape(name)
        if found[0] != start:
            raise UserError(f"{name} has shape {found}, its config asks for {start} rows; fetch it again")

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._rows:
            return self._folder.shape(name)
        stored, rows = self._rows[name]
        return rows.stop - rows.start, *self._folder.shape(stored)[1:]

    def dtype(self, name: str) -> torch.dtype:
        return self._folder.dtype(self._rows[name][0] if name in self._rows else name)

    def tensor(self, name: str) -> torch.Tensor:
        return self._folder.rows(*self._rows[name]) if name in self._rows else self._folder.tensor(name)


BUFFERS = ("rotary_emb.inv_freq",)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from error


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted({Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is no safetensors index ({error}); fetch it again") from error
    else:
        names = ["model.safetensors"]
    paths = [folder / name for name in names]
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"{folder} is no checkpoint: {path.name} is missing; give a folder with safetensors weights"
            )
    return paths


@dataclass(frozen=True)
class Checkpoint:
    """An opened model: config, architecture and lazily read weights under their Hugging Face names."""

    path: Path
    config: PretrainedConfig
    architecture: Architecture
    tensors: Tensors
    layout: Mapping[str, MatrixLayout]  # module name → layout of each factored matrix; empty when dense

    def names(self) -> list[str]:
        """All tensor names."""
        return self.tensors.names()

    def has(self, name: str) -> bool:
        """Whether a tensor of that name is stored."""
        return name in self._shape_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._shape_of[name]

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, in the floating-point type it is stored in."""
        return self.tensors.tensor(name)

    @cached_property
    def _shape_of(self) -> dict[str, tuple[int, ...]]:
        return {name: self.tensors.shape(name) for name in self.tensors.names()}

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of the weights (that of the embedding)."""
        return self.tensors.dtype(f"{self.architecture.embedding}.weight")

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.config.num_hidden_layers

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding matrix."""
        return not self.has(f"{self.architecture.head}.weight")

    def bias_name(self, module: str) -> str | None:
        """Name of a module's bias tensor, None where it has none."""
        name = f"{module}.bias"
        return name if self.has(name) else None

    def parameters(self) -> int:
        """Number of stored parameters, a tied embedding counted once."""
        return sum(torch.Size(shape).numel() for shape in self._shape_of.values())

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What `sola.json` says of a compressed checkpoint, {} for a dense one."""
        return _json_object(self.path / PROVENANCE)

    @cached_property
    def generation(self) -> dict[str, Any]:
        """The content of generation_config.json, {} where there is none. Raises UserError when it is damaged."""
        return _json_object(self.path / GENERATION)

    def end_ids(self, tokenizer: Any) -> list[int]:
        """Ids that end a text: the generation config's, else the config's, and the tokenizer's (a chat's end of turn)."""
        found = self.generation.get("eos_token_id", self.config.eos_token_id)
        ids = list(found) if isinstance(found, list) else [] if found is None else [found]
        own = tokenizer.eos_token_id
        return ids if own is None or own in ids else [own, *ids]

    def weight_files(self) -> list[Path]:
        """The files that hold the weights."""
        return _shards(self.path) if self.path.is_dir() else shards(self.path)

    @cached_property
    def weights_sha256(self) -> dict[str, str]:
        """SHA-256 of each weight file by its name; a large model's take minutes, so they are computed once."""
        return hash_weights(self.weight_files())

    def tokenizer(self) -> Any:
        """The model's own tokenizer. Raises UserError when it has none."""
        return load_tokenizer(self.path)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a checkpoint folder, an ONNX folder or a GGUF file. Raises UserError when there is none."""
    if path.suffix == ".gguf":
        from sola_edge.gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(path)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises whatever its back end meets
        raise UserError(f"{path} has no tokenizer that transformers can load ({_line(error)})") from error


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a folder, a .gguf file or a hub id. Reads no weights.

    Raises UserError for a missing or damaged checkpoint, an unsupported architecture, or shapes that contradict the config.
    """
    path = _resolve(source)
    if path.is_dir():
        config = _folder_config(path)
        architecture = architecture_of(config)
        # transformers ignores a stored head where the config ties it to the embedding, and so must we.
        ignored = (f"{architecture.head}.weight",) if config.tie_word_embeddings else ()
        folder = SafetensorsFolder(path, ignored)
        try:
            tensors: Tensors = UnfusedFolder(folder, architecture, config)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    else:
        config = _gguf_config(path)
        architecture = architecture_of(config)
        tensors = GGUFTensors(path, architecture, config)
    checkpoint = Checkpoint(path, config, architecture, tensors, _layout(config))
    try:
        _check_shapes(checkpoint)
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: its config has a value of the wrong kind ({error}); fetch it again") from error
    return checkpoint


def _resolve(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise UserError(f"{path} is no checkpoint: give a folder with config.json, a .gguf file or a hub id")
    if path.suffix != ".gguf" and _HUB_ID.match(str(source)):
        return _from_hub(str(source))
    raise UserError(f"{source} does not exist: give a folder with config.json, a .gguf file or a hub id (owner/name)")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.txt", CARD, *LEGAL_FILES]
    try:
        # consolidated.safetensors is a second copy of some models' weights under other names
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["consolidated*"]))
    except Exception as error:  # no network, no such repository, gated, …: the hub's own words say which
        message = f"{name} is no local folder and cannot be had from the hub ({_line(error)}); give a path or log in"
        raise UserError(message) from error


def _folder_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no checkpoint: config.json is missing; give a Hugging Face model folder")
    try:
        raw = json.loads((folder / "config.json").read_text())
        method = (raw.get("quantization_config") or {}).get("quant_method", QUANT_METHOD)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} is no JSON object ({error}); fetch it again") from error
    if method != QUANT_METHOD:
        raise UserError(f"{folder} holds {method}-quantized weights; give the unquantized model")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise UserError(f"{folder / 'config.json'} is no config that transformers can read ({_line(error)})") from error


def _gguf_config(path: Path) -> PretrainedConfig:
    reader = open_gguf(path)  # transformers reports damage with a traceback of its own, so meet it first
    names = {tensor.name for tensor in stored_tensors(path)}
    layers = field(reader, f"{field(reader, 'general.architecture')}.block_count")
    if not isinstance(layers, int) or layers > len(names):
        # a damaged number of layers would be counted through for ever
        raise UserError(f"{path} is no model: it has {len(names)} tensors for {layers} layers; fetch it again")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:
        raise UserError(f"{path} has an architecture that transformers cannot read ({_line(error)})") from error
    config.tie_word_embeddings = "output.weight" not in names
    width = field(reader, f"{field(reader, 'general.architecture')}.attention.key_length")
    if width is not None:
        config.head_dim = width  # which transformers does not read for every architecture
    return config


def _layout(config: PretrainedConfig) -> dict[str, MatrixLayout]:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return {}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    try:
        return {module: MatrixLayout(**row) for module, row in settings["matrices"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"config.json's quantization_config is no sola layout ({error}); compress the model again"
        ) from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no JSON object ({error}); fetch or make it again") from error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_shapes(checkpoint: Checkpoint) -> None:
    """Every tensor that the config implies is there with its shape. Raises UserError naming the first that is not."""
    config, row = checkpoint.config, checkpoint.architecture
    expected: dict[str, tuple[int, ...]] = {
        f"{row.embedding}.weight": (config.vocab_size, config.hidden_size),
        f"{row.final_norm}.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        expected[f"{row.head}.weight"] = (config.vocab_size, config.hidden_size)
    biased = row.biased(config)
    for i in range(checkpoint.layers):
        layer = row.layer.format(i)
        expected |= {f"{layer}.{norm}.weight": (width,) for norm, width in row.norm_widths(config).items()}
        for component in COMPONENTS:
            module = row.module(i, component)
            layout = checkpoint.layout.get(module)
            dense = matrix_shape(config, component)
            parts = layout.shapes if layout else {"weight": dense}
            expected |= {f"{module}.{part}": shape for part, shape in parts.items()}
            if component in biased or (layout and layout.bias):
                expected[f"{module}.bias"] = (layout.n_out if layout else dense[0],)
    _check_layouts(checkpoint)
    for name, shape in expected.items():
        if not checkpoint.has(name):
            raise UserError(f"{checkpoint.path} lacks the tensor {name} that its config asks for; fetch it again")
        if checkpoint.shape(name) != shape:
            found = checkpoint.shape(name)
            raise UserError(f"{checkpoint.path}: {name} has shape {found}, its config asks for {shape}; fetch it again")


def _check_layouts(checkpoint: Checkpoint) -> None:
    """Layouts fit the config and one another: a layer's gate, up and down agree on its neurons. Raises UserError."""
    for i in range(checkpoint.layers if checkpoint.layout else 0):
        widths = {}
        for component in COMPONENTS:
            module = checkpoint.architecture.module(i, component)
            dense: tuple[int, ...] = matrix_shape(checkpoint.config, component)
            layout = checkpoint.layout.get(module)
            found = (layout.n_out, layout.n_in) if layout else dense
            neurons = {"gate": 0, "up": 0, "down": 1}.get(component)
            if neurons is not None:
                widths[module] = found[neurons]
                found, dense = found[1 - neurons : 2 - neurons], dense[1 - neurons : 2 - neurons]
            if found != dense:
                raise UserError(
                    f"{checkpoint.path}: the layout of {module} contradicts the config; compress the model again"
                )
        if len(set(widths.values())) > 1:
            named = ", ".join(f"{module} {width}" for module, width in widths.items())
            raise UserError(
                f"{checkpoint.path}: matrices of one FFN differ in their neurons ({named}); compress the model again"
            )


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write one safetensors file. Raises UserError when it does not fit."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"cannot write {path.parent} ({error}); free space or choose another output") from error


class CheckpointWriter:
    """Writes a checkpoint folder tensor by tensor, holding one shard (`SHARD_BYTES`) at most beside what it is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._weight_map: dict[str, int] = {}
        self._shards = 0
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queue one tensor; a full shard goes to disk."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        self._shards += 1
        save_tensors(self._pending, self.folder / f"shard-{self._shards}")
        self._weight_map |= dict.fromkeys(self._pending, self._shards)
        self._pending, self._bytes = {}, 0

    def finish(self, config: PretrainedConfig, tokenizer: Any | None, layout: Mapping[str, MatrixLayout]) -> None:
        """Write the last shard, the index, the config and the tokenizer."""
        if self._pending:
            self._flush()
        names = {1: "model.safetensors"}
        if self._shards > 1:
            names = {i: f"model-{i:05d}-of-{self._shards:05d}.safetensors" for i in range(1, self._shards + 1)}
            index = {name: names[shard] for name, shard in self._weight_map.items()}
            content = {"metadata": {"total_size": self._total}, "weight_map": index}
            (self.folder / INDEX).write_text(json.dumps(content, indent=2))
        for i, name in names.items():
            shard = (self.folder / f"shard-{i}").rename(self.folder / name)
            shard.chmod(0o644)  # safetensors makes its files readable by their owner alone
        (self.folder / "config.json").write_text(json.dumps(_config_json(config, layout), indent=2))
        if tokenizer is not None:
            tokenizer.save_pretrained(self.folder)


def _config_json(config: PretrainedConfig, layout: Mapping[str, MatrixLayout]) -> dict[str, Any]:
    content = json.loads(config.to_json_string(use_diff=True))
    for key in ("_name_or_path", "quantization_config"):
        content.pop(key, None)
    if layout:
        matrices = {module: asdict(row) for module, row in layout.items()}
        content["quantization_config"] = {"quant_method": QUANT_METHOD, "matrices": matrices}
    return content


def copy_checkpoint(source: Checkpoint, target: Path) -> None:
    """Write a dense checkpoint as a Hugging Face folder: a GGUF made into safetensors, for example. Raises UserError.

    Matrices that transformers keeps fused are fused again, so that it loads the folder without this package. The model
    card goes along.
    """
    stored: dict[str, dict[int, str]] = {}
    for name in source.names():
        whole, place = source.architecture.stored_as(name)
        stored.setdefault(whole, {})[place] = name
    with replace_folder(target) as partial:
        writer = CheckpointWriter(partial)
        for whole, names in stored.items():
            parts = [source.tensor(names[place]) for place in sorted(names)]
            writer.add(whole, parts[0] if len(parts) == 1 else torch.cat(parts))
        writer.finish(storage_config(source), source.tokenizer(), {})
        write_copied_card(partial, source.path)


def storage_config(source: Checkpoint) -> PretrainedConfig:
    """The source's config with the architecture and storage type that transformers needs to load the copy."""
    config = AutoConfig.for_model(**{k: v for k, v in source.config.to_dict().items() if k != "quantization_config"})
    if not config.architectures:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", str(source.dtype).removeprefix("torch."))
    return config


def hash_weights(files: list[Path]) -> dict[str, str]:
    """SHA-256 of each weight file by its name."""
    return {path.name: sha256_file(path) for path in files}
