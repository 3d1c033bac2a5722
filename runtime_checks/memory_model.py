"""How much memory a runtime should take, from the shapes in the file: what a measured peak is held against.

The parts, in bytes:

runtime      interpreter and library: measured before the model is loaded, not modelled
libraries    what more of the shared libraries was resident at the end: measured where the system tells, for it is the system
             that chooses (of files that were written a moment ago it maps more at once); elsewhere constants, measured on Linux
session      what any model makes the library set up: constants, measured with a model of 0.2 MB
weights      every tensor as it is stored (PyTorch: every parameter in fp32)
copies       ONNX Runtime packs what it multiplies by and lets go of the mapped original, but a tied embedding stays for
             looking up, so it is there twice. So it is with weights in blocks, but for the scales, which stay: packed for
             products of integers there are PACKED times as many more. 8 bits that are multiplied in fp32 are not packed: the
             scales are there twice, and the largest matrix is widened to fp32 for a prompt. llama.cpp repacks some types,
             by the processor, and keeps the mapping: as it tells itself. PyTorch reads a checkpoint of fewer bits through a
             mapping
vocabulary   of llama.cpp's tokenizer: TOKEN bytes a token, for its text, its place in a map and its merge
kv           2 × layers × key/value heads × channels × context × bytes of an element; llama.cpp rounds the context up.
             Twice where past and present are two (ONNX Runtime's own API; PyTorch joins them a layer at a time)
logits       what a prefill gives: of every position in ONNX graphs
activations  of the tokens that run at once (llama.cpp: 512 at most): two vectors of the residual stream, four of the FFN
             (gate, up, the activation, the product), fp32; llama.cpp's attention mask besides. ONNX Runtime's arena keeps
             what it was once: LIVING vectors (measured)

Nothing is expected of fp16 and bf16 graphs, which are for GPUs: on a CPU ONNX Runtime widens what it computes.
"""

from runtime_checks.artefacts import Artefact
from runtime_checks.schema import Memory
from runtime_checks.shapes import F16, F32, Shapes, shapes_of

UNPACKED = 8  # bits, with fp32 products
HALF = ("fp16", "bf16")  # ONNX precisions whose cache is of the graph's own type
LIBRARIES = {"llama.cpp": 2_700_000, "onnxruntime": 11_000_000, "onnxruntime-genai": 21_000_000, "torch": 14_000_000}
SESSION = {"llama.cpp": 2_300_000, "onnxruntime": 2_000_000, "onnxruntime-genai": 9_000_000, "torch": 6_000_000}
TOKEN = 300  # bytes; measured with 49,152 tokens
FAR = 4096  # tokens, from where on memory grows evenly
BATCH, PADDING = 512, 256  # llama.cpp's n_ubatch, and what it rounds a context up to
PACKED = 2.5  # scales, sums of the blocks, and half of one more (measured with 4 and 8 bits)
LIVING = 4, 6  # vectors of the residual stream and of the FFN, for each token
MASK = 4 + 2  # bytes of the attention mask's elements, in fp32 and cast to fp16


def expected_memory(
    runtime: str, artefact: Artefact, shapes: Shapes, context: int, prompt: int, measured: Memory
) -> dict[str, int]:
    """The parts of the peak of a process that was loaded for `context` tokens and given a prompt of so many.

    Of what was measured only what no shape says is used: the baseline, the libraries' pages, and what the runtime tells of its
    own buffers. Empty where nothing is expected.
    """
    if artefact.kind == "onnx" and artefact.precision in HALF:
        return {}
    cache = shapes.kv_values * element_bytes(runtime, artefact.precision)
    modelled = MODELS[runtime](artefact, shapes, context, prompt, cache, measured.parts)
    return {
        "runtime": measured.baseline,
        "libraries": LIBRARIES[runtime] if measured.libraries is None else measured.libraries,
        "session": SESSION[runtime],
        "weights": shapes.weights,
        **{part: round(size) for part, size in modelled.items()},
    }


def element_bytes(runtime: str, precision: str) -> int:
    """Bytes of one value of the cache. llama.cpp's is F16 (F32 for a file of F32), as runtimes/llama_cpp_.py asks for it."""
    if runtime == "llama.cpp":
        return F32 if precision == "f32" else F16
    if runtime == "torch":  # which runs every checkpoint in fp32
        return F32
    return F16 if precision in HALF else F32


def growth(runtime: str, artefact: Artefact) -> int:
    """Bytes that every further token takes where a prompt fills the context. Raises UserError where the file does not say."""
    shapes = shapes_of(artefact)
    cache = shapes.kv_values * element_bytes(runtime, artefact.precision)
    short, long = (sum(MODELS[runtime](artefact, shapes, n, n, cache, {}).values()) for n in (FAR, 2 * FAR))
    return round(long - short) // FAR


def _activations(shapes: Shapes, tokens: int, residual: int = 2, ffn: int = 4) -> int:
    return tokens * (residual * shapes.hidden + ffn * shapes.ffn) * F32


def _llama_cpp(a: Artefact, s: Shapes, context: int, prompt: int, cache: int, told: dict[str, int]) -> dict[str, int]:
    padded, tokens = -(-context // PADDING) * PADDING, min(prompt, BATCH)
    more = told.get("weights", 0) - s.weights
    return {
        "copies": more if more > 0.01 * s.weights else 0,  # it tells sizes to 10 kB
        "vocabulary": s.vocab * TOKEN,
        "kv": cache * padded,
        "logits": s.vocab * F32,
        "activations": _activations(s, tokens) + padded * tokens * MASK,
    }


def _graph(s: Shapes, prompt: int) -> dict[str, int]:
    logits = prompt * s.vocab * F32
    return {"copies": _copies(s), "logits": logits, "activations": _activations(s, prompt, *LIVING)}


def _copies(s: Shapes) -> int:
    if not s.blocks:
        return s.tied
    unpacked = [m for m in s.blocks if m.bits == UNPACKED and not m.integers]
    packed = [m for m in s.blocks if m not in unpacked]
    looked_up = sum(m.values for m in packed if m.looked_up)
    sums = PACKED * sum(m.scales for m in packed if m.integers)
    widened = max((m.elements for m in unpacked), default=0) * F32
    return round(looked_up + sums + sum(m.scales for m in unpacked) + widened)


def _onnxruntime(a: Artefact, s: Shapes, context: int, prompt: int, cache: int, told: dict[str, int]) -> dict[str, int]:
    return {**_graph(s, prompt), "kv": 2 * cache * context}


def _genai(a: Artefact, s: Shapes, context: int, prompt: int, cache: int, told: dict[str, int]) -> dict[str, int]:
    return {**_graph(s, prompt), "kv": cache * context}


def _torch(a: Artefact, s: Shapes, context: int, prompt: int, cache: int, told: dict[str, int]) -> dict[str, int]:
    mapped = 0 if a.precision == "fp32" else s.weights // F32 * 2
    activations = _activations(s, prompt)
    return {"copies": mapped, "kv": cache * context, "logits": s.vocab * F32, "activations": activations}


MODELS = {"llama.cpp": _llama_cpp, "onnxruntime": _onnxruntime, "onnxruntime-genai": _genai, "torch": _torch}
