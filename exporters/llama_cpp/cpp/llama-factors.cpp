#include "llama-factors.h"

#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include <cinttypes>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

static const char * const SUFFIX_PRIME = "prime.weight";
static const char * const SUFFIX_A     = "lr_a.weight";
static const char * const SUFFIX_B     = "lr_b.weight";

static LLM_TN_IMPL with_suffix(const LLM_TN_IMPL & tn, const char * suffix) {
    return LLM_TN_IMPL(tn.arch, tn.tensor, suffix, tn.bid, tn.xid);
}

// what the file has of a weight that it does not have as a whole
struct stored_parts {
    const ggml_tensor * prime = nullptr;
    const ggml_tensor * a     = nullptr;
    const ggml_tensor * b     = nullptr;

    stored_parts(const llama_model_loader & ml, const LLM_TN_IMPL & tn) {
        const auto meta = [&](const char * suffix) {
            return ml.get_tensor_meta(with_suffix(tn, suffix).str().c_str());
        };
        if (meta("weight") != nullptr) {
            return;
        }
        prime = meta(SUFFIX_PRIME);
        a     = meta(SUFFIX_A);
        b     = meta(SUFFIX_B);
        if (!a != !b) {
            throw std::runtime_error(format("missing tensor '%s'", with_suffix(tn, a ? SUFFIX_B : SUFFIX_A).str().c_str()));
        }
    }

    bool any() const {
        return prime || a;
    }
};

static bool has_suffix(const LLM_TN_IMPL & tn, const char * suffix) {
    return tn.suffix != nullptr && strcmp(tn.suffix, suffix) == 0;
}

static bool is_layer(const llama_model_base & model, const LLM_TN_IMPL & tn) {
    return tn.bid >= 0 && (uint32_t) tn.bid < model.hparams.n_layer();
}

static bool is_matrix(const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne) {
    return ne.size() == 2 && has_suffix(tn, "weight") && llm_tensor_info_for(tn.tensor).op == GGML_OP_MUL_MAT;
}

// true if gate and up are asked for as one weight, and the file has each by itself
static bool is_fused(const llama_model_base & model, const llama_model_loader & ml, const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne) {
    if (tn.tensor != LLM_TENSOR_FFN_UP || !is_matrix(tn, ne) || !is_layer(model, tn)) {
        return false;
    }
    const int64_t       n_out = ne.begin()[1];
    const ggml_tensor * whole = ml.get_tensor_meta(tn.str().c_str());
    if (n_out != 2*(int64_t) model.hparams.n_ff(tn.bid) || (whole && whole->ne[1] == n_out)) {
        return false;
    }
    const LLM_TN_IMPL gate(tn.arch, LLM_TENSOR_FFN_GATE, "weight", tn.bid, tn.xid);
    return ml.get_tensor_meta(gate.str().c_str()) || stored_parts(ml, gate).any();
}

// position in a tensor's shape that counts the neurons of a feed-forward network, -1 if none does
static int neuron_dimension(const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne) {
    const bool weight = is_matrix(tn, ne);
    const bool bias   = ne.size() == 1 && has_suffix(tn, "bias");
    switch (tn.tensor) {
        case LLM_TENSOR_FFN_DOWN: return weight ? 0 : -1;
        case LLM_TENSOR_FFN_GATE:
        case LLM_TENSOR_FFN_UP:   return weight ? 1 : bias ? 0 : -1;
        default:                  return -1;
    }
}

// number of neurons of the tensor's layer if the file has fewer than `ne` asks for, else 0
static int64_t fewer_neurons(const llama_model_base & model, const llama_model_loader & ml, const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne) {
    const int dimension = neuron_dimension(tn, ne);
    if (dimension < 0 || !is_layer(model, tn)) {
        return 0;
    }
    const stored_parts down(ml, LLM_TN_IMPL(tn.arch, LLM_TENSOR_FFN_DOWN, "weight", tn.bid, tn.xid));
    if (!down.any()) {
        return 0;
    }
    // as wide as what A and P read together: each its own columns, or both all of them
    int64_t n = down.a ? down.a->ne[0] : down.prime->ne[0];
    if (down.a && down.prime && down.prime->ne[1] == model.hparams.n_embd) {
        n += down.prime->ne[0];
    }
    const int64_t n_ff  = model.hparams.n_ff(tn.bid);
    const int64_t asked = ne.begin()[dimension];
    if (n >= n_ff || n == asked) {
        return 0;
    }
    if (asked != n_ff) {
        throw std::runtime_error(format("tensor '%s' has wrong shape; expected %" PRId64 " neurons, got %" PRId64, tn.str().c_str(), asked, n));
    }
    return n;
}

bool llama_factors::in_file(const llama_model_base & model, const llama_model_loader & ml, const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne) {
    return is_fused(model, ml, tn, ne) || fewer_neurons(model, ml, tn, ne) > 0 || (is_matrix(tn, ne) && stored_parts(ml, tn).any());
}

ggml_tensor * llama_factors::create(llama_model_base & model, llama_model_loader & ml, const LLM_TN_IMPL & tn, const std::initializer_list<int64_t> & ne, int flags) {
    const int64_t * shape = ne.begin();

    if (is_fused(model, ml, tn, ne)) {
        return create_fused(model, ml, tn, shape[0], shape[1]/2, flags);
    }
    const int64_t n = fewer_neurons(model, ml, tn, ne);
    if (n == 0) {
        return create_handle(model, ml, tn, shape[0], shape[1], flags);
    }
    try {
        switch (neuron_dimension(tn, ne)) {
            case 1:  return model.create_tensor(ml, tn, {shape[0], n}, flags);
            default: return ne.size() == 1 ? model.create_tensor(ml, tn, {n}, flags) : model.create_tensor(ml, tn, {n, shape[1]}, flags);
        }
    } catch (const std::runtime_error & e) {
        throw std::runtime_error(format("%s; by blk.%d.ffn_down.weight the layer has %" PRId64 " of %u neurons", e.what(), tn.bid, n, model.hparams.n_ff(tn.bid)));
    }
}

ggml_tensor * llama_factors::create_fused(llama_model_base & model, llama_model_loader & ml, const LLM_TN_IMPL & tn, int64_t n_in, int64_t n_ff, int flags) {
    auto e = std::make_unique<entry>();
    e->gate = model.create_tensor(ml, LLM_TN_IMPL(tn.arch, LLM_TENSOR_FFN_GATE, "weight", tn.bid, tn.xid), {n_in, n_ff}, flags);
    e->up   = model.create_tensor(ml, tn, {n_in, n_ff}, flags);
    if (!e->gate || !e->up) {
        return nullptr; // skipped
    }
    const std::string name = tn.str();
    const auto up = entries.find(e->up);
    if (up != entries.end()) {
        ggml_set_name(&up->second->handle, (name + ".half").c_str()); // the name is that of both
    }
    const int64_t n_out = e->gate->ne[1] + e->up->ne[1];
    return add(std::move(e), n_in, n_out, name.c_str());
}

ggml_tensor * llama_factors::create_handle(llama_model_base & model, llama_model_loader & ml, const LLM_TN_IMPL & tn, int64_t n_in, int64_t n_out, int flags) {
    const auto create_part = [&](const char * suffix, int64_t ne0, int64_t ne1) {
        const int required = flags & (model.TENSOR_DUPLICATED | model.TENSOR_SKIP | model.TENSOR_SKIP_IF_VIRTUAL);
        return model.create_tensor(ml, with_suffix(tn, suffix), {ne0, ne1}, required);
    };
    const stored_parts stored(ml, tn);

    auto e = std::make_unique<entry>();
    if (stored.a == nullptr) {
        e->prime = create_part(SUFFIX_PRIME, n_in, n_out);
    } else {
        const int64_t n_in_a   = stored.a->ne[0];
        const int64_t rank     = stored.a->ne[1];
        const bool    split_in = stored.prime && n_in_a < n_in;
        const int64_t n_prime  = !stored.prime ? 0 : split_in ? n_in - n_in_a : stored.prime->ne[1];
        const int64_t n_rest   = split_in ? n_out : n_out - n_prime; // rows of the low-rank part

        if (stored.prime && (n_prime < 1 || n_rest < 1)) {
            throw std::runtime_error(format("tensor '%s' has wrong shape; expected fewer than %" PRId64 " rows, got %" PRId64,
                with_suffix(tn, SUFFIX_PRIME).str().c_str(), n_out, n_prime));
        }
        if (rank < 1 || n_in_a < 1) {
            throw std::runtime_error(format("tensor '%s' has wrong shape; it is empty", with_suffix(tn, SUFFIX_A).str().c_str()));
        }
        e->pivot = stored.b->ne[1] == n_rest - rank;
        e->a = create_part(SUFFIX_A, split_in ? n_in_a : n_in, rank);
        e->b = create_part(SUFFIX_B, rank, e->pivot ? n_rest - rank : n_rest);
        if (stored.prime) {
            e->prime = split_in ? create_part(SUFFIX_PRIME, n_prime, n_out) : create_part(SUFFIX_PRIME, n_in, n_prime);
        }
    }
    if (!e->prime != !stored.prime || !e->a != !stored.a || !e->b != !stored.b) {
        return nullptr; // skipped
    }

    const std::string name = tn.str();
    if (e->prime && e->a) {
        auto low_rank = std::make_unique<entry>();
        low_rank->a     = e->a;
        low_rank->b     = e->b;
        low_rank->pivot = e->pivot;
        e->rest = add(std::move(low_rank), e->a->ne[0], e->b->ne[1] + (e->pivot ? e->a->ne[1] : 0), (name + ".rest").c_str());
    }
    return add(std::move(e), n_in, n_out, name.c_str());
}

ggml_tensor * llama_factors::add(std::unique_ptr<entry> e, int64_t n_in, int64_t n_out, const char * name) {
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
    ggml_set_name(&w, name);

    return &entries.emplace(&w, std::move(e)).first->second->handle;
}

void llama_factors::done_loading() {
    for (auto & [w, e] : entries) {
        e->handle.buffer = parts(w).front()->buffer;
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
    std::vector<const ggml_tensor *> found;
    const auto it = entries.find(w);
    if (it == entries.end()) {
        return found;
    }
    const entry & e = *it->second;
    for (const ggml_tensor * part : {e.prime, e.a, e.b}) {
        if (part != nullptr) {
            found.push_back(part);
        }
    }
    for (const ggml_tensor * half : {e.gate, e.up}) {
        if (has(half)) {
            const auto behind = parts(half);
            found.insert(found.end(), behind.begin(), behind.end());
        } else if (half != nullptr) {
            found.push_back(half);
        }
    }
    return found;
}

bool llama_factors::has(const ggml_tensor * w) const {
    return entries.find(w) != entries.end();
}

bool llama_factors::unfuse(const ggml_tensor * w, ffn & halves) const {
    const auto it = entries.find(w);
    if (it == entries.end() || !it->second->gate) {
        return false;
    }
    halves = { it->second->up, it->second->gate, nullptr };
    return true;
}

bool llama_factors::split(const ffn & whole, ffn & prime, ffn & rest) const {
    const auto entry_of = [&](const ggml_tensor * w) -> const entry * {
        const auto it = entries.find(w);
        return it == entries.end() || !it->second->rest ? nullptr : it->second.get();
    };
    const entry * up   = entry_of(whole.up);
    const entry * gate = entry_of(whole.gate);
    const entry * down = entry_of(whole.down);
    if (!up || !gate || !down) {
        return false;
    }
    const int64_t n = down->prime->ne[0];
    // up and gate by their rows, down by its columns
    if (down->a->ne[0] == whole.down->ne[0] || up->prime->ne[1] != n || gate->prime->ne[1] != n || up->a->ne[0] != whole.up->ne[0] || gate->a->ne[0] != whole.gate->ne[0]) {
        return false;
    }
    prime = { up->prime, gate->prime, down->prime };
    rest  = { up->rest,  gate->rest,  down->rest  };
    return true;
}

ggml_tensor * llama_factors::mul_mat(ggml_context * ctx, ggml_tensor * w, ggml_tensor * cur) const {
    const auto it = entries.find(w);
    if (it == entries.end()) {
        return ggml_mul_mat(ctx, w, cur);
    }
    const entry & e = *it->second;
    if (e.gate != nullptr) {
        return ggml_concat(ctx, mul_mat(ctx, e.gate, cur), mul_mat(ctx, e.up, cur), 0);
    }
    if (e.a == nullptr) {
        return ggml_mul_mat(ctx, e.prime, cur);
    }

    const auto low_rank = [&](ggml_tensor * x) {
        ggml_tensor * inner = ggml_mul_mat(ctx, e.a, x);
        ggml_tensor * outer = ggml_mul_mat(ctx, e.b, inner);
        return e.pivot ? ggml_concat(ctx, inner, outer, 0) : outer;
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
