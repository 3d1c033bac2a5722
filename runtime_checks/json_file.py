"""Pydantic models as JSON files: written beside and renamed, read with one clear line about what is wrong."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from sola_edge.errors import UserError
from sola_edge.files import replace_file

Kind = TypeVar("Kind", bound=BaseModel)


def write_model(model: BaseModel, path: Path) -> Path:
    """Write a model as JSON. Raises UserError if the place is not writable."""
    with replace_file(path) as partial:
        partial.write_text(model.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return path


def read_model(kind: type[Kind], path: Path, *, missing: str, wanted: str, remedy: str) -> Kind:
    """Read a model back. Raises UserError: `missing` where there is no file, no `wanted` (and the `remedy`) where it is
    damaged.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(missing) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise UserError(f"{path} is no {wanted} ({where}: {first['msg']}); {remedy}") from error
