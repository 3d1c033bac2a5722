"""Run token ids through llama.cpp by way of its own ctypes package, in a process of its own (a crash stays there).

    python llama_cpp_probe.py '{"model": "x.gguf", "ids": [1, 2], "out": "logits.npy"}'

Writes the logits of every position, (tokens, vocabulary) float32, and prints a JSON line. Exit code 3: the model does
not load. Options: `mmap` (default true), `lora` (an adapter file), `save` (write the loaded model as a file), `loads`
(load and free the model so many times before; the line then has the growth of the process in bytes over the last nine
tenths), `text` (the line has its `tokens`).
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np
import psutil


def load(request: dict) -> int:
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    if not request.get("mmap", True):
        parameters.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    model = llama_cpp.llama_model_load_from_file(request["model"].encode(), parameters)
    if not model:
        sys.exit(3)
    return model


def context_of(model: int, length: int) -> int:
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = length
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return llama_cpp.llama_init_from_model(model, parameters)


def adapt(model: int, context: int, path: str) -> None:
    adapter = llama_cpp.llama_adapter_lora_init(model, path.encode())
    assert adapter, "the adapter does not load"
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(ctypes.cast(adapter, llama_cpp.llama_adapter_lora_p_ctypes))
    assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0


def logits(model: int, request: dict) -> np.ndarray:
    ids = request["ids"]
    context = context_of(model, len(ids))
    if "lora" in request:
        adapt(model, context, request["lora"])
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    values = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(ids), vocabulary)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return values


def tokens(model: int, text: bytes) -> list[int]:
    """With the special tokens that the model's metadata asks for."""
    room = (llama_cpp.llama_token * (len(text) + 8))()
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    count = llama_cpp.llama_tokenize(vocabulary, text, len(text), room, len(room), True, True)
    return list(room[:count])


def growth(request: dict) -> int:
    """Bytes that the process grew by while the model was loaded and freed."""
    process, before = psutil.Process(), 0
    for i in range(request["loads"]):
        if i == request["loads"] // 10:
            before = process.memory_info().rss
        llama_cpp.llama_model_free(load(request))
    return process.memory_info().rss - before


def main() -> None:
    request = json.loads(sys.argv[1])
    llama_cpp.llama_backend_init()
    answer: dict = {}
    if "loads" in request:
        answer["growth"] = growth(request)
    model = load(request)
    if "text" in request:
        answer["tokens"] = tokens(model, request["text"].encode())
    if "ids" in request:
        np.save(request["out"], logits(model, request))
    if "save" in request:
        llama_cpp.llama_model_save_to_file(model, request["save"].encode())
    llama_cpp.llama_model_free(model)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
