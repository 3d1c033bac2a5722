"""docs/formats.md is what the code says."""

from pathlib import Path

from runtime_checks.formats import FILES, page


def test_the_page_is_up_to_date() -> None:
    written = Path(__file__).parents[1] / "docs" / "formats.md"
    assert written.read_text(encoding="utf-8") == page(), "python -m runtime_checks.formats > docs/formats.md"


def test_every_field_of_every_file_is_on_the_page() -> None:
    text = page()
    for model, _ in FILES.values():
        for part in (model.model_json_schema(), *model.model_json_schema()["$defs"].values()):
            assert all(f"| `{name}` |" in text for name in part.get("properties", {}))
