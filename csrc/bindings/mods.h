// The mods of a flash call, from the operator's list to FlashMods: every shape is checked here, so
// that no value of a tensor can make a kernel read outside of one.
#pragma once

#include <array>
#include <cmath>
#include <initializer_list>
#include <string>
#include <vector>

#include "bindings/tensors.h"

namespace attnforge::cpu {

// The last arguments of the flash operators.
struct ModArgs {
  const std::vector<OptionalTensor>& tensors;  // of the Python FlashMods, in its order, or empty
  const std::string& score_fn;
  double dropout_p;
  bool rope_interleaved;
};

// The size of a dimension; one that may broadcast can be 1 instead.
struct ModDim {
  int64_t size;
  bool broadcasts = false;
};

// Strides of a tensor [batch, ...] whose dimensions are those asked for; 0 where it broadcasts, and
// for the batch of packed tensors, which lack that dimension.
class ModLayout {
 public:
  explicit ModLayout(const FlashProblem& p)
      : packed_(p.cu_seqlens_q != nullptr),
        batch_(p.batch),
        heads_(p.heads_q),
        rows_(packed_ ? p.total_q : p.seqlen_q),
        keys_(packed_ ? p.total_k : p.seqlen_k) {}

  bool packed() const { return packed_; }
  ModDim batch(bool broadcasts = true) const { return {batch_, broadcasts}; }
  ModDim heads() const { return {heads_, true}; }
  ModDim rows() const { return {rows_}; }
  ModDim keys() const { return {keys_}; }

  // `dims` starts with the batch.
  std::array<int64_t, 4> strides(const char* name, const Tensor& t, ScalarType type,
                                 std::initializer_list<ModDim> dims) const {
    STD_TORCH_CHECK(t.scalar_type() == type, "attnforge_native: ", name, " has a wrong dtype");
    std::array<int64_t, 4> out{};
    const int64_t skipped = packed_ ? 1 : 0;
    bool fits = t.dim() == static_cast<int64_t>(dims.size()) - skipped;
    int64_t n = 0;
    for (const ModDim& dim : dims) {
      const int64_t d = n - skipped;
      if (fits && d >= 0) {
        const bool one = dim.broadcasts && t.size(d) == 1;
        fits = one || t.size(d) == dim.size;
        out[n] = one ? 0 : t.stride(d);
      }
      ++n;
    }
    STD_TORCH_CHECK(fits, "attnforge_native: ", name, " has a shape that does not fit");
    STD_TORCH_CHECK(
        t.dim() == 0 || t.numel() == 0 || t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1,
        "attnforge_native: the last dimension of ", name, " must have stride 1");
    return out;
  }

 private:
  bool packed_;
  int64_t batch_, heads_, rows_, keys_;
};

inline ScoreFn score_fn_of(const std::string& name) {
  constexpr const char* kNames[] = {"softmax", "sigmoid", "relu", "softplus", "signed_softmax"};
  for (int32_t n = 0; n < 5; ++n) {
    if (name == kNames[n]) return static_cast<ScoreFn>(n);
  }
  STD_TORCH_CHECK(false, "attnforge_native: unknown score_fn ", name);
  return ScoreFn::kSoftmax;
}

// A weight is kept where its 32-bit word is at least round(p 2^32).
inline void set_dropout(FlashMods& m, const Tensor& rng, double p) {
  STD_TORCH_CHECK(rng.scalar_type() == ScalarType::Long && rng.numel() == 2 &&
                      rng.is_contiguous() && p >= 0.0 && p < 1.0,
                  "attnforge_native: dropout wants rng [2] int64 and 0 <= dropout_p < 1");
  const double threshold = std::nearbyint(p * 4294967296.0);
  if (threshold < 1.0) return;
  const auto* state = static_cast<const int64_t*>(rng.const_data_ptr());
  m.dropout = true;
  m.dropped_to = static_cast<uint32_t>(threshold - 1.0);
  m.kept_scale = static_cast<float>(1.0 / (1.0 - p));
  m.dropout_seed = static_cast<uint64_t>(state[0]);
  m.dropout_offset = static_cast<uint64_t>(state[1]);
}

inline void set_rope(FlashMods& m, const FlashProblem& p, const ModLayout& layout,
                     const ModArgs& args) {
  const OptionalTensor &cos = args.tensors[9], &sin = args.tensors[10];
  const OptionalTensor &at_q = args.tensors[11], &at_k = args.tensors[12];
  if (!cos) return;
  STD_TORCH_CHECK(sin && at_q && at_k, "attnforge_native: rope wants cos, sin and both positions");
  for (const Tensor& t : {*cos, *sin}) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.dim() == 3 &&
                        (t.size(0) == 1 || t.size(0) == p.heads_k) && t.size(1) >= 1 &&
                        t.size(1) == cos->size(1) && t.size(2) == cos->size(2) &&
                        t.size(0) == cos->size(0) && 2 * t.size(2) <= p.head_dim,
                    "attnforge_native: rope tables must be contiguous float32 [heads_k|1, "
                    "positions, rotary_dim / 2]");
  }
  m.rope_cos = static_cast<const float*>(cos->const_data_ptr());
  m.rope_sin = static_cast<const float*>(sin->const_data_ptr());
  m.rope_positions = cos->size(1);
  m.rope_half = cos->size(2);
  m.rope_head = cos->size(0) == 1 ? 0 : m.rope_positions * m.rope_half;
  m.rope_interleaved = args.rope_interleaved;
  const auto q =
      layout.strides("positions_q", *at_q, ScalarType::Int, {layout.batch(), layout.rows()});
  const auto k =
      layout.strides("positions_k", *at_k, ScalarType::Int, {layout.batch(), layout.keys()});
  m.positions_q = static_cast<const int32_t*>(at_q->const_data_ptr());
  m.positions_k = static_cast<const int32_t*>(at_k->const_data_ptr());
  m.positions_q_batch = q[0], m.positions_k_batch = k[0];
}

inline void set_masks(FlashMods& m, const ModLayout& layout, const ModArgs& args) {
  if (const OptionalTensor& t = args.tensors[0]) {
    const auto s = layout.strides("row_bounds", *t, ScalarType::Int,
                                  {layout.batch(), layout.heads(), layout.rows(), {2}});
    STD_TORCH_CHECK(t->is_contiguous(), "attnforge_native: row_bounds must be contiguous");
    m.row_bounds = static_cast<const int32_t*>(t->const_data_ptr());
    m.row_bounds_batch = s[0] / 2, m.row_bounds_head = s[1] / 2;
  }
  if (const OptionalTensor& t = args.tensors[1]) {
    STD_TORCH_CHECK(!layout.packed() && t->dim() == 4 && t->size(3) <= layout.keys().size,
                    "attnforge_native: mask must be 4-D and cover at most all keys");
    const auto s = layout.strides("mask", *t, ScalarType::Bool,
                                  {layout.batch(), layout.heads(), layout.rows(), {t->size(3)}});
    m.mask_keys = t->size(3);
    if (m.mask_keys > 0) m.mask = static_cast<const uint8_t*>(t->const_data_ptr());
    m.mask_batch = s[0], m.mask_head = s[1], m.mask_row = s[2];
  }
  const OptionalTensor &ids_q = args.tensors[2], &ids_k = args.tensors[3];
  if (ids_q) {
    STD_TORCH_CHECK(ids_k.has_value(), "attnforge_native: segments_q comes without segments_k");
    const auto q =
        layout.strides("segments_q", *ids_q, ScalarType::Int, {layout.batch(false), layout.rows()});
    const auto k =
        layout.strides("segments_k", *ids_k, ScalarType::Int, {layout.batch(false), layout.keys()});
    m.segments_q = static_cast<const int32_t*>(ids_q->const_data_ptr());
    m.segments_k = static_cast<const int32_t*>(ids_k->const_data_ptr());
    m.segments_q_batch = q[0], m.segments_k_batch = k[0];
  }
}

inline void set_biases(FlashMods& m, const FlashProblem& p, const ModLayout& layout,
                       const ModArgs& args) {
  if (const OptionalTensor& t = args.tensors[4]) {
    const auto s = layout.strides("key_bias", *t, ScalarType::Float,
                                  {layout.batch(), layout.heads(), layout.keys()});
    m.key_bias = static_cast<const float*>(t->const_data_ptr());
    m.key_bias_batch = s[0], m.key_bias_head = s[1];
  }
  if (const OptionalTensor& t = args.tensors[5]) {
    m.bias_dtype = dtype_of(*t);
    STD_TORCH_CHECK(!layout.packed(), "attnforge_native: bias wants batched tensors");
    STD_TORCH_CHECK(m.bias_dtype == DType::kFloat32 || m.bias_dtype == p.q_dtype,
                    "attnforge_native: bias must be float32 or of q's dtype");
    const auto s = layout.strides("bias", *t, t->scalar_type(),
                                  {layout.batch(), layout.heads(), layout.rows(), layout.keys()});
    m.bias = t->const_data_ptr();
    m.bias_batch = s[0], m.bias_head = s[1], m.bias_row = s[2];
  }
  if (const OptionalTensor& t = args.tensors[6]) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->dim() == 2 &&
                        (t->size(0) == 1 || t->size(0) == p.heads_q) && t->size(1) % 2 == 1,
                    "attnforge_native: rel_bias must be contiguous float32 [heads_q|1, 2 R + 1]");
    m.rel_bias = static_cast<const float*>(t->const_data_ptr());
    m.rel_bias_head = t->size(0) == 1 ? 0 : t->size(1);
    m.rel_radius = t->size(1) / 2;
  }
  if (const OptionalTensor& t = args.tensors[7]) {
    const auto s = layout.strides("decay", *t, ScalarType::Double,
                                  {layout.batch(), layout.heads(), layout.keys()});
    m.decay = static_cast<const double*>(t->const_data_ptr());
    m.decay_batch = s[0], m.decay_head = s[1];
  }
  if (const OptionalTensor& t = args.tensors[8]) {
    const auto s = layout.strides("row_scale", *t, ScalarType::Float,
                                  {layout.batch(), layout.heads(), layout.rows()});
    m.row_scale = static_cast<const float*>(t->const_data_ptr());
    m.row_scale_batch = s[0], m.row_scale_head = s[1];
  }
}

// [batch, heads_k], packed calls too.
inline const float* descale(const OptionalTensor& t, const FlashProblem& p) {
  STD_TORCH_CHECK(!t || (t->dim() == 2 && t->size(0) == p.batch && t->size(1) == p.heads_k),
                  "attnforge_native: descales must be [batch, heads_k]");
  return data<float>(t, ScalarType::Float);
}

// p: complete but for its mods.
inline FlashMods flash_mods(const FlashProblem& p, const ModArgs& args) {
  FlashMods m;
  if (args.score_fn != "softmax") m.score_fn = score_fn_of(args.score_fn);
  if (!args.tensors.empty()) {
    STD_TORCH_CHECK(args.tensors.size() == 16, "attnforge_native: mods must be 16 or none");
    const ModLayout layout(p);
    set_masks(m, layout, args);
    set_biases(m, p, layout, args);
    set_rope(m, p, layout, args);
    if (args.tensors[13]) set_dropout(m, *args.tensors[13], args.dropout_p);
    m.qk_descale = descale(args.tensors[14], p);
    m.v_descale = descale(args.tensors[15], p);
  }
  m.any = m.mask || m.segments_q || m.key_bias || m.bias || m.rel_bias || m.decay || m.dropout ||
          m.score_fn != ScoreFn::kSoftmax;
  return m;
}

// What a backward may be asked for beside dq, dk, dv; see FlashBwdParams.
struct ModGradArgs {
  const OptionalTensor &dcolumns, &drows, &dbias, &drel_bias, &drow_scale;
};

// An output of these sizes; `packed` ones lack the first, the batch.
inline float* grad_data(const char* name, const OptionalTensor& t, bool packed,
                        std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous(),
                  "attnforge_native: ", name, " must be contiguous float32");
  const int64_t skipped = packed ? 1 : 0;
  bool fits = t->dim() == static_cast<int64_t>(sizes.size()) - skipped;
  int64_t n = 0;
  for (int64_t size : sizes) {
    if (fits && n >= skipped) fits = t->size(n - skipped) == size;
    ++n;
  }
  STD_TORCH_CHECK(fits, "attnforge_native: ", name, " has a shape that does not fit");
  return static_cast<float*>(t->mutable_data_ptr());
}

// params: complete but for these.
inline void set_mod_grads(FlashBwdParams& params, const ModGradArgs& args) {
  const FlashProblem& p = params.problem;
  const ModLayout layout(p);
  const int64_t rows = layout.rows().size, keys = layout.keys().size;
  const bool packed = layout.packed();
  for (const OptionalTensor* t : {&args.drows, &args.drel_bias}) {
    if (!*t) continue;
    STD_TORCH_CHECK((*t)->dim() >= 3 && (*t)->size((*t)->dim() - 2) > 0,
                    "attnforge_native: partial sums are [.., chunks, n]");
    params.max_chunks = (*t)->size((*t)->dim() - 2);
  }
  const int64_t chunks = params.max_chunks;
  if (const OptionalTensor& t = args.dcolumns) {
    params.dcolumns = grad_data("dcolumns", t, packed, {p.batch, p.heads_q, keys});
    params.dcolumns_head = keys;
    params.dcolumns_batch = packed ? 0 : p.heads_q * keys;
  }
  if (const OptionalTensor& t = args.drows) {
    params.drows = grad_data("drows", t, packed, {p.batch, p.heads_q, chunks, rows});
    params.drows_chunk = rows;
    params.drows_head = chunks * rows;
    params.drows_batch = packed ? 0 : p.heads_q * chunks * rows;
  }
  if (const OptionalTensor& t = args.dbias) {
    STD_TORCH_CHECK(!packed && t->is_contiguous(),
                    "attnforge_native: dbias must be contiguous, of batched tensors");
    const auto s = layout.strides("dbias", *t, ScalarType::Float,
                                  {layout.batch(), layout.heads(), layout.rows(), layout.keys()});
    params.dbias = static_cast<float*>(t->mutable_data_ptr());
    params.dbias_batch = s[0], params.dbias_head = s[1], params.dbias_row = s[2];
  }
  if (const OptionalTensor& t = args.drel_bias) {
    params.drel_bias =
        grad_data("drel_bias", t, false, {p.batch, p.heads_q, chunks, 2 * p.mods.rel_radius + 1});
  }
  if (const OptionalTensor& t = args.drow_scale) {
    params.drow_scale.data = grad_data("drow_scale", t, packed, {p.batch, p.heads_q, rows});
    params.drow_scale.head_stride = rows;
    params.drow_scale.batch_stride = packed ? 0 : p.heads_q * rows;
  }
}

}  // namespace attnforge::cpu
