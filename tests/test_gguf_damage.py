"""2,000 damaged GGUF files: our readers open each, or refuse it in one line; they never crash, hang or take all memory."""

import resource
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gguf_mutations import MUTATIONS, Anatomy, anatomy, mutations

from exporters.gguf import export
from runtime_checks.artefacts import open_artefact
from sola_edge.checkpoint import load_tokenizer, open_checkpoint
from sola_edge.errors import UserError
from sola_edge.gguf_source import open_gguf
from sola_edge.identity import identity
from sola_edge.testing import tiny_checkpoint

GROWTH = 300e6  # bytes of memory: the readers' libraries, and nothing of the size that a damaged number may claim


def weights(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        checkpoint.tensor(name)


READERS: dict[str, Callable[[Path], object]] = {
    "weights": weights,
    "artefact": open_artefact,
    "identity": identity,
    "tokenizer": load_tokenizer,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Anatomy]:
    """A dense and a hybrid model, both without their vocabulary, which is what takes time to parse; and one with it."""
    folder = tmp_path_factory.mktemp("damage")
    made = {}
    for name, type in (("dense", "q8_0"), ("hybrid", "f16")):
        source = tiny_checkpoint(folder / name, compressed=name == "hybrid", hidden=32, ffn=64, layers=3, vocab=288)
        path = export(source, folder / f"{name}.gguf", type).path
        made[name] = anatomy(path)
        assert made[name].packed() == path.read_bytes()
    named = made["dense"]
    return {name: file.without("tokenizer.ggml.") for name, file in made.items()} | {"vocabulary": named}


def outcomes(cases: Iterator[tuple[str, bytes]], names: tuple[str, ...], folder: Path) -> Counter[str]:
    """How many reads ended well, and how many in a refusal; anything else is a failure of the test."""
    found: Counter[str] = Counter()
    for i, (kind, content) in enumerate(cases):
        path = folder / f"{i}.gguf"
        path.write_bytes(content)
        for name in names:
            try:
                READERS[name](path)
                found[f"{name} read"] += 1
            except UserError as error:
                assert "\n" not in str(error), (kind, name)
                found[f"{name} refused"] += 1
            except Exception as error:
                raise AssertionError(f"{name} of {kind}: {error!r}") from error
        path.unlink()
    return found


@pytest.mark.parametrize(
    ("file", "names", "count", "least"),
    [
        ("dense", ("weights", "artefact", "identity"), 800, {"weights": 120, "artefact": 400, "identity": 400}),
        ("hybrid", ("weights", "artefact", "identity"), 800, {"weights": 0, "artefact": 400, "identity": 400}),
        ("vocabulary", ("tokenizer", "identity"), 400, {"tokenizer": 150, "identity": 150}),
    ],
)
def test_damaged_files_are_read_or_refused(
    files: dict[str, Anatomy], file: str, names: tuple[str, ...], count: int, least: dict[str, int], tmp_path: Path
) -> None:
    """least: how many of the files a reader takes all the same, so that damage behind the parser is met too."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = outcomes(mutations(files[file], count), names, tmp_path)
    for name in names:
        assert found[f"{name} read"] + found[f"{name} refused"] == count
        assert found[f"{name} read"] >= least[name] and found[f"{name} refused"] > count / 8, found
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < GROWTH


def test_the_mutations_are_what_they_say(files: dict[str, Anatomy]) -> None:
    file = files["hybrid"]
    made = list(mutations(file, 10 * len(MUTATIONS)))
    assert made == list(mutations(file, 10 * len(MUTATIONS)))
    for kind in MUTATIONS:
        assert any(changed != file.packed() for name, changed in made if name.startswith(f"{kind} ")), kind


def test_an_array_longer_than_the_file_is_refused_at_once(files: dict[str, Anatomy], tmp_path: Path) -> None:
    """gguf's reader would count to 2^60."""
    array = struct.pack("<Q1sIIQ", 1, b"a", 9, 0, 2**60)
    (tmp_path / "x.gguf").write_bytes(Anatomy((array, *files["dense"].metadata), (), b"").packed())
    with pytest.raises(UserError, match="damaged"):
        open_gguf(tmp_path / "x.gguf")
