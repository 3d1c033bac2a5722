"""One row per compression method."""

from sola_edge.baselines import BASELINES
from sola_edge.errors import UserError
from sola_edge.sola import Sola
from sola_edge.view import Method

METHODS: dict[str, Method] = {row.name: row for row in (Sola(), *BASELINES)}


def method_named(name: str) -> Method:
    """The row of that name. Raises UserError when there is none."""
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}; choose one of: {', '.join(METHODS)}")
    return METHODS[name]
