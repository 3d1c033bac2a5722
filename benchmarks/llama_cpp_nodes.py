"""What llama.cpp computes for some tokens: the operations of its graph that do work, counted by kind.

    python benchmarks/llama_cpp_nodes.py MODEL.gguf TOKENS      needs PYTHONPATH and LLAMA_CPP_LIB_PATH of a build

On a GPU each is a kernel launch at the least, or part of one where the back end fuses neighbours (ggml-cuda: a matmul for gate,
one for up, and the GLU between them). Views, reshapes and the like are not counted: they compute nothing.
"""

import ctypes
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from exporters.llama_cpp import Build

NO_WORK = ("NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE")


def nodes(build: Build, model: Path, tokens: int) -> Counter[str]:
    """{operation: how many}, in a process of its own. Raises CalledProcessError where the model does not run."""
    command = [sys.executable, str(Path(__file__)), str(model), str(tokens)]
    done = subprocess.run(command, env=build.environment(), capture_output=True, text=True, check=True)
    return Counter(json.loads(done.stdout.splitlines()[-1]))


def _counted(path: str, tokens: int) -> Counter[str]:
    import llama_cpp

    library = ctypes.CDLL(str(Path(llama_cpp.llama_cpp._lib._name).with_name("libggml-base.so")))
    library.ggml_op_desc.restype, library.ggml_op_desc.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    found: Counter[str] = Counter()

    def seen(tensor: int, ask: bool, _: object) -> bool:
        if ask:
            found[library.ggml_op_desc(tensor).decode()] += 1
        return not ask  # False to "shall it be shown when it is done?", True to "go on"

    # the bindings declare a callback without arguments; this one is llama.cpp's own
    callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(seen)
    model_options = llama_cpp.llama_model_default_params()
    model_options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_options)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = max(tokens, 32)
    options.cb_eval = ctypes.cast(callback, type(options.cb_eval))
    context = llama_cpp.llama_init_from_model(model, options)
    batch = llama_cpp.llama_batch_init(tokens, 0, 1)
    batch.n_tokens = tokens
    for i in range(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = i + 3, i, 1, i == tokens - 1
        batch.seq_id[i][0] = 0
    if llama_cpp.llama_decode(context, batch) != 0:
        raise SystemExit("llama_decode failed")
    return Counter({name: count for name, count in found.items() if name not in NO_WORK})


if __name__ == "__main__":
    print(json.dumps(_counted(sys.argv[1], int(sys.argv[2]))))
