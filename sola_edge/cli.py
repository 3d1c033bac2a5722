"""The command line: thin. Each command imports what it needs when it runs, so `--help` answers at once.

Exit code 0: done and within tolerance. 1: a check failed. 2: bad input, in one clear line.
"""

import errno
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sola_edge import __version__
from sola_edge.cli_compare import add_commands
from sola_edge.cli_frontier import add_frontier_commands
from sola_edge.cli_options import (
    Align,
    Artefacts,
    Calibration,
    CorrectionWindows,
    Device,
    Fresh,
    GradientWindows,
    Json,
    JsonFile,
    OnDevice,
    Text,
    Threads,
    Window,
    Windows,
    alignment,
)
from sola_edge.config import CompressionSettings
from sola_edge.errors import UserError
from sola_edge.texts import DEFAULT_CALIBRATION, DEFAULT_SCORING

PLACE_ERRORS = {errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EPERM, errno.EDQUOT}

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
export_app = typer.Typer(
    no_args_is_help=True, help="Export a checkpoint, compressed or dense, to a file for a runtime."
)
llama_app = typer.Typer(no_args_is_help=True, help="The pinned llama.cpp that runs hybrid GGUF files.")
check_app = typer.Typer(no_args_is_help=True, help="Run exported files and compare them with PyTorch.")
app.add_typer(export_app, name="export")
app.add_typer(llama_app, name="llama-cpp")
app.add_typer(check_app, name="check")

Structure = Annotated[str, typer.Option(help="hybrid: every form; narrow: fewer neurons, runs on every stock runtime.")]
Factors = Annotated[str, typer.Option(help="plain, pivoted (fewer parameters, outputs reordered), or auto by matrix.")]
NoGradients = Annotated[bool, typer.Option("--no-gradients", help="Forward statistics alone: faster, and much worse.")]
add_commands(app)
add_frontier_commands(app, check_app)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in PLACE_ERRORS:
            raise
        _fail(f"{error.filename or 'the output'}: {error.strerror}; free or choose another place")


def _fail(message: str) -> None:
    print(f"sola-edge: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _print(rows: dict[str, Any], title: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, default=str))
        return
    table = Table(title=title, show_header=False)
    for key, value in rows.items():
        table.add_row(key.replace("_", " "), f"{value:,}" if type(value) is int else str(value))
    Console().print(table)


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Compress a decoder-only LLM with SoLA, export it to ONNX and GGUF, and prove what runs on the device."""


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    rate: Annotated[float, typer.Option(help="Share of the whole model's parameters to remove, 0 < rate < 1.")],
    structure: Structure = "hybrid",
    method: Annotated[str, typer.Option(help="sola, or sola-paper, svd, asvd, svd-llm, flap.")] = "sola",
    calibration: Calibration = DEFAULT_CALIBRATION,
    align: Align = "auto",
    factors: Factors = "auto",
    window: Window = CompressionSettings.window,
    windows: Windows = CompressionSettings.max_windows,
    gradient_windows: GradientWindows = CompressionSettings.gradient_windows,
    correction_windows: CorrectionWindows = CompressionSettings.correction_windows,
    no_gradients: NoGradients = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Compress a model into a Hugging Face folder.

    Example: sola-edge compress SmolLM2.gguf build/small --rate 0.2 --calibration notes.txt
    """
    settings = CompressionSettings(
        rate=rate,
        method=method,
        structure=structure,
        align=alignment(align),
        factors=factors,
        gradient_windows=0 if no_gradients else gradient_windows,
        correction_windows=correction_windows,
        window=window,
        max_windows=windows,
        device=device,
    )
    from sola_edge.compress import compress as run

    made = run(model, out, settings, calibration)
    rows = {
        "checkpoint": str(made.path),
        "method": method,
        "rate": round(made.plan.rate, 5),
        "parameters_dense": made.plan.parameters_dense,
        "parameters_removed": made.plan.parameters_removed,
        "matrices_changed": len(made.plan.layouts),
        "predicted_rise_of_the_loss": _predicted(made.plan) if settings.gradient_windows else "-",
        "calibration": f"{made.calibration['text']}, {made.calibration['tokens']:,} tokens",
    }
    _print(rows, "compressed", as_json)


def _predicted(plan: Any) -> str:
    """In nats per token of the calibration text, before the correction; a dash where the method predicts none."""
    return f"{sum(plan.predicted_loss.values()):.4f} nats" if plan.predicted_loss else "-"


@export_app.command("onnx")
def export_onnx(
    checkpoint: Annotated[str, typer.Argument(help="A folder (compressed or dense), a .gguf file, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    graph: Annotated[
        str,
        typer.Option(help="genai: ONNX Runtime's own operators. portable: the ONNX standard's alone, opset 23."),
    ] = "genai",
    precision: Annotated[
        str, typer.Option(help="fp32; fp16 or bf16 for GPUs; int8: near fp32; int4: small and fast.")
    ] = "fp32",
    block: Annotated[
        int | None,
        typer.Option(
            help="Input channels that share a scale: 16 to 256, less for a tied head; default: 16 of int8, 32 of int4."
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--asymmetric", help="Blocks without or with a zero point; default: with of int8."),
    ] = None,
    int8_activations: Annotated[
        bool | None,
        typer.Option(
            "--int8-activations/--fp32-activations", help="Multiply in integers (faster; default of int4) or in fp32."
        ),
    ] = None,
    head: Annotated[str | None, typer.Option(help="The head's own precision, and a tied embedding's.")] = None,
    rounding: Annotated[
        str,
        typer.Option(
            help="Of blocks. nearest: at once. gptq: by what a text makes of the inputs (not the head): minutes, nearer."
        ),
    ] = "nearest",
    calibration: Annotated[str | None, typer.Option(help="The text of gptq, as of `compress`; default: mixed.")] = None,
    windows: Annotated[
        int | None, typer.Option(help="Its windows of 2,048 tokens to use, at most; default: 16.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an ONNX folder: model.onnx, its weights, genai_config.json, tokenizer.

    Example: sola-edge export onnx build/small build/small-onnx --precision int8
    """
    from exporters.onnx import Quantization, export, rounding_text, slow

    text = rounding_text(rounding, calibration, windows)
    quantization = Quantization(block, symmetric, int8_activations, head, text)
    result = export(checkpoint, out, graph=graph, precision=precision, quantization=quantization)
    told = {"path": str(result.path), "bytes": result.bytes, "files": len(result.files)}
    if slow(precision, quantization):
        told["speed"] = "near fp32, but slow to decode on a CPU: --int8-activations is many times faster, and less near"
    _print(told, "exported", as_json)


@export_app.command("gguf")
def export_gguf(
    checkpoint: Annotated[str, typer.Argument(help="A folder (compressed or dense), a .gguf file, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The .gguf file to write, or a folder to name it in by convention.")],
    type: Annotated[str, typer.Option(help="GGUF type of the matrices: f32, f16, bf16, q8_0, …, q4_k_m, …")] = "f16",
    dense: Annotated[bool, typer.Option(help="Multiply the factors out, for any llama.cpp: saves nothing.")] = False,
    imatrix: Annotated[
        str | None, typer.Option(help="For K- and I-quants: the text of an importance matrix, as of `compress`.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="Its windows of 512 tokens to read, at most; default: 64.")
    ] = None,
    split_max_size: Annotated[
        str | None,
        typer.Option(help="Write shards of at most this size, e.g. 500M or 2G; a runtime is given the first."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a GGUF file. A hybrid one runs on `sola-edge llama-cpp build`'s llama.cpp.

    Example: sola-edge export gguf build/small build/small.gguf --type q8_0
    """
    from exporters.gguf import Importance, export, parse_size

    if windows is not None and imatrix is None:
        raise UserError("windows are those of an importance matrix; give --imatrix TEXT too, or leave them out")
    importance = None if imatrix is None else Importance(imatrix, Importance.windows if windows is None else windows)
    size = None if split_max_size is None else parse_size(split_max_size)
    result = export(checkpoint, out, type=type, dense=dense, importance=importance, split_max_size=size)
    rows = {"path": str(result.path), "bytes": result.bytes, "tensors": result.type_counts}
    if len(result.files) > 1:
        rows["shards"] = len(result.files)
    if result.fallbacks:
        rows["stored_otherwise_because_their_rows_are_no_whole_blocks"] = list(result.fallbacks)
    if result.expanded:
        rows["stored_larger_than_in_the_checkpoint"] = list(result.expanded)
    if result.window:
        rows["computes_the_checkpoint_up_to_tokens"] = result.window
    rows["runs_on"] = "any llama.cpp" if result.stock else "the llama.cpp of `sola-edge llama-cpp build`"
    if dense:
        rows["note"] = "the factors are multiplied out: this file runs on any llama.cpp and saves nothing"
    _print(rows, "exported", as_json)


@llama_app.command("build")
def llama_build(
    jobs: Annotated[int | None, typer.Option(help="Parallel compilations; default: one per core.")] = None,
    cmake_arg: Annotated[list[str] | None, typer.Option(help="Passed to cmake, e.g. -DGGML_CUDA=ON.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="A llama.cpp checkout of your own instead of the pinned one; it is only read.")
    ] = None,
    stock: Annotated[bool, typer.Option("--stock", help="Without the addition: runs dense and narrow files.")] = False,
    as_json: Json = False,
) -> None:
    """Build it into the cache folder; a second run builds nothing.

    Checks use the build of the pinned one with the addition, or that in the folder that $SOLA_EDGE_LLAMA_CPP names.

    Example: sola-edge llama-cpp build --jobs 2
    """
    from exporters.llama_cpp import build, info

    made = build(jobs=jobs, cmake_args=tuple(cmake_arg or ()), checkout=source, addition=not stock)
    _print(info(made), "llama.cpp", as_json)


@llama_app.command("info")
def llama_info(as_json: Json = False) -> None:
    """Which llama.cpp is pinned, and where its build is.

    Example: sola-edge llama-cpp info --json
    """
    from exporters.llama_cpp import info

    _print(info(), "llama.cpp", as_json)


Output = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the results to this report.json.")]


@check_app.command("parity")
def check_parity(
    reference: Annotated[
        Path, typer.Argument(help="What the candidates are compared with, e.g. the checkpoint folder.")
    ],
    candidates: Artefacts,
    text: Text = DEFAULT_SCORING,
    context: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    windows: Annotated[int, typer.Option(help="Windows to score.")] = 4,
    kl_mean: Annotated[
        float | None, typer.Option(help="Mean KL divergence at most, nats; default: by precision, as are the next two.")
    ] = None,
    top1: Annotated[float | None, typer.Option(help="Top-1 agreement at least, 0 to 1.")] = None,
    ppl_change: Annotated[float | None, typer.Option(help="Change of the perplexity at most, per cent.")] = None,
    compression_cost: Annotated[
        bool,
        typer.Option(
            "--compression-cost",
            help="The candidates are other models (compressed): no limits of logits but those given here.",
        ),
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="What has the tokenizer of the text; default: the reference.")
    ] = None,
    threads: Threads = None,
    device: OnDevice = "cpu",
    output: Output = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Compare exported files with a reference on the same token ids: perplexity, KL divergence, top-1 and top-5 agreement.

    Example: sola-edge check parity build/small build/small-onnx build/small.gguf --text notes.txt
    """
    from runtime_checks import check_parity as run
    from runtime_checks.kept import Kept
    from runtime_checks.parity import limits
    from sola_edge.texts import load_text

    asked = limits(kl_mean=kl_mean, top1=top1, ppl_change_percent=ppl_change)
    source = load_text(text)
    report = run(
        reference,
        candidates,
        source.joined,
        text_name=source.name,
        context=context,
        windows=windows,
        threads=threads,
        tokenizer_from=tokenizer,
        asked=asked,
        comparison="compression cost" if compression_cost else "export parity",
        device=device,
        kept=Kept(fresh=fresh),
    )
    _finish(report, output, as_json)


@check_app.command("llama-perplexity")
def check_llama_perplexity(
    reference: Annotated[Path, typer.Argument(help="What the files are compared with, e.g. the checkpoint folder.")],
    candidates: Annotated[list[Path], typer.Argument(help=".gguf files.")],
    text: Text = DEFAULT_SCORING,
    context: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    windows: Annotated[int, typer.Option(help="Windows, of which the second halves are scored.")] = 4,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Let llama.cpp's own llama-perplexity compare GGUF files with a reference that PyTorch computes.

    Example: sola-edge check llama-perplexity build/small build/small-f16.gguf --text notes.txt
    """
    from runtime_checks.llama_perplexity import judge_by_llama_perplexity
    from sola_edge.texts import load_text

    source = load_text(text)
    found = judge_by_llama_perplexity(
        reference,
        candidates,
        source.joined,
        text_name=source.name,
        context=context,
        windows=windows,
        threads=threads,
    )
    if as_json:
        print(found.model_dump_json())
        return
    ours = found.perplexity
    row = {"reference": str(reference), "perplexity": f"{ours.value:.4f} ± {ours.standard_error:.4f}"}
    _print(row, "our own sums of the reference's logits", False)
    for judged in found.judged:
        _print(judged.model_dump(), f"llama-perplexity, {found.protocol.windows} × {context} tokens", False)


@check_app.command("perplexity")
def check_perplexity(
    artefact: Annotated[Path, typer.Argument(help="A checkpoint folder, an ONNX folder or a .gguf file.")],
    text: Text = DEFAULT_SCORING,
    context: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Windows to score; default: the whole text.")] = None,
    threads: Threads = None,
    device: OnDevice = "cpu",
    output: Output = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Perplexity of one file in its own runtime, over non-overlapping windows without BOS.

    Example: sola-edge check perplexity build/small --text notes.txt --windows 40
    """
    from runtime_checks import measure_perplexity
    from runtime_checks.kept import Kept
    from sola_edge.texts import load_text

    source = load_text(text)
    named = {"text_name": source.name, "context": context, "windows": windows, "threads": threads}
    report = measure_perplexity(artefact, source.joined, **named, device=device, kept=Kept(fresh=fresh))
    _finish(report, output, as_json)


@check_app.command("tasks")
def check_tasks(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="Folders (compressed or dense), .gguf files or hub ids; the first is the baseline."),
    ],
    task: Annotated[list[Path], typer.Option(help='A .jsonl file of {"question", "choices", "answer"}; repeatable.')],
    limit: Annotated[int | None, typer.Option(help="Questions of each task, from its start; default: all.")] = None,
    threads: Threads = None,
    output: JsonFile = None,
    as_json: Json = False,
) -> None:
    """Zero-shot multiple-choice accuracy in PyTorch, every checkpoint on every task, paired with the first checkpoint.

    Example: sola-edge check tasks build/dense build/small --task piqa.jsonl --task winogrande.jsonl
    """
    from runtime_checks.task_table import print_tasks
    from runtime_checks.tasks import measure_tasks

    report = measure_tasks(checkpoints, task, limit=limit, threads=threads, output=output)
    if as_json:
        print(report.model_dump_json())
    else:
        print_tasks(report)


@check_app.command("bench")
def check_bench(
    candidates: Artefacts,
    baseline: Annotated[Path | None, typer.Option(help="Take turns with this one and print ratios to it.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prefill test.")] = 512,
    generate: Annotated[int, typer.Option(help="Tokens of the decode test.")] = 128,
    rounds: Annotated[int, typer.Option(help="How often the artefacts take turns.")] = 3,
    threads: Threads = None,
    device: OnDevice = "cpu",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Prefill and decode speed and peak memory, artefacts in turn in one run.

    Example: sola-edge check bench build/small.gguf --baseline build/dense.gguf
    """
    from runtime_checks import bench

    report = bench(
        candidates, baseline, prompt=prompt, generate=generate, rounds=rounds, threads=threads, device=device
    )
    _finish(report, output, as_json)


@app.command("report")
def report_command(
    results: Annotated[
        list[Path],
        typer.Argument(help="report.json, frontier.json, what check memory, throughput and accuracy wrote."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Make one self-contained page of earlier results.

    Example: sola-edge report parity.json bench.json build/frontier/frontier.json -o report.html
    """
    from runtime_checks import load_results, write_html

    report, studies = load_results(results)
    write_html(report, output, studies)
    for study in studies if not as_json else ():
        for line in study.failures:
            print(f"failed: {line}")
    if report.results or as_json:
        _finish(report, None, as_json, output)
    else:
        print(f"report: {output}")
    if not all(study.passed for study in studies):
        raise typer.Exit(1)


def _finish(report: Any, output: Path | None, as_json: bool, page: Path | None = None) -> None:
    """Write, print (ending with the page's path, if there is one), and exit with 1 when a check failed."""
    from runtime_checks import print_table, write_json

    if output is not None:
        write_json(report, output)
    if as_json:
        print(report.model_dump_json())
    else:
        print_table(report)
        if page is not None:
            print(f"report: {page}")
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("build/demo"),
    rate: Annotated[float, typer.Option(help="Compression rate.")] = 0.2,
    as_json: Json = False,
) -> None:
    """Compress SmolLM2-135M, export it, run it in every runtime, and write the report.

    Example: sola-edge demo --out build/demo
    """
    from sola_edge.demo import run_demo

    report, page = run_demo(out, rate)
    _finish(report, None, as_json, page)


if __name__ == "__main__":
    main()
