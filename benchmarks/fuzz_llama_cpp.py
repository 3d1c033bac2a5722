"""Load damaged GGUF files in a llama.cpp with AddressSanitizer, and tell crashes by way of our addition from llama.cpp's own.

    python benchmarks/fuzz_llama_cpp.py --cases 2000

A build of the library alone is made first (10 to 20 core minutes). A tiny hybrid model and the same model dense are damaged
in the same ways (gguf_mutations.py); each file that loads is also run for a few tokens. A crash whose stack has a line of
llama-factors.cpp is counted as ours, whatever broke: llama.cpp by itself would not have been there. The dense file tells how
often llama.cpp crashes without any of our tensors. A table of where it crashed, and JSON on the last line; exit code 1 where
a crash is ours.
"""

import argparse
import json
import os
import re
import select
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from gguf_mutations import Anatomy, anatomy, mutations

OURS = "llama-factors."
SANITIZER = "-fsanitize=address -fno-omit-frame-pointer"
CMAKE_ARGS = (
    "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
    *(f"-DCMAKE_{language}_FLAGS_RELWITHDEBINFO=-O1 -g1 -U__AMX_INT8__ {SANITIZER}" for language in ("C", "CXX")),
)
# handle_abort: a failed assertion of ggml's shows its stack too. Leaks of Python are none of ours.
OPTIONS = "detect_leaks=0:handle_abort=1:allocator_may_return_null=1:symbolize=1"
PATIENCE = 120  # seconds for one file
TOKENS = 4


def worker() -> None:
    """Load each file that is named on stdin, run it, free it; a line each on stdout."""
    import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    for line in sys.stdin:
        model = llama_cpp.llama_model_load_from_file(line.strip().encode(), parameters)
        if not model:
            print("refused", flush=True)
            continue
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 32
        settings.n_threads = settings.n_threads_batch = 1
        context = llama_cpp.llama_init_from_model(model, settings)
        ran = False
        if context:
            tokens = (llama_cpp.llama_token * TOKENS)(*range(3, 3 + TOKENS))
            ran = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, TOKENS)) == 0
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
        print("ran" if ran else "loaded", flush=True)


class Loader:
    """A worker that is started anew after each crash."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self._environment, self._log = environment, log
        self._process: subprocess.Popen[str] | None = None

    def outcome(self, path: Path) -> tuple[str, str]:
        """(ran, loaded, refused, crashed or hung; the stack of a crash)."""
        if self._process is None:
            command = [sys.executable, __file__, "--worker"]
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=self._environment
                )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        start = self._log.stat().st_size
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
        answer = process.stdout.readline().strip() if ready else "hung"
        if answer in ("", "hung"):
            self.close()
        with self._log.open("rb") as log:
            log.seek(start)
            told = log.read().decode(errors="replace")
        return answer or "crashed", "\n".join(line for line in told.splitlines() if re.match(r" +#\d+ ", line))

    def close(self) -> None:
        """End the worker."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def blamed(stack: str) -> str:
    """The function of llama.cpp, ggml or ours in which a stack ends."""
    frames = re.findall(r"#\d+ \S+ in (.+?) (\S+)$", stack, re.MULTILINE)
    own = [(name, place) for name, place in frames if re.search(r"/(src|ggml)/", place) and "sanitizer" not in place]
    passed_over = ("ggml_abort", "ggml_print_backtrace")
    name, place = next(((n, p) for n, p in own if not n.startswith(passed_over)), ("unknown", ""))
    return f"{name.split('(')[0]} ({Path(place).name})"


def measured(file: Anatomy, cases: int, loader: Loader, folder: Path) -> tuple[Counter[str], Counter[str]]:
    """How often each outcome, and each place of a crash."""
    outcomes: Counter[str] = Counter()
    places: Counter[str] = Counter()
    for i, (kind, content) in enumerate(mutations(file, cases)):
        path = folder / "damaged.gguf"
        path.unlink(missing_ok=True)  # never written over: a mapping of the last one may be left
        path.write_bytes(content)
        answer, stack = loader.outcome(path)
        if answer == "crashed":
            answer = "crashed by way of ours" if OURS in stack else "crashed"
            places[f"{answer}: {blamed(stack)}"] += 1
            if OURS in stack:
                kept = Path("build") / f"crash-{i}.gguf"
                kept.parent.mkdir(exist_ok=True)
                kept.write_bytes(content)
                print(f"{kind}: {kept}\n{stack}", file=sys.stderr)
        outcomes[answer] += 1
        if (i + 1) % 100 == 0:
            print(f"{i + 1} of {cases}: {dict(outcomes)}", file=sys.stderr)
    return outcomes, places


def _compiler_file(name: str) -> str:
    """Where the compiler has that library."""
    done = subprocess.run(["cc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="damaged copies of each file")
    parser.add_argument("--jobs", type=int, default=None, help="compiler processes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return
    from exporters.gguf import export
    from exporters.llama_cpp import build
    from sola_edge.testing import tiny_checkpoint

    made = build(jobs=arguments.jobs, cmake_args=CMAKE_ARGS, targets=("llama",))
    # the sanitizer looks for the C++ library's throw when it starts, and Python brings none: without it every throw is a crash
    preloaded = ":".join(_compiler_file(name) for name in ("libasan.so", "libstdc++.so.6"))
    environment = made.environment() | {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": OPTIONS}
    environment |= {"GGML_NO_BACKTRACE": "1"}
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(environment, Path(folder) / "worker.log")
        for name in ("dense", "hybrid"):
            source = tiny_checkpoint(
                Path(folder) / name, compressed=name == "hybrid", hidden=32, ffn=64, layers=3, vocab=288
            )
            path = export(source, Path(folder) / f"{name}.gguf", "f16").path
            assert loader.outcome(path)[0] == "ran", "the undamaged file does not run: see the build"
            (Path(folder) / "work").mkdir(exist_ok=True)
            outcomes, places = measured(anatomy(path), arguments.cases, loader, Path(folder) / "work")
            found[name] = dict(outcomes)
            print(f"{name}: {dict(outcomes)}")
            for place, count in places.most_common():
                print(f"  {count:5d} {place}")
        loader.close()
    print(json.dumps({"cases": arguments.cases, **found}))
    sys.exit(any("crashed by way of ours" in outcomes for outcomes in found.values()))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
