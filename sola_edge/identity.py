"""Who a model is, as far as its own files say: name, licence, hub id, and the models that it was made from.

Read by gguf's own `Metadata`, which knows the model card of a folder (README.md), its config and the conventions of names,
and from the `general.*` keys of a GGUF file. What is missing there is missing here: nothing is guessed from weights.
"""

import re
from pathlib import Path
from typing import Any

from gguf import Keys, Metadata

from sola_edge.gguf_source import field, open_gguf

CARD = "README.md"
LEGAL_FILES = ("LICENSE*", "NOTICE*")  # a licence commonly asks that these go with the model
HUB = "https://huggingface.co/"
_HUB_URL = re.compile(rf"{HUB}([\w.-]+/[\w.-]+)/?$")
_TEXTS = {
    "name": Keys.General.NAME,
    "organization": Keys.General.ORGANIZATION,
    "basename": Keys.General.BASENAME,
    "finetune": Keys.General.FINETUNE,
    "version": Keys.General.VERSION,
    "license": Keys.General.LICENSE,
    "license_name": Keys.General.LICENSE_NAME,
    "license_link": Keys.General.LICENSE_LINK,
    "source_repo_url": Keys.General.SOURCE_REPO_URL,
}
_BASE_MODEL = {
    "name": Keys.General.BASE_MODEL_NAME,
    "organization": Keys.General.BASE_MODEL_ORGANIZATION,
    "repo_url": Keys.General.BASE_MODEL_REPO_URL,
}


def identity(path: Path) -> Metadata:
    """What a checkpoint's folder or GGUF file says of itself; `repo_url` is its own place on the hub, if that is known."""
    found = _of_folder(path) if path.is_dir() else _of_file(path)
    found.name = found.name or source_name(path)
    return found


def source_name(path: Path) -> str:
    """The name that a path alone gives: the hub's of a snapshot in its cache, a folder's, a file's without its ending."""
    if not path.is_dir():
        return path.stem
    place = path.resolve()
    return (_hub_id(place) or place.name).rpartition("/")[2] or "model"


def hub_id(url: str | None) -> str | None:
    """`owner/name` of a model's address on the hub, None for any other address."""
    match = _HUB_URL.match(url or "")
    return match.group(1) if match else None


def base_model_ids(model: Metadata) -> list[str]:
    """Hub ids of the models that this one says it was made from."""
    return [found for base in model.base_models or () if (found := hub_id(base.get("repo_url")))]


def readable_card(folder: Path) -> dict[str, Any]:
    """The metadata block of a folder's model card, {} where there is none or it cannot be read."""
    try:
        return Metadata.load_model_card(folder)
    except Exception:  # YAML's errors, or bytes that are no text: a damaged card is no reason to refuse a model
        return {}


def _of_folder(path: Path) -> Metadata:
    place = path.resolve()
    own = _hub_id(place)
    config = Metadata.load_hf_parameters(path)
    found = Metadata.apply_metadata_heuristic(Metadata(), readable_card(path), config, Path(source_name(path)))
    for name in _TEXTS:
        value = getattr(found, name)
        is_list = name == "license" and isinstance(value, list)
        setattr(found, name, ",".join(map(str, value)) if is_list else str(value) if value is not None else None)
    if own:
        found.organization = found.organization or own.partition("/")[0]
        found.repo_url = f"{HUB}{own}"
    return found


def _hub_id(place: Path) -> str | None:
    """`owner/name` of a snapshot folder in the hub's cache: …/models--owner--name/snapshots/<commit>."""
    repository = place.parent.parent.name
    inside = place.parent.name == "snapshots" and repository.startswith("models--")
    return "/".join(repository.split("--")[1:]) if inside else None


def _of_file(path: Path) -> Metadata:
    reader = open_gguf(path)

    def text(key: str) -> str | None:
        value = field(reader, key)
        return value if isinstance(value, str) else None

    found = Metadata()
    for name, key in _TEXTS.items():
        setattr(found, name, text(key))
    found.repo_url = text(Keys.General.REPO_URL) or found.source_repo_url
    languages = field(reader, Keys.General.LANGUAGES, [])
    found.languages = [word for word in languages if isinstance(word, str)] if isinstance(languages, list) else None
    count = field(reader, Keys.General.BASE_MODEL_COUNT, 0)
    found.base_models = []
    for i in range(min(count, len(reader.fields)) if isinstance(count, int) else 0):
        named = {name: text(key.format(id=i)) for name, key in _BASE_MODEL.items()}
        found.base_models.append({name: value for name, value in named.items() if value})
    return found
