"""How large a KV cache should be, from the model's shapes: 2 × layers × key/value heads × channels × bytes of an element."""

from typing import Any

from sola_edge.architecture import head_dim, kv_heads

F16, F32 = 2, 4
HALF = ("fp16", "bf16")  # ONNX precisions whose cache is of the graph's own type


def element_bytes(runtime: str, precision: str) -> int:
    """Bytes of one value of the cache. llama.cpp's is F16 (F32 for a file of F32), as runtimes/llama_cpp_.py asks for it."""
    if runtime == "llama.cpp":
        return F32 if precision == "f32" else F16
    return F16 if precision in HALF else F32


def kv_bytes_per_token(config: Any, runtime: str, precision: str) -> int:
    """Bytes that every token of context takes in all layers. config: of transformers."""
    values = 2 * int(config.num_hidden_layers) * kv_heads(config) * head_dim(config)
    return values * element_bytes(runtime, precision)
