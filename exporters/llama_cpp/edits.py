"""Our addition to llama.cpp: whole files of ours and a table of insertions at content anchors.

An insertion is placed beside an anchor, a piece of text that must occur exactly once in its file. All anchors are
checked before anything is written, so a llama.cpp that changed at one of these places is refused, never half-patched.
`docs/llama_cpp.md` explains each insertion.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sola_edge.errors import UserError

CPP = Path(__file__).parent / "cpp"
OUR_FILES = ("llama-factors.h", "llama-factors.cpp")  # into src/


@dataclass(frozen=True)
class Insertion:
    """`text` goes `where` ("before" or "after") the only occurrence of `anchor` in `file` (relative to llama.cpp)."""

    file: str
    anchor: str
    text: str
    where: Literal["before", "after"] = "before"


INSERTIONS = (
    Insertion("src/CMakeLists.txt", "    llama-grammar.cpp\n", "    llama-factors.cpp\n"),
    # the model owns the factors
    Insertion("src/llama-model.h", '#include "llama-graph.h"\n', '#include "llama-factors.h"\n'),
    Insertion(
        "src/llama-model.h",
        "    std::vector<llama_layer> layers;\n",
        "\n    // weights that are stored as low-rank factors\n    llama_factors factors;\n",
        "after",
    ),
    # loading
    Insertion(
        "src/llama-model.cpp",
        "ggml_tensor * llama_model_base::create_tensor(llama_model_loader & ml, const LLM_TN_IMPL & tn, "
        "const std::initializer_list<int64_t> & ne, int flags) {\n",
        "    if (llama_factors::in_file(*this, ml, tn, ne)) {\n"
        "        return factors.create(*this, ml, tn, ne, flags);\n    }\n",
        "after",
    ),
    Insertion("src/llama-model.cpp", "    if (use_mmap_buffer) {\n", "    factors.done_loading();\n\n"),
    # LoRA adapters ask for a weight by its name
    Insertion(
        "src/llama-model.cpp",
        "const ggml_tensor * llama_model::get_tensor(const char * name) const {\n",
        "    if (const ggml_tensor * w = factors.find(name)) {\n        return w;\n    }\n",
        "after",
    ),
    # saving a model
    Insertion(
        "src/llama-model-saver.cpp",
        "void llama_model_saver::add_tensor(const struct ggml_tensor * tensor) {\n",
        "    if (model && model->factors.has(tensor)) {\n"
        "        for (const ggml_tensor * part : model->factors.parts(tensor)) {\n"
        "            add_tensor(part);\n        }\n        return;\n    }\n",
        "after",
    ),
    # the graph reaches the factors through its parameters
    Insertion("src/llama-graph.h", "class llama_kv_cache_context;\n", "class llama_factors;\n"),
    Insertion("src/llama-graph.h", "    llm_graph_cb cb;\n", "    const llama_factors * factors = nullptr;\n\n"),
    Insertion("src/llama-graph.h", "    const llm_graph_cb & cb_func;\n", "    const llama_factors * factors;\n\n"),
    Insertion("src/llama-graph.cpp", '#include "llama-impl.h"\n', '#include "llama-factors.h"\n'),
    Insertion("src/llama-graph.cpp", "    cb_func          (params.cb),\n", "    factors          (params.factors),\n"),
    Insertion(
        "src/llama-context.cpp",
        "        /*.cb          =*/ graph_get_cb(),\n",
        "        /*.factors     =*/ &model.factors,\n",
    ),
    # every projection
    Insertion(
        "src/llama-graph.cpp",
        "ggml_mul_mat(ctx0, w, cur);",
        "factors && factors->has(w) ? factors->mul_mat(ctx0, w, cur) : ",
    ),
    # a feed-forward network whose gate and up the architecture has as one weight and the file has by themselves; then one of
    # which some neurons are kept as they are: two networks, whose sum it is. Adapters add to the product of a whole weight,
    # biases and scales are as long as one: with those the weights are multiplied one by one
    Insertion(
        "src/llama-graph.cpp",
        "    ggml_tensor * tmp = up ? build_lora_mm(up, cur) : cur;\n",
        """\
    llama_factors::ffn halves;
    if (factors && type_op == LLM_FFN_SWIGLU && !gate && loras->empty() && !up_b && !up_s && \
factors->unfuse(up, halves)) {
        return build_ffn(cur, halves.up, nullptr, nullptr, halves.gate, nullptr, nullptr, \
down, down_b, down_s, act_scales, LLM_FFN_SILU, LLM_FFN_PAR, il);
    }
    llama_factors::ffn prime, rest;
    if (factors && type_gate == LLM_FFN_PAR && loras->empty() && !up_b && !up_s && !gate_b && !gate_s && \
!down_s && !act_scales &&
            factors->split({ up, gate, down }, prime, rest)) {
        const auto branch = [&](const llama_factors::ffn & w) {
            return build_ffn(cur, w.up, nullptr, nullptr, w.gate, nullptr, nullptr, \
w.down, nullptr, nullptr, nullptr, type_op, type_gate, il);
        };
        ggml_tensor * kept = branch(prime);
        ggml_tensor * res  = ggml_add(ctx0, kept, branch(rest));
        return down_b ? ggml_add(ctx0, res, down_b) : res;
    }

""",
    ),
)


def fingerprint() -> str:
    """SHA-256 over our files and the table of insertions: changes whenever the addition changes."""
    digest = hashlib.sha256(repr(INSERTIONS).encode())
    for name in OUR_FILES:
        digest.update((CPP / name).read_bytes())
    return digest.hexdigest()


def apply(llama_cpp: Path) -> None:
    """Put the addition into a llama.cpp source folder, in place.

    Raises UserError, leaving the folder as it was, if an anchor's file is missing or an anchor does not occur exactly
    once there (another llama.cpp version, or the addition is already in).
    """
    texts: dict[str, str] = {}
    for insertion in INSERTIONS:
        texts[insertion.file] = _inserted(llama_cpp, insertion, texts.get(insertion.file))
    for name in OUR_FILES:
        if (llama_cpp / "src" / name).exists():
            raise UserError(f"{llama_cpp / 'src' / name} exists already: apply the addition to an unchanged llama.cpp")
    for file, text in texts.items():
        (llama_cpp / file).unlink()  # the file may be a hard link of the unchanged source
        (llama_cpp / file).write_text(text, encoding="utf-8", newline="\n")
    for name in OUR_FILES:
        shutil.copyfile(CPP / name, llama_cpp / "src" / name)


def _inserted(llama_cpp: Path, insertion: Insertion, text: str | None) -> str:
    """The text of the insertion's file (`text` if it was edited before) with the insertion in it."""
    path = llama_cpp / insertion.file
    if text is None:
        if not path.is_file():
            raise UserError(f"{llama_cpp} is no llama.cpp source that the addition fits: {insertion.file} is missing")
        text = path.read_text(encoding="utf-8")
    count = text.count(insertion.anchor)
    if count != 1:
        raise UserError(
            f"{path} is not the llama.cpp that the addition was made for: the line "
            f"{insertion.anchor.strip()!r} occurs {count} times there instead of once; use the pinned version"
        )
    before, after = text.split(insertion.anchor)
    if insertion.where == "before":
        return before + insertion.text + insertion.anchor + after
    return before + insertion.anchor + insertion.text + after
