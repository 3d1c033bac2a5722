"""Claims on the real model: rate, memory, sizes, quantized factors, and the demo without a compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exporters.gguf import export as export_gguf
from exporters.llama_cpp import Build, CompilerMissing
from exporters.onnx import export as export_onnx
from sola_edge.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow
MEASURED = """
import sys
from pathlib import Path
from sola_edge.cli import main
try:
    main()
finally:
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(peak.split()[1], file=sys.stderr)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory as Linux tells it")
def test_compression_meets_the_rate_within_its_memory(smollm2_gguf: Path, tmp_path: Path) -> None:
    options = ["--rate", "0.2", "--window", "512", "--windows", "8", "--correction-windows", "2", "--json"]
    command = [sys.executable, "-c", MEASURED, "compress", str(smollm2_gguf), str(tmp_path / "small"), *options]
    own_cache = os.environ | {"SOLA_EDGE_CACHE": str(tmp_path / "cache")}  # nothing is found there: all is computed
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=own_cache)
    assert json.loads(done.stdout)["rate"] == pytest.approx(0.2, rel=0.005)
    assert int(done.stderr.split()[-1]) * 1024 <= 2.5e9


def test_files_shrink_as_the_parameters_do(smollm2: Path, smollm2_compressed: Path, tmp_path: Path) -> None:
    """Compressed / dense bytes at the same type within 1 % of the parameters' ratio."""
    parameters = [open_checkpoint(folder).parameters() for folder in (smollm2_compressed, smollm2)]
    expected = parameters[0] / parameters[1]
    folders = {"small": smollm2_compressed, "dense": smollm2}
    for type_name in ("f16", "q8_0"):
        sizes = {n: export_gguf(f, tmp_path / f"{n}.gguf", type=type_name).bytes for n, f in folders.items()}
        assert sizes["small"] / sizes["dense"] == pytest.approx(expected, rel=0.01)
    sizes = {n: export_onnx(f, tmp_path / n).bytes for n, f in folders.items()}
    assert sizes["small"] / sizes["dense"] == pytest.approx(expected, rel=0.01)


def test_llama_quantize_and_bench_take_factors(
    llama_cpp_build: Build, smollm2_compressed: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "f16.gguf", tmp_path / "q4_k_m.gguf"
    export_gguf(smollm2_compressed, source)
    quantize = [llama_cpp_build.tool("llama-quantize"), source, target, "q4_k_m", "2"]
    subprocess.run(quantize, check=True, capture_output=True)
    assert target.stat().st_size < 0.55 * source.stat().st_size
    bench = [
        llama_cpp_build.tool("llama-bench"),
        "-m",
        target,
        "-p",
        "16",
        "-n",
        "4",
        "-r",
        "1",
        "-t",
        "1",
        "-o",
        "json",
    ]
    rows = json.loads(subprocess.run(bench, check=True, capture_output=True, text=True).stdout)
    assert all(row["avg_ts"] > 0 for row in rows)


def test_demo_without_a_compiler_skips_llama_cpp_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from sola_edge import demo

    def refuse() -> None:
        raise CompilerMissing("no C++ compiler was found")

    monkeypatch.setattr("exporters.llama_cpp.build", refuse)
    assert demo._llama_cpp() == [("llama.cpp", "no C++ compiler was found")]
