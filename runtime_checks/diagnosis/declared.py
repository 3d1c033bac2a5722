"""The precision that a file calls itself, by its metadata or its name, beside the types of its tensors."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import gguf

from runtime_checks.artefacts import Artefact
from runtime_checks.schema import Finding
from sola_edge.errors import UserError
from sola_edge.gguf_source import field, open_gguf, stored_tensors

MARKER = "sola-edge.json"
NAMED = re.compile(r"(?:^|[-._])((?:I?Q\d|BF16|F16|F32|TQ\d)[A-Z0-9_]*)\.gguf$", re.IGNORECASE)
SHARE = 0.05  # of the weights that may be coarser: a mixture's own choice of single tensors
# Mixtures that hold more of a coarser type than their name says, or are called as no type is: the coarsest of much of them.
TENSOR_TYPES = {"IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XXS": "IQ2_S", "IQ3_XS": "IQ3_XXS", "IQ3_M": "IQ3_S"}


def compare_declared(artefact: Artefact) -> list[Finding]:
    """A finding for each place that calls the file finer than it is."""
    if artefact.kind == "gguf":
        return _gguf(artefact.path)
    if artefact.kind == "onnx":
        return _onnx(artefact)
    return []


def _gguf(path: Path) -> list[Finding]:
    stored: Counter[str] = Counter()
    for tensor in stored_tensors(path):
        if len(tensor.shape) > 1:
            stored[tensor.tensor_type.name] += int(tensor.n_elements)
    findings = []
    for where, name in _declarations(path):
        wanted = _tensor_type(name)
        if wanted is None or not stored:
            continue
        coarser = Counter({kind: count for kind, count in stored.items() if _bits(kind) < _bits(wanted)})
        share = sum(coarser.values()) / sum(stored.values())
        if share > SHARE:
            worst = coarser.most_common(1)[0][0]
            detail = f"the file calls itself {name.upper()}, but {share:.0%} of its weights are coarser, most of them {worst}"
            findings.append(Finding(what="precision", where=where, detail=detail))
    return findings


def _declarations(path: Path) -> list[tuple[str, str]]:
    """(where, type) that the metadata and the file's name say."""
    found = []
    kind = field(open_gguf(path), "general.file_type")
    names = {int(row): row.name.removeprefix("MOSTLY_").removeprefix("ALL_") for row in gguf.LlamaFileType}
    if kind in names:
        found.append(("general.file_type", names[kind]))
    named = NAMED.search(path.name)
    if named:
        found.append((path.name, named[1].upper()))
    return found


def _tensor_type(name: str) -> str | None:
    """The tensor type of a file type: Q4_K of Q4_K_M."""
    name = TENSOR_TYPES.get(name, name)
    known = {kind.name for kind in gguf.GGMLQuantizationType}
    parts = name.split("_")
    return next((kind for i in range(len(parts), 0, -1) if (kind := "_".join(parts[:i])) in known), None)


def _bits(kind: str) -> float:
    """Bits of a weight; of two types of 16, BF16 is the coarser."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return 8 * size / block - (kind == "BF16")


def marker(folder: Path) -> dict[str, Any] | None:
    """What our exporter noted beside a graph, None where it did not write the folder. Raises UserError for a damaged note."""
    path = folder / MARKER
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no JSON object ({error}); export the folder again") from error


def _onnx(artefact: Artefact) -> list[Finding]:
    declared = (marker(artefact.path) or {}).get("precision")
    if declared is None or artefact.precision.split("-")[0] == declared:
        return []
    detail = f"the folder calls itself {declared}, but most of its weights are {artefact.precision}"
    return [Finding(what="precision", where=MARKER, detail=detail)]
