// Tensors of the paged family to its params structs, for the bindings of every device.
#pragma once

#include <array>

#include "attnforge/paged.h"
#include "attnforge/pieces.h"
#include "bindings/tensors.h"

namespace attnforge::cpu {

inline PageType page_type(const Tensor& pages) {
  switch (pages.scalar_type()) {
    case ScalarType::Float:
      return PageType::kFloat32;
    case ScalarType::Half:
      return PageType::kFloat16;
    case ScalarType::BFloat16:
      return PageType::kBFloat16;
    case ScalarType::Float8_e4m3fn:
      return PageType::kFp8;
    case ScalarType::Char:
      return PageType::kInt8;
    case ScalarType::Byte:
      return PageType::kInt4;
    default:
      STD_TORCH_CHECK(false, "attnforge_native: pages of this dtype are not read");
  }
  return PageType::kFloat32;
}

inline TensorRef page_ref(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4 && (t.stride(3) == 1 || t.size(3) == 1),
                  "attnforge_native: pages must be 4-D with a last stride of 1");
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

inline int64_t channels(const Tensor& pages) {
  return pages.size(3) * (pages.scalar_type() == ScalarType::Byte ? 2 : 1);
}

inline const int32_t* lengths_of(const Tensor& t, int64_t batch, int64_t heads,
                                 int64_t& batch_stride, int64_t& head_stride) {
  const bool per_head = t.dim() == 2;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() &&
                      t.numel() == batch * (per_head ? heads : 1),
                  "attnforge_native: cache_seqlens must be contiguous int32, one per sequence or "
                  "per sequence and head");
  batch_stride = per_head ? heads : 1;
  head_stride = per_head ? 1 : 0;
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// v absent: keys alone. codes: k_scale, v_scale, k_zero, v_zero.
inline PagePool pool_of(const Tensor& k, const OptionalTensor& v, const Tensor& table,
                        const std::array<OptionalTensor, 4>& codes) {
  PagePool pool;
  pool.type = page_type(k);
  pool.k = page_ref(k);
  if (v) {
    STD_TORCH_CHECK(v->scalar_type() == k.scalar_type() && v->size(0) == k.size(0) &&
                        v->size(1) == k.size(1) && v->size(2) == k.size(2),
                    "attnforge_native: k_pages and v_pages do not fit");
    pool.v = page_ref(*v);
  }
  pool.pages = k.size(0), pool.page_size = k.size(1);
  STD_TORCH_CHECK(pool.page_size > 0 && k.size(2) > 0, "attnforge_native: pages must have slots");
  STD_TORCH_CHECK(table.dim() == 2 && table.scalar_type() == ScalarType::Int &&
                      (table.stride(1) == 1 || table.size(1) <= 1),
                  "attnforge_native: block_table must be int32 rows");
  pool.table = static_cast<const int32_t*>(table.const_data_ptr());
  pool.table_stride = table.stride(0);
  pool.max_pages = pool.pages > 0 ? table.size(1) : 0;
  const float** const fields[] = {&pool.k_scale, &pool.v_scale, &pool.k_zero, &pool.v_zero};
  for (size_t i = 0; i < 4; ++i) {
    const OptionalTensor& x = codes[i];
    if (!x) continue;
    const bool pages = x->size(0) != 1, slots = x->size(1) != 1;
    STD_TORCH_CHECK(x->dim() == 3 && x->scalar_type() == ScalarType::Float && x->is_contiguous() &&
                        x->size(2) == k.size(2) && (!pages || x->size(0) == pool.pages) &&
                        (!slots || x->size(1) == pool.page_size),
                    "attnforge_native: scales and zeros must be contiguous fp32 [pages|1, slots|1, "
                    "heads]");
    pool.code_page = pages ? x->size(1) * x->size(2) : 0;
    pool.code_slot = slots ? x->size(2) : 0;
    *fields[i] = static_cast<const float*>(x->const_data_ptr());
  }
  return pool;
}

// pieces [3, n]: sequence, begin and end of each; first [batch + 1 or more].
inline Pieces pieces_of(const OptionalTensor& pieces, const OptionalTensor& first, int64_t batch) {
  if (!pieces) return {};
  STD_TORCH_CHECK(pieces->dim() == 2 && pieces->size(0) == 3 && pieces->is_contiguous() && first &&
                      first->dim() == 1 && first->size(0) > batch && first->is_contiguous(),
                  "attnforge_native: split_pieces must be [3, n], split_first [batch + 1]");
  const int32_t* rows = data<int32_t>(pieces, ScalarType::Int);
  const int64_t n = pieces->size(1);
  return {rows, rows + n, rows + 2 * n, data<int32_t>(first, ScalarType::Int), n};
}

// Everything but q, out and lse, whose sizes are checked. max_seqlen_k bounds the lengths.
inline PagedFwdParams paged_fwd_params(
    const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& table,
    const Tensor& lengths, const std::array<OptionalTensor, 4>& codes,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& mask, const Tensor& out, const Tensor& lse,
    int64_t max_seqlen_q, int64_t max_seqlen_k, const Scores& scores) {
  PagedFwdParams params;
  params.pool = pool_of(k_pages, v_pages, table, codes);
  FlashProblem& p = params.flash.problem;
  const bool packed = cu_seqlens_q.has_value();
  const int64_t h = q.dim() - 2;
  STD_TORCH_CHECK(q.dim() == (packed ? 3 : 4) && out.dim() == q.dim() && out.is_contiguous() &&
                      lse.is_contiguous() && out.size(h) == q.size(h),
                  "attnforge_native: q and out must be 4-D, or 3-D with cu_seqlens_q");
  p.dtype = p.q_dtype = dtype_of(q);
  p.batch = table.size(0);
  p.seqlen_q = packed ? max_seqlen_q : q.size(1);
  p.total_q = packed ? q.size(0) : 0;
  p.seqlen_k = std::clamp<int64_t>(max_seqlen_k, 0, params.pool.max_pages * params.pool.page_size);
  p.heads_q = q.size(h), p.heads_k = k_pages.size(2);
  p.head_dim = q.size(h + 1), p.v_head_dim = channels(v_pages);
  STD_TORCH_CHECK(p.heads_q % p.heads_k == 0 && p.head_dim == channels(k_pages) &&
                      (packed || q.size(0) == p.batch) && out.size(h + 1) == p.v_head_dim,
                  "attnforge_native: q, out and the pages do not fit");
  STD_TORCH_CHECK(
      p.head_dim % 8 == 0 && p.v_head_dim % 8 == 0 && p.head_dim <= 576 && p.v_head_dim <= 1024,
      "attnforge_native: head dims must be multiples of 8, up to 576 and 1024 for v");
  STD_TORCH_CHECK(!packed || cu_seqlens_q->numel() == p.batch + 1,
                  "attnforge_native: cu_seqlens_q must have one more entry than block_table rows");
  p.cu_seqlens_q = data<int32_t>(cu_seqlens_q, ScalarType::Int);
  p.seqused_k = lengths_of(lengths, p.batch, p.heads_k, p.seqused_batch, p.seqused_head);
  p.alibi_slopes = data<float>(alibi_slopes, ScalarType::Float);
  if (alibi_slopes && alibi_slopes->dim() == 2) p.alibi_batch_stride = p.heads_q;
  STD_TORCH_CHECK(
      !alibi_slopes || alibi_slopes->numel() == p.heads_q * (p.alibi_batch_stride ? p.batch : 1),
      "attnforge_native: alibi_slopes must be [heads] or [batch, heads]");
  p.sinks = data<float>(sinks, ScalarType::Float);
  STD_TORCH_CHECK(!sinks || sinks->numel() == p.heads_q,
                  "attnforge_native: sinks must have one entry per query head");
  p.softmax_scale = static_cast<float>(scores.softmax_scale);
  p.softcap = static_cast<float>(scores.softcap);
  p.window_left = window(scores.window_left), p.window_right = window(scores.window_right);
  if (mask) {  // [batch|1, 1, rows, keys]
    STD_TORCH_CHECK(!packed && mask->dim() == 4 && mask->scalar_type() == ScalarType::Bool &&
                        mask->is_contiguous() && mask->size(2) == p.seqlen_q &&
                        (mask->size(0) == 1 || mask->size(0) == p.batch) && mask->size(1) == 1,
                    "attnforge_native: the mask must be contiguous bool [batch|1, 1, rows, keys]");
    FlashMods& m = p.mods;
    m.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    m.mask_keys = mask->size(3);
    m.mask_row = m.mask_keys;
    m.mask_batch = mask->size(0) == 1 ? 0 : mask->size(2) * m.mask_keys;
    m.any = true;
  }
  return params;
}

inline PagedAppendParams paged_append_params(
    const Tensor& k, const OptionalTensor& v, const Tensor& k_pages, const OptionalTensor& v_pages,
    const Tensor& table, const Tensor& lengths, const OptionalTensor& k_scale,
    const OptionalTensor& v_scale, const OptionalTensor& k_zero, const OptionalTensor& v_zero,
    const OptionalTensor& cu_seqlens, const OptionalTensor& rope_cos,
    const OptionalTensor& rope_sin, const OptionalTensor& positions, bool rope_interleaved,
    const OptionalTensor& page_min, const OptionalTensor& page_max) {
  PagedAppendParams p;
  p.pool = pool_of(k_pages, v_pages, table, {k_scale, v_scale, k_zero, v_zero});
  p.dtype = dtype_of(k);
  const bool packed = cu_seqlens.has_value();
  const int64_t h = k.dim() - 2;
  p.batch = table.size(0);
  p.seqlen = packed ? k.size(0) : k.size(1);
  p.total = packed ? k.size(0) : 0;
  p.heads = k.size(h), p.head_dim = k.size(h + 1);
  STD_TORCH_CHECK(k.dim() == (packed ? 3 : 4) && p.heads == k_pages.size(2) &&
                      p.head_dim == channels(k_pages) && (packed || k.size(0) == p.batch) &&
                      p.head_dim <= 1024 && v.has_value() == v_pages.has_value(),
                  "attnforge_native: k and k_pages do not fit");
  p.k = ref(k, p.dtype);
  if (v) {
    p.v = ref(*v, p.dtype);
    p.v_head_dim = v->size(h + 1);
    STD_TORCH_CHECK(v->dim() == k.dim() && v->size(0) == k.size(0) && v->size(h) == p.heads &&
                        v->size(h - 1) == k.size(h - 1) && p.v_head_dim == channels(*v_pages) &&
                        p.v_head_dim <= 1024,
                    "attnforge_native: v and v_pages do not fit");
  }
  p.cu_seqlens = data<int32_t>(cu_seqlens, ScalarType::Int);
  p.lengths = lengths_of(lengths, p.batch, p.heads, p.length_batch, p.length_head);
  p.rope_cos = data<float>(rope_cos, ScalarType::Float);
  p.rope_sin = data<float>(rope_sin, ScalarType::Float);
  if (rope_cos) {
    STD_TORCH_CHECK(rope_sin && rope_cos->dim() == 3 && rope_sin->numel() == rope_cos->numel() &&
                        (rope_cos->size(0) == 1 || rope_cos->size(0) == p.heads) &&
                        2 * rope_cos->size(2) <= p.head_dim,
                    "attnforge_native: rope tables must be [heads|1, positions, half]");
    p.rope_positions = rope_cos->size(1), p.rope_half = rope_cos->size(2);
    p.rope_head = rope_cos->size(0) == 1 ? 0 : p.rope_positions * p.rope_half;
  }
  p.rope_interleaved = rope_interleaved;
  p.positions = data<int32_t>(positions, ScalarType::Int);
  if (page_min) {
    for (const OptionalTensor& x : {page_min, page_max}) {
      STD_TORCH_CHECK(x && x->is_contiguous() && dtype_of(*x) == dtype_of(*page_min) &&
                          x->numel() == p.pool.pages * p.heads * p.head_dim,
                      "attnforge_native: page bounds must be contiguous [pages, heads, head_dim]");
    }
    p.page_min = page_min->mutable_data_ptr(), p.page_max = page_max->mutable_data_ptr();
    p.bounds_dtype = dtype_of(*page_min);
  }
  return p;
}

}  // namespace attnforge::cpu
