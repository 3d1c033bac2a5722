#pragma once

// Low-rank factored weights
//
// A matrix W of n_out rows and n_in columns may be stored as up to three tensors instead of `<name>.weight`:
//
//   <name>.prime.weight   P   rows (or columns) of W that are kept as they are; may be absent
//   <name>.lr_a.weight    A   [n_in of the rest, rank]
//   <name>.lr_b.weight    B   [rank, n_out of the rest]
//
// The size of A's rows says which side of W is split:
//
//   A->ne[0] == n_in   W x = concat(P x, B (A x))         P: [n_in, p]    B: [rank, n_out - p]
//   A->ne[0] <  n_in   W x = P x[:p] + B (A x[p:])        P: [p, n_out]   B: [rank, n_out]
//
// Loading puts a handle with W's name and shape, but no data, in the place of W; build_lora_mm() multiplies through
// the factors when it meets a handle. The handles belong to the model and are freed with it. They are written while
// the model is loaded and only read afterwards, so any number of contexts may use them at the same time.

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
    // true if the file has factors of this weight and not the weight itself
    static bool in_file(const llama_model_loader & ml, const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne);

    // create the factors of the weight `tn` of shape `ne`, return the handle (nullptr if the flags skip the tensor)
    // throws the loader's own errors: a factor is missing, or has a shape that does not fit
    ggml_tensor * create(llama_model_base & model, llama_model_loader & ml, const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne, int flags);

    // to be called when the factors have their buffers: the handles take them over (LoRA adapters look at it)
    void done_loading();

    // the handle of that name, or nullptr
    const ggml_tensor * find(const char * name) const;

    // the tensors behind a handle, empty if `w` is an ordinary tensor
    std::vector<const ggml_tensor *> parts(const ggml_tensor * w) const;

    bool has(const ggml_tensor * w) const;

    // W cur for a handle, [n_in, ...] -> [n_out, ...]; ggml_mul_mat for an ordinary tensor
    ggml_tensor * mul_mat(ggml_context * ctx, ggml_tensor * w, ggml_tensor * cur) const;

private:
    struct entry {
        ggml_tensor   handle = {};
        ggml_tensor * prime  = nullptr; // may be absent
        ggml_tensor * a      = nullptr;
        ggml_tensor * b      = nullptr;
    };

    std::unordered_map<const ggml_tensor *, std::unique_ptr<entry>> entries;
};
