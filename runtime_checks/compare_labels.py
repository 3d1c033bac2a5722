"""Row labels of a comparison: METHOD[:OPTION…], such as `sola`, `sola:narrow` or `sola:plain:no-correction`."""

from dataclasses import replace
from typing import Any, get_args

from sola_edge.config import STRUCTURES, CompressionSettings, FactorPolicy
from sola_edge.errors import UserError
from sola_edge.methods import method_named

OPTIONS: dict[str, tuple[str, Any]] = {
    **{name: ("structure", name) for name in STRUCTURES},
    **{name: ("factors", name) for name in get_args(FactorPolicy)},
    "no-gradients": ("gradient_windows", 0),
    "no-correction": ("correction_windows", 0),
}


def settings_of(label: str, common: CompressionSettings) -> CompressionSettings:
    """The common settings with what a label says. Raises UserError for an unknown or contradictory label."""
    name, *options = label.split(":")
    values: dict[str, Any] = {"method": name}
    for option in options:
        if option not in OPTIONS:
            raise UserError(f"{label!r} has no option {option!r}; choose of: {', '.join(OPTIONS)}")
        key, value = OPTIONS[option]
        if key in values:
            raise UserError(f"{label!r} says {key.replace('_', ' ')} twice; give one of them")
        values[key] = value
    if values.get("gradient_windows") == 0:
        values.setdefault("correction_windows", 0)  # which needs them
    if method_named(name).published:
        if options:
            raise UserError(f"{label!r}: {name} is as published and takes no options; give {name} alone")
        values |= {"factors": "auto", "gradient_windows": 0, "correction_windows": 0}
    return replace(common, **values)


def folder_name(label: str, rate: float) -> str:
    """What a cell's checkpoint is called."""
    return f"{label.replace(':', '-')}-{rate:g}"
