#pragma once

// Weights that are stored in another form or size
//
// A matrix W of n_out rows and n_in columns may be stored as up to three tensors instead of `<name>.weight`:
//
//   <name>.prime.weight   P   rows (or columns) of W that are kept as they are; may be absent
//   <name>.lr_a.weight    A   [n_in of the rest, rank]
//   <name>.lr_b.weight    B   [rank, n_out of the rest], or less: [rank, n_out of the rest - rank]
//
// The size of A's rows says which side of W is split:
//
//   A->ne[0] == n_in   W x = concat(P x, L x)          P: [n_in, p]
//   A->ne[0] <  n_in   W x = P x[:p] + L x[p:]         P: [p, n_out]
//
// and the number of B's rows whether the first rows of the rest are A's own:
//
//   all of the rest    L x = B (A x)
//   rank fewer         L x = concat(A x, B (A x))
//
// P alone is the whole of W: [n_in, n_out].
//
// The feed-forward network of a layer may have fewer neurons than the metadata says. The tensors of its down projection,
// stored as above, tell how many, and gate, up and their biases must agree.
//
// An architecture that asks for gate and up as one weight of twice as many rows, `ffn_up`, may find each by itself, stored
// as above or as an ordinary weight: W x = concat(gate x, up x).
//
// Where gate, up and down are all split at the same neuron, build_ffn() makes two feed-forward networks of them, the kept
// neurons and the rest, and adds what they give: no concat, and the kept ones keep a backend's fused gate and up.
//
// Loading puts a handle with W's name and shape, but no data, in the place of W; build_lora_mm() multiplies through
// the tensors behind it when it meets a handle. The handles belong to the model and are freed with it. They are written
// while the model is loaded and only read afterwards, so any number of contexts may use them at the same time.

#include "ggml.h"

#include <initializer_list>
#include <memory>
#include <unordered_map>
#include <vector>

struct LLM_TN_IMPL;
struct llama_model_base;
struct llama_model_loader;

class llama_factors {
public:
    // true if the file has parts of this weight and not the weight itself, or has the tensor of a narrower layer
    static bool in_file(const llama_model_base & model, const llama_model_loader & ml, const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne);

    // create the tensor `tn` of shape `ne`, return its handle or itself (nullptr if the flags skip it)
    // throws the loader's own errors: a part is missing, or has a shape that does not fit
    ggml_tensor * create(llama_model_base & model, llama_model_loader & ml, const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne, int flags);

    // to be called when the parts have their buffers: the handles take them over (LoRA adapters look at it)
    void done_loading();

    // the handle of that name, or nullptr
    const ggml_tensor * find(const char * name) const;

    // the tensors behind a handle, empty if `w` is an ordinary tensor
    std::vector<const ggml_tensor *> parts(const ggml_tensor * w) const;

    bool has(const ggml_tensor * w) const;

    // the weights of a feed-forward network
    struct ffn {
        ggml_tensor * up;
        ggml_tensor * gate;
        ggml_tensor * down;
    };

    // up and gate of a weight that is both; false if it is not
    bool unfuse(const ggml_tensor * w, ffn & halves) const;

    // the two networks that `whole` is the sum of, kept neurons first; false if its weights are not split at one neuron
    bool split(const ffn & whole, ffn & prime, ffn & rest) const;

    // W cur for a handle, [n_in, ...] -> [n_out, ...]; ggml_mul_mat for an ordinary tensor
    ggml_tensor * mul_mat(ggml_context * ctx, ggml_tensor * w, ggml_tensor * cur) const;

private:
    struct entry {
        ggml_tensor   handle = {};
        ggml_tensor * prime  = nullptr; // may be absent; alone it is the whole weight
        ggml_tensor * a      = nullptr;
        ggml_tensor * b      = nullptr;
        bool          pivot  = false;   // the first rows of the low-rank part are those of A
        ggml_tensor * rest   = nullptr; // handle of the low-rank part alone, of a weight that is split
        ggml_tensor * gate   = nullptr; // of a weight that is gate and up, handles or ordinary tensors
        ggml_tensor * up     = nullptr;
    };

    ggml_tensor * add(std::unique_ptr<entry> e, int64_t n_in, int64_t n_out, const char * name);

    ggml_tensor * create_fused(llama_model_base & model, llama_model_loader & ml, const LLM_TN_IMPL & tn, int64_t n_in, int64_t n_ff, int flags);

    ggml_tensor * create_handle(llama_model_base & model, llama_model_loader & ml, const LLM_TN_IMPL & tn, int64_t n_in, int64_t n_out, int flags);

    std::unordered_map<const ggml_tensor *, std::unique_ptr<entry>> entries;
};
