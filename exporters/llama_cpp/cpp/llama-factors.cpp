#include "llama-factors.h"

#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include <cinttypes>
#include <cstring>
#include <stdexcept>

static const char * const SUFFIX_PRIME = "prime.weight";
static const char * const SUFFIX_A     = "lr_a.weight";
static const char * const SUFFIX_B     = "lr_b.weight";

static LLM_TN_IMPL factor_tn(const LLM_TN_IMPL & tn, const char * suffix) {
    return LLM_TN_IMPL(tn.arch, tn.tensor, suffix, tn.bid, tn.xid);
}

static const ggml_tensor * factor_meta(const llama_model_loader & ml, const LLM_TN_IMPL & tn, const char * suffix) {
    return ml.get_tensor_meta(factor_tn(tn, suffix).str().c_str());
}

bool llama_factors::in_file(const llama_model_loader & ml, const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne) {
    if (ne.size() != 2 || tn.suffix == nullptr || strcmp(tn.suffix, "weight") != 0) {
        return false;
    }
    if (llm_tensor_info_for(tn.tensor).op != GGML_OP_MUL_MAT || ml.get_tensor_meta(tn.str().c_str()) != nullptr) {
        return false;
    }
    return factor_meta(ml, tn, SUFFIX_A) || factor_meta(ml, tn, SUFFIX_B) || factor_meta(ml, tn, SUFFIX_PRIME);
}

ggml_tensor * llama_factors::create(llama_model_base & model, llama_model_loader & ml, const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne, int flags) {
    const int64_t n_in  = ne.begin()[0];
    const int64_t n_out = ne.begin()[1];

    const auto create_factor = [&](const char * suffix, int64_t ne0, int64_t ne1) {
        const int required = flags & ~(model.TENSOR_NOT_REQUIRED | model.TENSOR_ALLOW_RESHAPE);
        return model.create_tensor(ml, factor_tn(tn, suffix), {ne0, ne1}, required);
    };
    const auto meta = [&](const char * suffix) {
        const ggml_tensor * t = factor_meta(ml, tn, suffix);
        if (t == nullptr) {
            throw std::runtime_error(format("missing tensor '%s'", factor_tn(tn, suffix).str().c_str()));
        }
        return t;
    };

    const ggml_tensor * meta_p = factor_meta(ml, tn, SUFFIX_PRIME);

    const int64_t n_in_a = meta(SUFFIX_A)->ne[0];
    const int64_t rank   = meta(SUFFIX_A)->ne[1];

    const bool    split_in = meta_p != nullptr && n_in_a < n_in;
    const int64_t n_prime  = meta_p == nullptr ? 0 : split_in ? n_in - n_in_a : meta_p->ne[1];
    const int64_t n_out_b  = split_in ? n_out : n_out - n_prime;

    if (meta_p != nullptr && (n_prime < 1 || n_out_b < 1)) {
        throw std::runtime_error(format("tensor '%s' has wrong shape; expected fewer than %" PRId64 " rows, got %" PRId64,
            factor_tn(tn, SUFFIX_PRIME).str().c_str(), n_out, n_prime));
    }
    if (rank < 1 || n_in_a < 1) {
        throw std::runtime_error(format("tensor '%s' has wrong shape; it is empty", factor_tn(tn, SUFFIX_A).str().c_str()));
    }

    auto e = std::make_unique<entry>();
    e->a = create_factor(SUFFIX_A, split_in ? n_in_a : n_in, rank);
    e->b = create_factor(SUFFIX_B, rank, n_out_b);
    if (meta_p != nullptr) {
        e->prime = split_in ? create_factor(SUFFIX_PRIME, n_prime, n_out) : create_factor(SUFFIX_PRIME, n_in, n_prime);
    }
    if (e->a == nullptr || e->b == nullptr || (meta_p != nullptr && e->prime == nullptr)) {
        return nullptr; // skipped
    }

    ggml_tensor & w = e->handle;
    w.type = GGML_TYPE_F32;
    w.ne[0] = n_in;
    w.ne[1] = n_out;
    w.ne[2] = 1;
    w.ne[3] = 1;
    w.nb[0] = ggml_type_size(w.type);
    for (int i = 1; i < GGML_MAX_DIMS; i++) {
        w.nb[i] = w.nb[i - 1] * w.ne[i - 1];
    }
    ggml_set_name(&w, tn.str().c_str());

    return &entries.emplace(&w, std::move(e)).first->second->handle;
}

void llama_factors::done_loading() {
    for (auto & [_, e] : entries) {
        e->handle.buffer = e->b->buffer;
    }
}

const ggml_tensor * llama_factors::find(const char * name) const {
    for (const auto & [w, _] : entries) {
        if (strcmp(w->name, name) == 0) {
            return w;
        }
    }
    return nullptr;
}

std::vector<const ggml_tensor *> llama_factors::parts(const ggml_tensor * w) const {
    const auto it = entries.find(w);
    if (it == entries.end()) {
        return {};
    }
    const entry & e = *it->second;
    if (e.prime == nullptr) {
        return {e.a, e.b};
    }
    return {e.prime, e.a, e.b};
}

bool llama_factors::has(const ggml_tensor * w) const {
    return entries.find(w) != entries.end();
}

ggml_tensor * llama_factors::mul_mat(ggml_context * ctx, ggml_tensor * w, ggml_tensor * cur) const {
    const auto it = entries.find(w);
    if (it == entries.end()) {
        return ggml_mul_mat(ctx, w, cur);
    }
    const entry & e = *it->second;

    const auto low_rank = [&](ggml_tensor * x) {
        return ggml_mul_mat(ctx, e.b, ggml_mul_mat(ctx, e.a, x));
    };
    if (e.prime == nullptr) {
        return low_rank(cur);
    }
    if (e.a->ne[0] == cur->ne[0]) {
        return ggml_concat(ctx, ggml_mul_mat(ctx, e.prime, cur), low_rank(cur), 0);
    }

    // weights in a repacked buffer only multiply contiguous activations, a single row is contiguous as it is
    const auto columns = [&](int64_t n, int64_t first) {
        ggml_tensor * x = ggml_view_4d(ctx, cur, n, cur->ne[1], cur->ne[2], cur->ne[3], cur->nb[1], cur->nb[2], cur->nb[3], first*cur->nb[0]);
        return ggml_is_contiguous(x) ? x : ggml_cont(ctx, x);
    };
    const int64_t n_prime = e.prime->ne[0];
    return ggml_add(ctx, ggml_mul_mat(ctx, e.prime, columns(n_prime, 0)), low_rank(columns(e.a->ne[0], n_prime)));
}
