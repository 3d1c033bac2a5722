"""Name, licence and base model: from what a source says of itself, through compression and copies, into the GGUF file."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from huggingface_hub import ModelCard

from exporters.gguf import export
from sola_edge.checkpoint import copy_checkpoint, open_checkpoint
from sola_edge.compress import compress
from sola_edge.config import CompressionSettings
from sola_edge.identity import CARD, identity
from sola_edge.testing import tiny_checkpoint

SETTINGS = CompressionSettings(rate=0.2, window=64, max_windows=8)
ABOUT = """---
license: other
license_name: ring
license_link: LICENSE
base_model: Smiths/Ring-1B
language: [en, qya]
---
# One
"""


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text("Words and numbers, " + " ".join(str(n * n) for n in range(2000)))
    return str(path)


def source_folder(path: Path, card: str | None = ABOUT) -> Path:
    folder = tiny_checkpoint(path, layers=6)
    if card is not None:
        (folder / CARD).write_text(card)
    (folder / "LICENSE").write_text("Do as you are told.")
    return folder


def general(path: Path) -> dict[str, Any]:
    """Metadata of a GGUF file, without the vocabulary."""
    fields = gguf.GGUFReader(path).fields
    return {key: found.contents() for key, found in fields.items() if key.startswith(("general.", "sola."))}


def test_a_compressed_folder_says_what_it_was_made_of(tmp_path: Path, text: str) -> None:
    source = source_folder(tmp_path / "Ring-1B-Chat-v2.0")
    made = compress(source, tmp_path / "small", SETTINGS, text)
    card = ModelCard.load(made.path / CARD)
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "ring", "LICENSE")
    assert (made.path / "LICENSE").read_text() == "Do as you are told."
    assert card.data.base_model == ["Smiths/Ring-1B"] and "base_model_relation" not in card.data.to_dict()
    assert card.data.library_name == "transformers" and {"sola-edge", "sola"} <= set(card.data.tags)
    kept = made.plan.parameters_dense - made.plan.parameters_removed
    for words in (f"{made.plan.parameters_dense:,} before", f"{kept:,} after", f"{made.plan.rate:.4f}", "words.txt"):
        assert words in card.text
    assert "sola-edge compress Ring-1B-Chat-v2.0 OUT --rate 0.2 --calibration words.txt --window 64" in card.text
    assert str(tmp_path) not in card.content
    exported = export(made.path, tmp_path, "f16")
    found = general(exported.path)
    assert found["general.name"] == "Ring 1B Chat v2.0 sola 0.2"
    assert (found["general.basename"], found["general.finetune"]) == ("Ring", "Chat-sola")
    assert (found["general.license"], found["general.license.name"]) == ("other", "ring")
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/Smiths/Ring-1B"
    assert found["general.languages"] == ["en", "qya"]
    assert found["sola.tool"].startswith("sola-edge ") and len(found["sola.plan_sha256"]) == 64
    assert exported.path.name.startswith("Ring-") and exported.path.name.endswith("-Chat-sola-v2.0-F16.gguf")


def test_a_hub_snapshot_is_the_base_model(tmp_path: Path, text: str) -> None:
    source = source_folder(tmp_path / "models--Smiths--Ring-1B-Chat" / "snapshots" / "0123abcd")
    made = compress(source, tmp_path / "small", SETTINGS, text).path
    data = ModelCard.load(made / CARD).data
    assert (data.base_model, data.base_model_relation) == ("Smiths/Ring-1B-Chat", "quantized")
    found = general(export(made, tmp_path / "x.gguf", "f16").path)
    assert found["general.base_model.count"] == 1
    assert (found["general.base_model.0.name"], found["general.base_model.0.organization"]) == (
        "Ring 1B Chat",
        "Smiths",
    )
    assert open_checkpoint(made).provenance["source"]["name"] == "Ring 1B Chat"
    assert general(export(source, tmp_path / "dense.gguf", "f16").path)["general.name"] == "Ring 1B Chat"


def test_a_gguf_source_hands_on_what_it_says(tmp_path: Path, text: str) -> None:
    """Re-exported, copied, and compressed from the copy and from the file itself."""
    folder = source_folder(tmp_path / "Ring-1B-Chat-v2.0")
    source = export(folder, tmp_path / "any name.gguf", "f32").path
    said = general(source)
    assert said["general.base_model.count"] == 1
    assert general(export(source, tmp_path / "again.gguf", "f32").path) == said
    copy_checkpoint(open_checkpoint(source), tmp_path / "copy")
    assert (
        general(export(tmp_path / "copy", tmp_path / "copy.gguf", "f32").path).items()
        >= {key: said[key] for key in said if key not in ("general.tags", "general.organization")}.items()
    )
    for name in (source, tmp_path / "copy"):
        made = compress(name, tmp_path / f"{name.stem}-small", SETTINGS, text).path
        found = general(export(made, tmp_path / "small.gguf", "f16").path)
        for key in ("license", "license.name", "languages", "base_model.0.repo_url", "basename"):
            assert found[f"general.{key}"] == said[f"general.{key}"]


def test_a_source_that_says_nothing_is_named_all_the_same(tmp_path: Path, text: str) -> None:
    source = tiny_checkpoint(tmp_path / "plain", layers=6)
    made = compress(source, tmp_path / "small", SETTINGS, text).path
    card = ModelCard.load(made / CARD)
    assert card.data.license is None and "the source's files name none" in card.text
    found = general(export(made, tmp_path / "x.gguf", "f16").path)
    assert found["general.base_model.0.name"] == "Plain" and "general.license" not in found


@pytest.mark.parametrize("card", [b"---\nlicense: [\n---\n", b"\xff\xfe", b"", b"---\n- 1\n---\n", b"# Title\n"])
def test_a_damaged_card_is_passed_over(tmp_path: Path, card: bytes) -> None:
    folder = source_folder(tmp_path / "ring", None)
    (folder / CARD).write_bytes(card)
    assert identity(folder).name == "Ring" and identity(folder).license is None
    if card.startswith(b"\xff"):
        assert general(export(folder, tmp_path / "x.gguf", "f16").path)["general.name"] == "Ring"


def test_a_list_of_licences_and_values_of_other_kinds(tmp_path: Path) -> None:
    folder = source_folder(tmp_path / "ring", "---\nlicense: [mit, apache-2.0]\nname: 7\nbase_model: 3\n---\n")
    found = identity(folder)
    assert (found.license, found.name) == ("mit,apache-2.0", "7")


@pytest.mark.slow
def test_smollm2_stays_under_its_licence(smollm2_compressed: Path, tmp_path: Path) -> None:
    found = general(export(smollm2_compressed, tmp_path, "q8_0").path)
    assert found["general.license"] == "apache-2.0" and found["general.languages"] == ["en"]
    assert found["general.base_model.0.name"].startswith("Smollm2 135M")
    assert found["general.basename"] == "smollm2" and found["general.finetune"].endswith("-sola")
