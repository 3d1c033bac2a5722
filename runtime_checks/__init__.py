"""Runtime checks: an exported file in, figures out (parity, perplexity, memory, speed, report).

The entry points are looked up lazily, because the child processes that measure a runtime import this package too and
must not pay for torch or pydantic.
"""

from typing import Any

_HOME = {
    "check_parity": "checks",
    "bench": "checks",
    "measure_models": "campaign",
    "measure_perplexity": "checks",
    "write_report": "report",
    "write_html": "report",
    "write_json": "report",
    "load_report": "report",
    "load_results": "report",
    "print_table": "table",
}
__all__ = [
    "bench",
    "check_parity",
    "load_report",
    "load_results",
    "measure_models",
    "measure_perplexity",
    "print_table",
    "write_html",
    "write_json",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"runtime_checks.{_HOME[name]}"), name)
