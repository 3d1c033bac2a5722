"""docs/formats.md, written from the models that validate every result on disk.

python -m runtime_checks.formats > docs/formats.md
"""

import inspect
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from runtime_checks.accuracy_schema import AccuracyReport
from runtime_checks.compare_schema import Comparison
from runtime_checks.frontier_schema import Frontier
from runtime_checks.memory_curve import MemoryReport
from runtime_checks.schema import Report
from runtime_checks.task_schema import TaskReport
from runtime_checks.throughput_grid import ThroughputReport

FILES: dict[str, tuple[type[BaseModel], str]] = {
    "report.json": (Report, "`check parity`, `perplexity`, `bench` (with `--output`), `demo`, `report`"),
    "compare.json": (Comparison, "`compare`"),
    "frontier.json": (Frontier, "`check frontier`"),
    "memory.json": (MemoryReport, "`check memory` (with `--output`)"),
    "throughput.json": (ThroughputReport, "`check throughput` (with `--output`)"),
    "accuracy.json": (AccuracyReport, "`check accuracy` (with `--output`)"),
    "tasks.json": (TaskReport, "`check tasks` (with `--output`)"),
}
HEAD = """\
# Formats

What commands write for machines. Each file is validated when it is written and when it is read; unknown fields, NaN and
infinity are refused. `schema_version` grows when a field is renamed, removed or comes to mean something else; new fields
that may be absent do not change it. The same as JSON Schema: `python -m runtime_checks.formats report.json`.

This page is written from the code: `python -m runtime_checks.formats > docs/formats.md`.
"""


def page() -> str:
    """The whole page. What several files share is described where it is first used."""
    lines, seen = [HEAD], set[str]()
    for name, (model, commands) in FILES.items():
        schema = model.model_json_schema()
        about = inspect.getdoc(inspect.getmodule(model)) or ""
        lines.append(f"## {name}\nOf {commands}. {about}\n")
        for title, part in {model.__name__: schema, **schema.get("$defs", {})}.items():
            if title not in seen and "properties" in part:
                seen.add(title)
                lines += _described(title, part)
    return "\n".join(lines)


def _described(title: str, part: dict[str, Any]) -> Iterator[str]:
    yield f"### {title}\n{inspect.cleandoc(part.get('description', ''))}\n"
    yield "| field | type | may be absent |\n|---|---|---|"
    required = part.get("required", ())
    for name, field in part["properties"].items():
        yield f"| `{name}` | {_type(field)} | {'' if name in required else 'yes'} |"
    yield ""


def _type(field: dict[str, Any]) -> str:
    """In words, from JSON Schema."""
    kind = field.get("type")
    if "$ref" in field:
        found = str(field["$ref"]).rpartition("/")[2]
    elif "anyOf" in field:
        found = " or ".join(_type(one) for one in field["anyOf"])
    elif "const" in field or "enum" in field:
        found = " or ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    elif kind in ("array", "object"):
        inner = field.get("items" if kind == "array" else "additionalProperties")
        word = "list" if kind == "array" else kind
        found = f"{word} of {_type(inner)}" if isinstance(inner, dict) and inner else word
    else:
        found = kind or "anything"
    return found


if __name__ == "__main__":
    import json
    import sys

    if len(sys.argv) > 1 and sys.argv[1] not in FILES:
        sys.exit(f"there is no {sys.argv[1]}; choose of: {', '.join(FILES)}")
    print(json.dumps(FILES[sys.argv[1]][0].model_json_schema(), indent=2) if len(sys.argv) > 1 else page(), end="")
