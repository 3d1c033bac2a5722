"""The parts of a diagnosis by hand, and files as they were exported, of every layout and type, about which it says nothing."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from faults import gguf_changed, onnx_changed, scaled, swapped
from gguf.quants import quantize
from layouts import MIXED, NARROW, checkpoint_with

from exporters.onnx import Quantization, Text
from exporters.onnx import export as export_onnx
from runtime_checks.artefacts import open_artefact
from runtime_checks.diagnosis.declared import compare_declared, marker
from runtime_checks.diagnosis.difference import NOISE, difference, limits_of
from runtime_checks.diagnosis.facts import theta_of
from runtime_checks.diagnosis.gguf_weights import compare_gguf
from runtime_checks.diagnosis.ids import compare_ids
from runtime_checks.diagnosis.onnx_weights import compare_onnx
from sola_edge.checkpoint import open_checkpoint
from sola_edge.errors import UserError
from sola_edge.testing import byte_tokenizer, tiny_checkpoint

EXACT = limits_of("F32", True)


def matrix(rows: int = 40, columns: int = 64) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)


# --- two matrices ----------------------------------------------------------------------------------------------------


def told(found: np.ndarray, kind: str = "F32", expected: np.ndarray | None = None) -> str | None:
    return difference(found, matrix() if expected is None else expected, limits_of(kind, True))


def test_what_happened_to_a_matrix_is_said_in_words() -> None:
    whole = matrix()
    assert told(whole) is None and told(whole * np.float32(1 + 1e-7)) is None
    assert told(1.01 * whole) == "is 1.01 times the checkpoint's in all 40 rows"
    assert told(swapped(3, 7)(whole)) == "rows 3 and 7 are each other's"
    assert told(swapped(5, 9)(whole.T).T) == "columns 5 and 9 are each other's"
    turned = whole.copy()
    turned[[1, 2, 4]] = whole[[2, 4, 1]]
    assert (
        told(turned) == "3 rows are in another order (row 1 is the checkpoint's 2) in 3 of 40 rows, the first of them 1"
    )
    one = whole.copy()
    one[6, 8] = 1.01 * whole[6, 8]
    assert told(one) == (
        f"1 of its values differs: row 6, column 8 is {one[6, 8]:.6g} where the checkpoint has {whole[6, 8]:.6g}"
    )
    part = whole.copy()
    part[30:] *= 2
    assert told(part) == "is 2 times the checkpoint's in 10 of 40 rows, the first of them 30"
    part[30:] = matrix()[:10]
    assert told(part) == "differs by 1.4 of its norm in 10 of 40 rows, the first of them 30"
    part[0, 0] = np.nan
    assert told(part) == "1 values are not finite"
    assert told(whole[:3]) == "has shape (3, 64), the checkpoint's (40, 64)"
    assert told(1.01 * whole[0], expected=whole[0]) == "is 1.01 times the checkpoint's"


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0", "Q4_1"])
def test_rounding_twice_is_no_difference_and_a_fault_in_blocks_is_one(kind: str) -> None:
    """llama-quantize rounds to blocks what was rounded to F16 before."""
    qtype = gguf.GGMLQuantizationType[kind]

    def stored(values: np.ndarray) -> np.ndarray:
        return gguf.quants.dequantize(quantize(np.ascontiguousarray(values), qtype), qtype)

    whole = matrix(96, 256)
    expected = stored(whole)
    assert told(stored(whole.astype(np.float16).astype(np.float32)), kind, expected) is None
    assert told(np.float32(1.01) * expected, kind, expected) == "is 1.01 times the checkpoint's in all 96 rows"
    assert told(swapped(3, 7)(expected), kind, expected) == "rows 3 and 7 are each other's"
    lost, louder = expected.copy(), expected.copy()
    lost[7, 32:64] = 0  # a block
    louder[9] *= np.float32(1.05)
    for broken, row in ((lost, 7), (louder, 9)):
        words = told(broken, kind, expected)
        assert words is not None and words.endswith(f"in row {row}")
    assert difference(expected, whole, limits_of(kind, False)) is None  # the rounding itself
    assert np.linalg.norm(expected - whole) < 2 * NOISE[int(kind[1])] * np.linalg.norm(whole)


# --- what a file says ------------------------------------------------------------------------------------------------


def test_theta_is_read_off_frequencies() -> None:
    frequencies = 20000.0 ** (-np.arange(32) / 32)
    assert theta_of(frequencies) == pytest.approx(20000)
    assert theta_of(frequencies / 4) == pytest.approx(20000)  # linear scaling
    assert theta_of(np.arcsin(np.sin(frequencies).astype(np.float16).astype(np.float64)), 1e-3) == pytest.approx(
        20000, rel=5e-3
    )
    assert theta_of(np.r_[frequencies[:16], frequencies[16:] / 8]) is None  # llama3's scaling is none by one factor


def test_ids_that_differ() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("some text")["input_ids"]
    assert compare_ids(ids, ids, tokenizer, "x") == []
    cases = {
        "a BOS (id 1) is put before the text, the reference puts nothing": ([1, *ids], ids),
        "nothing is put before the text, the reference puts a BOS (id 1)": (ids, [1, *ids]),
        "an EOS (id 2) is put after the text, the reference puts nothing": ([*ids, 2], ids),
        "a token (id 7) is put before the text, the reference puts a BOS (id 1)": ([7, *ids], [1, *ids]),
        "the text is cut otherwise from token 2 on: 'tex' where the reference has 'me '": ([*ids[:2], *ids[5:]], ids),
    }
    for words, (found, expected) in cases.items():
        assert [finding.detail for finding in compare_ids(found, expected, tokenizer, "x")] == [words]


@pytest.mark.parametrize(("name", "file_type", "kind", "says"), [
    ("model-Q4_0.gguf", gguf.LlamaFileType.MOSTLY_Q4_0, "Q4_0", []),
    ("model-F16.gguf", gguf.LlamaFileType.MOSTLY_Q4_0, "Q4_0", ["model-F16.gguf"]),
    ("model.gguf", gguf.LlamaFileType.MOSTLY_F16, "Q4_0", ["general.file_type"]),
    ("model.F16.gguf", gguf.LlamaFileType.MOSTLY_F16, "BF16", ["general.file_type", "model.F16.gguf"]),
    ("f32.gguf", gguf.LlamaFileType.ALL_F32, "F16", ["general.file_type", "f32.gguf"]),
    ("small-q4_k_m.gguf", gguf.LlamaFileType.MOSTLY_Q4_K_M, "Q5_0", []),  # rows that are no whole blocks
    ("small-q4_k_m.gguf", gguf.LlamaFileType.MOSTLY_Q4_K_M, "Q4_0", []),
    ("small-Q8_0.gguf", gguf.LlamaFileType.MOSTLY_Q8_0, "F16", []),  # finer than it says
    ("small-Q8_0.gguf", gguf.LlamaFileType.MOSTLY_Q8_0, "Q5_1", ["general.file_type", "small-Q8_0.gguf"]),
])  # fmt: skip
def test_a_file_is_no_finer_than_it_calls_itself(
    tmp_path: Path, name: str, file_type: gguf.LlamaFileType, kind: str, says: list[str]
) -> None:
    writer = gguf.GGUFWriter(tmp_path / name, "llama")
    writer.add_file_type(file_type)
    qtype = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("a.weight", quantize(matrix(), qtype), raw_dtype=qtype)
    writer.add_tensor("norm.weight", matrix()[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = compare_declared(open_artefact(tmp_path / name))
    assert [finding.where for finding in found] == says
    assert all("coarser" in finding.detail and kind in finding.detail for finding in found)


@pytest.mark.parametrize(("file_type", "rows"), [
    (gguf.LlamaFileType.MOSTLY_IQ3_XXS, {"IQ3_XXS": 80, "IQ2_S": 20}),  # q and k, of a model without grouped heads
    (gguf.LlamaFileType.MOSTLY_IQ2_S, {"IQ2_XS": 90, "IQ3_S": 10}),
    (gguf.LlamaFileType.MOSTLY_IQ3_XS, {"IQ3_XXS": 60, "IQ3_S": 40}),
])  # fmt: skip
def test_a_mixture_may_hold_what_llama_quantize_puts_into_it(
    tmp_path: Path, file_type: gguf.LlamaFileType, rows: dict[str, int]
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_file_type(file_type)
    for kind, count in rows.items():
        qtype = gguf.GGMLQuantizationType[kind]
        shape = gguf.quant_shape_to_byte_shape((count, 256), qtype)
        writer.add_tensor(f"{kind}.weight", np.zeros(shape, dtype=np.uint8), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert not compare_declared(open_artefact(tmp_path / "model.gguf"))


@pytest.mark.parametrize("text", ["[1", "[1]", "3"])
def test_a_damaged_note_of_the_exporter_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    assert marker(tmp_path) is None
    (tmp_path / "sola-edge.json").write_text(text)
    with pytest.raises(UserError, match="no JSON object"):
        marker(tmp_path)


# --- exported files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_with(tmp_path_factory.mktemp("diagnosis") / "mixed", MIXED, bias=True, tied=False)


@pytest.mark.parametrize(("graph", "precision"), [
    ("genai", "fp32"), ("genai", "fp16"), ("genai", "bf16"), ("genai", "int8"), ("genai", "int4"), ("portable", "fp32"),
])  # fmt: skip
def test_nothing_is_said_of_an_onnx_folder_as_it_was_exported(
    mixed: Path, tmp_path: Path, graph: str, precision: str
) -> None:
    export_onnx(mixed, tmp_path / "onnx", graph, precision)
    assert compare_onnx(tmp_path / "onnx", open_checkpoint(mixed)) == []
    assert compare_declared(open_artefact(tmp_path / "onnx")) == []


def test_faults_in_blocks_are_named(tmp_path: Path) -> None:
    """Of weights rounded to the nearest levels and by a text; a folder of 4 bits is none of fp32, whatever it says."""
    source = tiny_checkpoint(tmp_path / "tiny", layers=2)
    (tmp_path / "words.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    text = Text(str(tmp_path / "words.txt"), windows=2, window=64)
    name, head = "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"
    for kind, choices in (("nearest", None), ("gptq", Quantization(text=text))):
        sound = export_onnx(source, tmp_path / kind, precision="int4", quantization=choices).path.parent
        assert compare_onnx(sound, open_checkpoint(source)) == []
        faults = {f"{name}.values": swapped(3, 7), f"{head}.scales": scaled(1.01)}
        found = compare_onnx(onnx_changed(sound, tmp_path / f"{kind}-wrong", faults), open_checkpoint(source))
        assert all(finding.fails for finding in found) and {f.where: f.detail for f in found} == {
            name: found[1].detail,
            head: "is 1.01 times the checkpoint's in all 320 rows",
        }
    marker = sound / "sola-edge.json"
    marker.write_text(marker.read_text().replace("int4", "fp32"))
    (finding,) = compare_declared(open_artefact(sound))
    assert finding.detail == "the folder calls itself fp32, but most of its weights are int4-a8"


def test_a_folder_of_another_exporter_is_not_compared(mixed: Path, tmp_path: Path) -> None:
    folder = export_onnx(mixed, tmp_path / "onnx").path.parent
    (folder / "sola-edge.json").write_text("{}")
    with pytest.raises(UserError, match="does not tell how weights are stored"):
        compare_onnx(folder, open_checkpoint(mixed))
    (folder / "sola-edge.json").unlink()
    with pytest.raises(UserError, match="not written by sola-edge"):
        compare_onnx(folder, open_checkpoint(mixed))


@pytest.mark.slow
def test_nothing_is_said_of_a_gguf_file_as_it_was_exported(mixed: Path, tmp_path: Path) -> None:
    from exporters.gguf import export

    checkpoint = open_checkpoint(mixed)
    for kind, dense in (("f32", False), ("f32", True), ("bf16", False), ("q8_0", False), ("q4_1", True)):
        path = export(mixed, tmp_path / f"{dense}-{kind}.gguf", kind, dense=dense).path
        assert compare_gguf(path, checkpoint) == [], (kind, dense)
        assert compare_declared(open_artefact(path)) == []
    narrow = checkpoint_with(tmp_path / "narrow", NARROW)
    path = export(narrow, tmp_path / "narrow.gguf", "f16").path
    assert compare_gguf(path, open_checkpoint(narrow)) == []
    other = compare_gguf(path, checkpoint)  # another model altogether
    assert {"weight", "graph"} == {finding.what for finding in other}


@pytest.mark.slow
def test_a_file_that_llama_quantize_rounded(tmp_path: Path, llama_cpp_build: object) -> None:
    from exporters.gguf import export

    source = tiny_checkpoint(tmp_path / "tiny", hidden=256, ffn=512, layers=2, vocab=320)
    name = "blk.1.ffn_up.weight"
    for kind in ("q6_k", "q3_k_m", "q2_k", "iq4_xs"):
        sound = export(source, tmp_path / f"{kind}.gguf", kind).path
        assert compare_gguf(sound, open_checkpoint(source)) == [], kind
        wrong = gguf_changed(sound, tmp_path / f"{kind}-wrong.gguf", {name: swapped(3, 7)})
        (finding,) = compare_gguf(wrong, open_checkpoint(source))
        assert (finding.where, finding.detail) == (name, "rows 3 and 7 are each other's"), kind
