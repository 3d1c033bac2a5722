"""A GGUF file in shards: the same model to llama.cpp and to our readers, and nothing half replaced."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_cpp_runner import Refused, llama_cpp_logits
from typer.testing import CliRunner

from exporters.gguf import export, parse_size, shards
from exporters.llama_cpp import Build
from runtime_checks.artefacts import open_artefact
from runtime_checks.shapes import shapes_of
from sola_edge.checkpoint import open_checkpoint
from sola_edge.cli import app
from sola_edge.errors import UserError
from sola_edge.files import replace_parts, size_of
from sola_edge.testing import tiny_checkpoint

SIZE = 300_000  # bytes: of the tiny models' tensors, a third or so


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("shards") / "compressed", compressed=True)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense file in F32."""
    folder = tmp_path_factory.mktemp("shards")
    return export(tiny_checkpoint(folder / "dense"), folder / "dense.gguf", "f32").path


def test_shapes_are_those_of_all_shards(dense: Path, split: Path) -> None:
    assert shapes_of(open_artefact(split)) == shapes_of(open_artefact(dense))


@pytest.fixture(scope="module")
def split(dense: Path) -> Path:
    """The first shard of the same."""
    return export(dense, dense.with_name("split.gguf"), "f32", split_max_size=SIZE).path


def test_shards_hold_the_file_and_no_more_than_asked(compressed: Path, tmp_path: Path) -> None:
    whole = export(compressed, tmp_path / "whole.gguf", "f16")
    result = export(compressed, tmp_path / "x.gguf", "f16", split_max_size=SIZE)
    count = len(result.files)
    assert count > 1 and result.path == result.files[0]
    assert [file.name for file in result.files] == [f"x-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    assert sorted(tmp_path.iterdir()) == sorted([whole.path, *result.files])
    assert result.bytes == sum(size_of(file) for file in result.files) and result.tensor_bytes == whole.tensor_bytes
    readers = [gguf.GGUFReader(file) for file in result.files]
    assert all(sum(tensor.n_bytes for tensor in reader.tensors) <= SIZE for reader in readers)
    stored = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    original = gguf.GGUFReader(whole.path)
    assert list(stored) == [tensor.name for tensor in original.tensors]
    for tensor in original.tensors:
        np.testing.assert_array_equal(stored[tensor.name].data, tensor.data)
    keys = {key for key in original.fields if not key.startswith("GGUF.")}
    assert {key for key in readers[0].fields if not key.startswith(("GGUF.", "split."))} == keys


@pytest.mark.slow
@pytest.mark.parametrize("type", ["f32", "q4_k_m"])
def test_llama_cpp_loads_shards_by_the_first(type: str, tmp_path: Path, llama_cpp_build: Build) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", compressed=True, hidden=256, ffn=512, heads=4)
    whole = export(source, tmp_path / "whole.gguf", type)
    result = export(source, tmp_path / "split.gguf", type, split_max_size=whole.tensor_bytes // 3)
    assert len(result.files) > 3 and result.type_counts == whole.type_counts
    expected = llama_cpp_logits(llama_cpp_build, whole.path)
    np.testing.assert_array_equal(llama_cpp_logits(llama_cpp_build, result.path), expected)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    result.files[1].unlink()
    with pytest.raises(Refused):
        llama_cpp_logits(llama_cpp_build, result.path)


def test_our_readers_take_the_first_shard(dense: Path, split: Path) -> None:
    whole, parts = open_checkpoint(dense), open_checkpoint(split)
    assert sorted(whole.names()) == sorted(parts.names()) and len(parts.weight_files()) > 1
    for name in whole.names():
        np.testing.assert_array_equal(whole.tensor(name).numpy(), parts.tensor(name).numpy())
    artefact = open_artefact(split)
    assert (artefact.precision, artefact.bytes) == ("f32", sum(size_of(file) for file in parts.weight_files()))
    assert parts.tokenizer()("That")["input_ids"] == whole.tokenizer()("That")["input_ids"]


def test_other_shards_and_missing_ones_are_one_clear_line(split: Path, tmp_path: Path) -> None:
    files = open_checkpoint(split).weight_files()
    for file in files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    later, first = tmp_path / files[1].name, tmp_path / files[0].name
    for opened in (open_checkpoint, open_artefact):
        with pytest.raises(UserError, match=f"shard 2 of {len(files)} .* the first one, {first.name}"):
            opened(later)
    (tmp_path / files[-1].name).unlink()
    with pytest.raises(UserError, match=f"{files[-1].name} is not there"):
        open_checkpoint(first)
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(UserError, match=r"renamed\.gguf is the first of"):
        open_artefact(tmp_path / "renamed.gguf")


def test_a_model_that_fits_is_one_file(compressed: Path, tmp_path: Path) -> None:
    result = export(compressed, tmp_path / "x.gguf", "f16", split_max_size=10**9)
    assert result.files == (tmp_path / "x.gguf",) == tuple(tmp_path.iterdir())
    assert not [key for key in gguf.GGUFReader(result.path).fields if key.startswith("split.")]


def test_in_a_folder_shards_are_named_by_convention(compressed: Path, tmp_path: Path) -> None:
    result = export(compressed, tmp_path, "q8_0", split_max_size=SIZE // 3)
    assert result.path.name.endswith(f"-Q8_0-00001-of-{len(result.files):05d}.gguf")


def test_a_source_is_not_replaced_while_it_is_read(split: Path) -> None:
    before = split.read_bytes()
    out = split.with_name("split.gguf")
    with pytest.raises(UserError, match="is the model itself"):
        export(split, out, "f32", split_max_size=SIZE)
    assert split.read_bytes() == before


def test_an_interrupted_export_leaves_the_old_shards(compressed: Path, tmp_path: Path, monkeypatch) -> None:
    old = export(compressed, tmp_path / "x.gguf", "f16", split_max_size=SIZE).files
    before = {file.name: file.read_bytes() for file in old}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(compressed, tmp_path / "x.gguf", "f16", split_max_size=SIZE)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_no_first_file_stands_beside_parts_of_another(tmp_path: Path, monkeypatch) -> None:
    """The moment between: whoever opens the first finds none."""
    targets = [tmp_path / name for name in ("a", "b", "c")]
    for target in targets:
        target.write_text("old")
    moved: list[str] = []
    own = Path.replace

    def seen(path: Path, target: Path) -> Path:
        assert not targets[0].exists()
        moved.append(target.name)
        return own(path, target)

    monkeypatch.setattr(Path, "replace", seen)
    with replace_parts(targets) as folder:
        for target in targets:
            (folder / target.name).write_text("new")
            assert target.read_text() == "old"
    assert moved == ["b", "c", "a"] and [target.read_text() for target in targets] == ["new"] * 3
    assert len(list(tmp_path.iterdir())) == 3


def test_sizes_are_read_as_llama_gguf_split_reads_them(compressed: Path, tmp_path: Path, monkeypatch) -> None:
    assert (parse_size("500M"), parse_size("2G")) == (500_000_000, 2_000_000_000)
    for text in ("", "0G", "5", "5K", "1.5G", "-1G", "2g", "2GB", " 2G"):
        with pytest.raises(UserError, match="500M or 2G"):
            parse_size(text)
    monkeypatch.setattr(shards, "MOST", 3)
    with pytest.raises(UserError, match="larger split max size"):
        export(compressed, tmp_path / "x.gguf", "f32", split_max_size=1)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "checkpoint", hidden=128, ffn=512)
    arguments = ["export", "gguf", str(source), str(tmp_path / "x.gguf"), "--type", "f32", "--split-max-size", "1M"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0 and "shards" in found.output
    assert (tmp_path / "x-00001-of-00006.gguf").exists(), sorted(tmp_path.iterdir())
