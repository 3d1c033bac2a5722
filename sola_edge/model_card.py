"""The model card (README.md) of a checkpoint that is written here: whose work it rests on, what was done to it, how to run it.

Nothing in it depends on time or place: a resumed compression writes the same bytes.
"""

import shlex
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from gguf import Metadata
from huggingface_hub import ModelCardData

import sola_edge
from sola_edge.config import CompressionSettings
from sola_edge.identity import CARD, LEGAL_FILES, base_model_ids, hub_id, identity
from sola_edge.planning import Plan

LIBRARY, TASK = "transformers", "text-generation"
# The nearest of the hub's four relations (adapter, merge, quantized, finetune): weights in a smaller form, nothing learnt.
RELATION = "quantized"
OPTIONS = {  # setting → option of `sola-edge compress`
    "method": "method",
    "structure": "structure",
    "align": "align",
    "factors": "factors",
    "window": "window",
    "max_windows": "windows",
    "gradient_windows": "gradient-windows",
    "correction_windows": "correction-windows",
    "device": "device",
}

_BODY = """\
# {name}

{source} with {percent:.1f} % fewer parameters, compressed by sola-edge {version}. Matrices were factored or made narrower;
nothing was trained, and the values keep their type.

| | |
|---|---|
| source | {source} |
| licence | {license} |
| method | {method}, structure {structure} |
| compression rate | {rate:.4f} of the model's parameters |
| parameters | {dense:,} before, {kept:,} after |
| calibration text | {text}: {tokens:,} tokens, SHA-256 {sha256} |

Expect it to be worse than its source. How much depends on what it is used for, and was not measured when this card was written:
`sola-edge compare` and `sola-edge check` measure it.

## How it was made

    {command}

`sola.json` has the plan of every matrix, all settings, and SHA-256 sums of the weights.

## How to run it

It needs the package sola-edge, which teaches transformers to load it:

    import sola_edge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")

`sola-edge export gguf` and `sola-edge export onnx` make files of it for llama.cpp and ONNX Runtime.
"""


def write_compressed_card(
    folder: Path, source: Path, plan: Plan, settings: CompressionSettings, calibration: dict[str, Any]
) -> None:
    """Write the card of a compressed checkpoint, and copy the licence files of the source folder.

    calibration: as `Calibration.describe` tells it.
    """
    of_source = identity(source)
    own = hub_id(of_source.repo_url)
    data = _card_data(of_source)
    data["base_model"] = own or base_model_ids(of_source) or None
    data["base_model_relation"] = RELATION if own else None
    data["tags"] = ["sola-edge", "compressed", settings.method, settings.structure]
    data["model_name"] = _derived(str(of_source.name), f"{settings.method} {settings.rate:g}")
    data["basename"] = of_source.basename or of_source.name
    data["finetune"] = _derived(of_source.finetune or "", settings.method)
    data["version"] = of_source.version
    body = _BODY.format(
        name=data["model_name"],
        source=own or of_source.name,
        percent=100 * plan.rate,
        version=sola_edge.__version__,
        license=_license(of_source),
        method=settings.method,
        structure=settings.structure,
        rate=plan.rate,
        dense=plan.parameters_dense,
        kept=plan.parameters_dense - plan.parameters_removed,
        command=_command(own or (source.resolve() if source.is_dir() else source).name, settings, calibration["text"]),
        **{key: calibration[key] for key in ("text", "tokens", "sha256")},
    )
    _write(folder, data, body)
    copy_legal_files(source, folder)


def write_copied_card(folder: Path, source: Path) -> None:
    """Write the card of a copy in another format: the source folder's own, or what a GGUF file says of itself."""
    if (source / CARD).is_file():
        shutil.copyfile(source / CARD, folder / CARD)
    elif source.is_file():
        of_source = identity(source)
        data = _card_data(of_source)
        data["base_model"] = base_model_ids(of_source) or None
        for name in ("organization", "basename", "finetune", "version"):
            data[name] = getattr(of_source, name)
        data["model_name"] = of_source.name
        data["repo_url"] = of_source.repo_url
        _write(folder, data, f"# {of_source.name}\n\nConverted from the GGUF file {source.name} by sola-edge.\n")
    copy_legal_files(source, folder)


def copy_legal_files(source: Path, folder: Path) -> None:
    """Copy a source folder's licence and notices into the folder."""
    for pattern in LEGAL_FILES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _card_data(model: Metadata) -> ModelCardData:
    """What a derived model shares with this one."""
    return ModelCardData(
        license=model.license,
        license_name=model.license_name,
        license_link=model.license_link,
        language=model.languages or None,
        library_name=LIBRARY,
        pipeline_tag=TASK,
    )


def _license(model: Metadata) -> str:
    named = model.license_name or model.license
    return f"{named}, as of the source" if named else "the source's files name none; ask where you have them from"


def _derived(name: str, words: str) -> str:
    """A name with words after it, in its own way of parting words."""
    between = " " if " " in name else "-"
    return between.join(filter(None, [name, words.replace(" ", between)]))


def _command(source: str, settings: CompressionSettings, text: str) -> str:
    words = ["sola-edge", "compress", source, "OUT", "--rate", f"{settings.rate:g}", "--calibration", text]
    usual = {row.name: row.default for row in fields(settings)} | {"gradient_windows": settings.max_windows}
    for name, option in OPTIONS.items():
        value = getattr(settings, name)
        if value not in (None, usual[name]):
            words += [f"--{option}", str(value)]
    return shlex.join(words)


def _write(folder: Path, data: ModelCardData, body: str) -> None:
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n{body}", encoding="utf-8", newline="\n")
