"""The commands `check frontier`, `memory`, `throughput`, `accuracy`, and `recommend`: thin, importing when they run."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

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
    counts,
    items,
    rates,
    size,
)
from sola_edge.config import CompressionSettings
from sola_edge.texts import DEFAULT_CALIBRATION, DEFAULT_SCORING

OnlyRuntimes = Annotated[
    str | None, typer.Option("--runtimes", "--runtime", help="In these alone; default: all that take the file.")
]


def add_frontier_commands(app: typer.Typer, check_app: typer.Typer) -> None:
    """Register the commands."""
    check_app.command("frontier")(frontier)
    check_app.command("memory")(memory_)
    check_app.command("throughput")(throughput)
    check_app.command("accuracy")(accuracy)
    app.command()(recommend)


def frontier(
    model: Annotated[str, typer.Argument(help="A dense model: a hub id, a folder, or a .gguf file.")],
    out: Annotated[
        Path | None,
        typer.Argument(help="The folder to write; what was begun there goes on. Default: build/frontier/MODEL."),
    ] = None,
    rates_: Annotated[
        str, typer.Option("--rates", help="Compression rates, with commas between them; 0: dense.")
    ] = "0,0.1,0.2,0.3,0.4",
    types: Annotated[
        str,
        typer.Option(
            "--types",
            help="GGUF types and ONNX precisions (int8-a8: with --int8-activations), each in the runtimes that take it.",
        ),
    ] = "f16,q8_0,q6_k,q4_k_m,q3_k_m,fp32,int8-a8,int4",
    runtimes: Annotated[
        str, typer.Option("--runtimes", "--runtime", help="Of llama.cpp, onnxruntime-genai, onnxruntime.")
    ] = "llama.cpp,onnxruntime-genai",
    methods: Annotated[str, typer.Option(help="METHOD[:OPTION…] as of `compare`, e.g. sola,sola:narrow.")] = "sola",
    imatrix: Annotated[
        str | None, typer.Option(help="For K- and I-quants: the text of an importance matrix, as of `export gguf`.")
    ] = None,
    calibration: Calibration = DEFAULT_CALIBRATION,
    align: Align = "auto",
    window: Window = CompressionSettings.window,
    windows: Windows = CompressionSettings.max_windows,
    gradient_windows: GradientWindows = CompressionSettings.gradient_windows,
    correction_windows: CorrectionWindows = CompressionSettings.correction_windows,
    device: Device = "cpu",
    text: Text = DEFAULT_SCORING,
    context: Annotated[int, typer.Option(help="Tokens per scored window.")] = 2048,
    test_windows: Annotated[int, typer.Option(help="Windows to score.")] = 10,
    prompt: Annotated[int, typer.Option(help="Tokens of the prefill test.")] = 512,
    generate: Annotated[int, typer.Option(help="Tokens of the decode test.")] = 128,
    rounds: Annotated[int, typer.Option(help="How often a file takes turns with the dense baseline.")] = 3,
    threads: Threads = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure all anew: nothing found in OUT counts.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep checkpoints and files in OUT/artefacts.")] = False,
    as_json: Json = False,
) -> None:
    """Bytes against perplexity, prefill and decode speed: rates × types × runtimes, with the settings that none beats.

    Example: sola-edge check frontier SmolLM2.gguf build/frontier --rates 0,0.2 --types f16,q8_0,q4_k_m,fp32,int8
    """
    asked_rates, chosen = rates(rates_), items(types, "types")
    labels, runs_on = items(methods, "methods"), items(runtimes, "runtimes")
    multiple = alignment(align)
    from runtime_checks.frontier import default_folder
    from runtime_checks.frontier import frontier as run
    from runtime_checks.frontier_grid import Asked, Scale
    from runtime_checks.frontier_table import print_frontier
    from runtime_checks.study import Common

    common = Common(
        calibration=calibration,
        align=multiple,
        window=window,
        windows=windows,
        gradient_windows=gradient_windows,
        correction_windows=correction_windows,
        device=device,
    )
    asked = Asked(tuple(labels), tuple(asked_rates), tuple(chosen), tuple(runs_on), imatrix)
    scale = Scale(text, context, test_windows, prompt, generate, rounds, threads)
    folder = out or default_folder(model)
    found = run(model, folder, asked, common, scale, fresh=fresh, keep=keep)
    if as_json:
        print(found.model_dump_json())
    else:
        print_frontier(found)
        print(f"measured: {folder / 'frontier.md'}, frontier.json, frontier.csv, frontier.png")
    if not found.passed:
        raise typer.Exit(1)


def memory_(
    artefacts: Artefacts,
    contexts: Annotated[str, typer.Option(help="Lengths of context in tokens, with commas between them.")] = "512,2048",
    runtimes: OnlyRuntimes = None,
    rounds: Annotated[int, typer.Option(help="How many fresh processes every peak is of.")] = 3,
    tolerance: Annotated[
        float, typer.Option(help="Share of the least peak by which what the shapes say may be off: more fails.")
    ] = 0.05,
    threads: Threads = None,
    device: OnDevice = "cpu",
    output: JsonFile = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Resident peak over lengths of context in fresh processes, beside what the shapes in the file say it should be.

    Example: sola-edge check memory build/small.gguf build/small-onnx --contexts 512,2048,4096
    """
    lengths = counts(contexts, "contexts")
    only = items(runtimes, "runtimes") if runtimes else None
    from runtime_checks.kept import Kept
    from runtime_checks.memory_curve import memory_curves
    from runtime_checks.memory_table import print_memory

    report = memory_curves(
        artefacts,
        lengths,
        threads=threads,
        rounds=rounds,
        tolerance=tolerance,
        runtimes=only,
        device=device,
        kept=Kept(fresh=fresh),
    )
    _finish(report, output, as_json, print_memory)


def throughput(
    artefacts: Artefacts,
    baseline: Annotated[
        Path | None, typer.Option(help="Measured in turn with the others, and compared with: the dense model.")
    ] = None,
    prompts: Annotated[str, typer.Option(help="Tokens of a prompt, with commas between them.")] = "128,512",
    generate: Annotated[int, typer.Option(help="Tokens to decode after it.")] = 64,
    batches: Annotated[str, typer.Option(help="Sequences at once, with commas between them.")] = "1",
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads, with commas between them; default: one per core.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often the artefacts take turns.")] = 3,
    runtimes: OnlyRuntimes = None,
    device: OnDevice = "cpu",
    output: JsonFile = None,
    as_json: Json = False,
) -> None:
    """Time to the first token, prefill and decode speed over prompts, batches and threads, beside the machine's limits.

    Example: sola-edge check throughput build/small.gguf --baseline build/dense.gguf --prompts 128,1024 --batches 1,4
    """
    numbers = counts(threads, "threads") if threads else []
    only = items(runtimes, "runtimes") if runtimes else None
    asked = {"prompts": counts(prompts, "prompts"), "batches": counts(batches, "batches"), "threads": numbers}
    from runtime_checks.throughput_grid import Grid, throughput_curves
    from runtime_checks.throughput_table import print_throughput

    grid = Grid(generate=generate, rounds=rounds, **asked)
    report = throughput_curves(artefacts, grid, baseline=baseline, runtimes=only, device=device)
    _finish(report, output, as_json, print_throughput)


def accuracy(
    artefacts: Annotated[
        list[Path], typer.Argument(help="Checkpoint folders, ONNX folders, .gguf files; the first is compared with.")
    ],
    tasks: Annotated[
        str, typer.Option("--tasks", help="Names of lm-evaluation-harness or .jsonl files, with commas between them.")
    ],
    limit: Annotated[int | None, typer.Option(help="Questions of each task, at most.")] = None,
    runtimes: OnlyRuntimes = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A checkpoint whose tokenizer is used; default: the artefact's own.")
    ] = None,
    threads: Threads = None,
    device: OnDevice = "cpu",
    output: JsonFile = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Zero-shot accuracy by lm-evaluation-harness, of checkpoints and of exported files in their own runtimes.

    Example: sola-edge check accuracy build/small build/small-onnx build/small.gguf --tasks arc_easy,piqa --limit 500
    """
    asked = items(tasks, "tasks")
    only = items(runtimes, "runtimes") if runtimes else None
    from runtime_checks.accuracy import measure_accuracy
    from runtime_checks.accuracy_table import print_accuracy
    from runtime_checks.kept import Kept

    kept = Kept(fresh=fresh, more_packages=("lm-eval",))
    report = measure_accuracy(
        artefacts,
        asked,
        limit=limit,
        threads=threads,
        runtimes=only,
        tokenizer_from=tokenizer,
        device=device,
        kept=kept,
    )
    _finish(report, output, as_json, print_accuracy)


def recommend(
    source: Annotated[
        str, typer.Argument(help="A frontier.json, its folder, or the model that `check frontier` measured.")
    ],
    memory: Annotated[str, typer.Option(help="What the device has for it, e.g. 2GB or 512MiB: the resident peak.")],
    min_decode: Annotated[float, typer.Option(help="Tokens per second to decode, at least.")] = 0.0,
    min_prefill: Annotated[float, typer.Option(help="Tokens per second of a prompt, at least.")] = 0.0,
    context: Annotated[
        int | None, typer.Option(help="Tokens to hold; default: those that memory was measured with.")
    ] = None,
    runtimes: Annotated[str | None, typer.Option("--runtimes", "--runtime", help="Of these alone.")] = None,
    as_json: Json = False,
) -> None:
    """The setting of least perplexity that fits a device, with the reason, the runners-up, and what is ruled out.

    Exit code 1 when none fits. Speeds are those of the machine that measured.

    Example: sola-edge recommend build/frontier --memory 2GB --min-decode 10
    """
    limit = size(memory)
    only = items(runtimes, "runtimes") if runtimes else None
    from runtime_checks.recommend import Wanted, frontier_of
    from runtime_checks.recommend import recommend as run
    from runtime_checks.recommend_table import print_recommendation

    found = run(frontier_of(source), Wanted(limit, min_decode, min_prefill, context, only))
    if as_json:
        print(found.model_dump_json())
    else:
        print_recommendation(found)
    if found.chosen is None:
        raise typer.Exit(1)


def _finish(report: Any, output: Path | None, as_json: bool, show: Callable[[Any], None]) -> None:
    """Write, print (JSON, or as `show` does), and exit with 1 when the check failed."""
    from runtime_checks.json_file import write_model

    if output is not None:
        write_model(report, output)
    if as_json:
        print(report.model_dump_json())
    else:
        show(report)
    if not report.passed:
        raise typer.Exit(1)
