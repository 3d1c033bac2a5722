"""Metadata of the file: tokenizer, general.* and hyper-parameters by llama.cpp's own converter, `sola.*` by us.

`convert_hf_to_gguf.py --vocab-only` runs as a subprocess on a folder that holds the checkpoint's small files (its
config without our `quantization_config`, its tokenizer), and the keys it writes are copied.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
from gguf import Keys

from exporters.llama_cpp import source
from sola_edge.checkpoint import Checkpoint, open_checkpoint, storage_config
from sola_edge.errors import UserError
from sola_edge.gguf_source import field, open_gguf
from sola_edge.identity import CARD, readable_card, source_name
from sola_edge.progress import status

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", CARD)
OMITTED = ("GGUF.", "general.architecture", "general.file_type")  # the writer has its own
# Of a GGUF source: what its tensors and this export make of it, and no property of the model
OF_THE_FILE = ("type", "alignment", "quantization_version", "size_label", "architecture", "file_type")
NAMING = ("name", "organization", "basename", "finetune", "version")
_VOCAB_ONLY = Path(__file__).with_name("vocab_only.py")


@dataclass(frozen=True)
class Value:
    """A metadata value in Python types and its GGUF type (`sub_type`: that of an array's elements)."""

    value: Any
    type: gguf.GGUFValueType
    sub_type: gguf.GGUFValueType | None


def converter_metadata(checkpoint: Checkpoint) -> dict[str, Value]:
    """All keys that llama.cpp's converter writes for this checkpoint, in its order.

    A second call for the same checkpoint (in another type, say) remembers. Raises UserError when the checkpoint has no
    tokenizer or the converter refuses it.
    """
    return dict(_converted(checkpoint.path, _modified(checkpoint.path)))


def _modified(path: Path) -> int:
    """Time of the last change of a file, or of any file in a folder, in ns."""
    return max(p.stat().st_mtime_ns for p in ([path] if path.is_file() else path.iterdir()))


@lru_cache(maxsize=8)
def _converted(path: Path, _changed: int) -> dict[str, Value]:
    checkpoint = open_checkpoint(path)
    converter = source.converter()
    with tempfile.TemporaryDirectory() as folder, status("Tokenizer and metadata by llama.cpp's converter"):
        model = Path(folder) / source_name(checkpoint.path)
        model.mkdir()
        _small_files(checkpoint, model)
        out = Path(folder) / "vocab.gguf"
        command = [sys.executable, str(_VOCAB_ONLY), str(converter), str(model), str(out)]
        result = subprocess.run([*command, _pre_tokenizer(model)], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            reason = (result.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(f"llama.cpp's converter cannot read the tokenizer of {checkpoint.path}: {reason}")
        values = {key: value_of(found) for key, found in gguf.GGUFReader(out).fields.items()}
    if values["tokenizer.ggml.model"].value == "gpt2" and "tokenizer.ggml.merges" not in values:
        raise UserError(f"{checkpoint.path} has a BPE tokenizer without a single merge, which llama.cpp does not load")
    return values if path.is_dir() else _carried_over(values, path)


def _carried_over(values: dict[str, Value], path: Path) -> dict[str, Value]:
    """The converter's metadata with what a GGUF source says of the model: its name, licence, base models, provenance."""
    reader = open_gguf(path)
    own = {
        key: Value(field(reader, key), *_types(found))
        for key, found in reader.fields.items()
        if key.startswith(("general.", "sola.")) and key.removeprefix("general.") not in OF_THE_FILE
    }
    if Keys.General.NAME in own:  # then what the converter read from the file's name is none of its
        values = {k: v for k, v in values.items() if k.removeprefix("general.") not in NAMING}
    return values | own


def value_of(found: gguf.ReaderField) -> Value:
    """A field that gguf read, as it can be written again."""
    return Value(found.contents(), *_types(found))


def _types(found: gguf.ReaderField) -> tuple[gguf.GGUFValueType, gguf.GGUFValueType | None]:
    is_array = found.types[0] == gguf.GGUFValueType.ARRAY
    return found.types[0], found.types[-1] if is_array else None


def add_metadata(
    writer: gguf.GGUFWriter, values: dict[str, Value], provenance: dict[str, Any], parameters: int
) -> None:
    """Copy the converter's keys; add the size label of that many parameters, and from sola.json `sola.*` and the base model.

    The base model is left as it is where the model card names one.
    """
    for key, value in values.items():
        if not key.startswith(OMITTED):
            writer.add_key_value(key, value.value, value.type, sub_type=value.sub_type)
    writer.add_size_label(gguf.size_label(parameters, 0, 0, 0))
    if Keys.General.BASE_MODEL_COUNT not in values:
        _add_base_model(writer, provenance.get("source", {}))
    for key, item in (provenance | _of_nested(provenance)).items():
        _add_item(writer, f"sola.{key}", item)


def _of_nested(provenance: dict[str, Any]) -> dict[str, str]:
    """In a word each: the tool that compressed, and a hash of its plan, by which files of one plan are known."""
    found = {}
    if "tool" in provenance:
        found["tool"] = " ".join(f"{name} {version}" for name, version in provenance["tool"].items())
    if "plan" in provenance:
        found["plan_sha256"] = hashlib.sha256(json.dumps(provenance["plan"], sort_keys=True).encode()).hexdigest()
    return found


def _add_base_model(writer: gguf.GGUFWriter, source: dict[str, Any]) -> None:
    """The model that was compressed, as sola.json names it: no hub id of it is known."""
    if "name" not in source:
        return
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, source["name"])
    if "organization" in source:
        writer.add_base_model_organization(0, source["organization"])
    if "version" in source:
        writer.add_base_model_version(0, source["version"])


def conventional_name(values: dict[str, Value], parameters: int, type: str) -> str:
    """`<BaseName>-<SizeLabel>-<FineTune>-<Version>-<Encoding>.gguf`, of what the metadata have of these."""

    def known(key: str) -> str | None:
        value = values.get(f"general.{key}")
        return None if value is None else str(value.value)

    size = gguf.size_label(parameters, 0, 0, 0)
    words = known("name"), known("basename"), known("finetune"), known("version")
    return f"{gguf.naming_convention(words[0], words[1], words[2], words[3], size, type)}.gguf"


def _add_item(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A plain value of sola.json; nested ones (the plan, the statistics) stay in the checkpoint."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_int64(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)


def _small_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer files and a config that the converter understands."""
    config = json.loads(storage_config(checkpoint).to_json_string(use_diff=False))
    if checkpoint.path.is_dir():
        for pattern in SMALL_FILES:
            for path in checkpoint.path.glob(pattern):
                shutil.copyfile(path, folder / path.name)
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        if not readable_card(folder):
            (folder / CARD).unlink(missing_ok=True)  # the converter would not go on with a damaged one
        config |= json.loads((folder / "config.json").read_text()) | {"architectures": config["architectures"]}
        config.pop("quantization_config", None)
    else:
        checkpoint.tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{checkpoint.path} has no tokenizer ({', '.join(TOKENIZER_FILES)}); a GGUF file needs one: copy the "
            "tokenizer files of the original model into the folder"
        )


def _pre_tokenizer(folder: Path) -> str:
    """Name of llama.cpp's pre-tokenizer that splits text as tokenizer.json says; "" if none is known to.

    The converter recognises a vocabulary by a hash of the ids it gives to a test text. One that it never saw (trained
    anew, pruned) has no such hash, but the rule that splits text into words is in the file and may be a known one.
    """
    from sola_edge.gguf_tokenizer import PRE_TOKENIZERS

    path = folder / "tokenizer.json"
    rule = json.loads(path.read_text(encoding="utf-8")).get("pre_tokenizer") if path.is_file() else None
    known = {name: _rule(make()) for name, make in PRE_TOKENIZERS.items() if name != "default"}
    return next((name for name, candidate in known.items() if candidate == rule), "")


def _rule(pre_tokenizer: Any) -> Any:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    return json.loads(tokenizer.to_str())["pre_tokenizer"]
