"""Text sources and files that appear whole or not at all."""

import json
from pathlib import Path

import pytest

from sola_edge.errors import UserError
from sola_edge.files import replace_file, replace_folder
from sola_edge.texts import load_text


def test_line_endings_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\n")
    assert load_text(str(path)).joined == "one\r\ntwo\n"


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "other": 1}) for t in ("a", "b")) + "\n")
    assert load_text(str(path)).documents == ("a", "b")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'{"text": 3}', "not JSON lines"),
        ("a.jsonl", b'{"other": "x"}', "not JSON lines"),
        ("a.jsonl", b"plain", "not JSON lines"),
        ("a.pdf", b"x", "neither .txt nor .jsonl"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_text(str(tmp_path / name))


def test_built_in_texts_are_stable_and_disjoint() -> None:
    calibration, scoring = load_text("python-docstrings"), load_text("python-reference")
    assert calibration.sha256 == load_text("python-docstrings").sha256
    assert len(calibration.joined) > 300_000
    assert len(scoring.joined) > 100_000
    assert not set(calibration.documents) & set(scoring.documents)


def test_replace_file_keeps_the_old_one_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    with pytest.raises(RuntimeError), replace_file(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
    with replace_file(target) as partial:
        partial.write_text("new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["new"]


def test_replace_folder_keeps_the_old_one_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "a"
    for content in ("old", "new"):
        with replace_folder(target) as partial:
            (partial / "x").write_text(content)
    with pytest.raises(RuntimeError), replace_folder(target) as partial:
        raise RuntimeError
    assert (target / "x").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_mixed_text_has_all_kinds_from_the_start_and_nothing_of_the_scoring_text() -> None:
    documents = load_text("mixed").documents
    begun = documents[:60]
    assert any(d.startswith("Question: ") and "\nAnswer: " in d for d in begun)
    assert any(d.startswith(("def ", "class ")) for d in begun)
    assert any(d in load_text("python-docstrings").documents for d in begun)
    assert any(d.startswith("The tide that enters") for d in begun)
    assert not set(documents) & set(load_text("python-reference").documents)
    assert not any("\n~" in d or len(d) < 20 for d in documents)
    assert 1_000_000 <= sum(map(len, documents)) < 1_100_000
