// Tensors of scores and selections to params structs, for the bindings of every device.
#pragma once

#include "bindings/retrieval.h"

namespace attnforge::cpu {

// The memory of a contiguous tensor of so many elements.
template <class T>
T* output(const Tensor& t, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == numel,
                  "attnforge_native: a tensor has the wrong dtype, layout or size");
  return static_cast<T*>(t.mutable_data_ptr());
}

inline PagePool key_pool(const FlashProblem& p, const Tensor& k, const Tensor& table) {
  STD_TORCH_CHECK(table.dim() == 2 && table.scalar_type() == ScalarType::Int &&
                      table.size(0) == p.batch && table.is_contiguous(),
                  "attnforge_native: block_table must be contiguous int32 rows");
  PagePool pool;
  pool.k = pool.v = ref(k, p.dtype);
  pool.pages = k.size(0), pool.page_size = k.size(1);
  pool.table = static_cast<const int32_t*>(table.const_data_ptr());
  pool.table_stride = table.size(1);
  return pool;
}

inline KeyScoresParams key_scores_params(const Tensor& q, const Tensor& k,
                                         const OptionalTensor& table, const OptionalTensor& used,
                                         const OptionalTensor& counts, double softmax_scale,
                                         const Tensor& out) {
  KeyScoresParams params;
  FlashProblem& p = params.problem;
  p = list_problem(q, k, k, table, used, softmax_scale);
  params.columns = out.size(3);
  STD_TORCH_CHECK(params.columns <= p.seqlen_k, "attnforge_native: more columns than keys");
  params.out =
      output<float>(out, ScalarType::Float, p.batch * p.heads_q * p.seqlen_q * params.columns);
  STD_TORCH_CHECK(!counts || counts->numel() == p.batch * p.heads_k * params.columns,
                  "attnforge_native: counts must be [batch, heads, keys]");
  params.counts = data<int32_t>(counts, ScalarType::Int);
  params.q = ref(q, p.dtype);
  if (table) {
    params.pool = key_pool(p, k, *table);
  } else {
    params.k = ref(k, p.dtype);
  }
  return params;
}

// low and high: [pages, heads, dim] beside a table, else [batch, pages, heads, dim]; scale: of
// int8.
inline PageScoresParams page_scores_params(const Tensor& q, const Tensor& low, const Tensor& high,
                                           const OptionalTensor& scale, const OptionalTensor& table,
                                           const OptionalTensor& used, double softmax_scale,
                                           bool grouped, const Tensor& out) {
  PageScoresParams params;
  FlashProblem& p = params.problem;
  STD_TORCH_CHECK(q.dim() == 4 && low.dim() == (table ? 3 : 4) && high.dim() == low.dim() &&
                      low.numel() == high.numel() && low.scalar_type() == high.scalar_type() &&
                      low.stride(low.dim() - 1) == 1 && high.stride(low.dim() - 1) == 1,
                  "attnforge_native: q, low and high do not fit");
  const int64_t h = low.dim() - 2;
  p.q_dtype = dtype_of(q);
  p.batch = q.size(0), p.seqlen_q = q.size(1), p.heads_q = q.size(2), p.head_dim = q.size(3);
  p.heads_k = low.size(h);
  STD_TORCH_CHECK(p.heads_k > 0 && p.heads_q % p.heads_k == 0 && low.size(h + 1) == p.head_dim &&
                      p.head_dim <= 576 && (table || low.size(0) == p.batch),
                  "attnforge_native: shapes of q, low and high do not fit");
  p.softmax_scale = static_cast<float>(softmax_scale);
  if (scale) {
    STD_TORCH_CHECK(low.scalar_type() == ScalarType::Char && scale->dim() == h + 1 &&
                        scale->numel() * p.head_dim == low.numel() &&
                        scale->scalar_type() == ScalarType::Float,
                    "attnforge_native: scale does not fit int8 bounds");
    params.scale = {const_cast<void*>(scale->const_data_ptr()), scale->stride(0),
                    table ? 0 : scale->stride(1), scale->stride(h)};
  } else {
    params.bounds_dtype = dtype_of(low);
  }
  params.q = ref(q, p.q_dtype);
  auto bounds = [&](const Tensor& t) {
    const int64_t page = table ? 0 : t.stride(1);
    return TensorRef{const_cast<void*>(t.const_data_ptr()), t.stride(0), page, t.stride(h)};
  };
  params.low = bounds(low), params.high = bounds(high);
  params.pages = low.size(0);
  params.columns = out.size(3);
  if (table) {
    STD_TORCH_CHECK(table->is_contiguous() && table->size(0) == p.batch &&
                        table->size(1) >= params.columns && params.pages > 0,
                    "attnforge_native: block_table does not fit");
    params.table = data<int32_t>(table, ScalarType::Int);
    params.table_stride = table->size(1);
  } else {
    STD_TORCH_CHECK(params.columns <= low.size(1), "attnforge_native: more columns than pages");
  }
  params.used = data<int32_t>(used, ScalarType::Int);
  params.grouped = grouped;
  const int64_t rows = p.batch * (grouped ? p.heads_k : p.heads_q) * p.seqlen_q;
  params.out = output<float>(out, ScalarType::Float, rows * params.columns);
  return params;
}

// scores [rows, columns]; threshold has one entry or one per row.
inline SelectParams select_params(const Tensor& scores, const OptionalTensor& used, int64_t kind,
                                  int64_t k, const OptionalTensor& threshold, double mass,
                                  int64_t first, int64_t last, const Tensor& ids,
                                  const Tensor& lens) {
  SelectParams params;
  STD_TORCH_CHECK(scores.dim() == 2 && scores.is_contiguous() &&
                      scores.scalar_type() == ScalarType::Float && ids.dim() == 2,
                  "attnforge_native: scores must be contiguous fp32 rows");
  params.kind = static_cast<SelectKind>(kind);
  params.scores = static_cast<const float*>(scores.const_data_ptr());
  params.rows = scores.size(0), params.columns = scores.size(1);
  STD_TORCH_CHECK((!used || used->numel() == params.rows) &&
                      (!threshold || threshold->numel() == 1 || threshold->numel() == params.rows),
                  "attnforge_native: lengths and thresholds are one per row");
  params.used = data<int32_t>(used, ScalarType::Int);
  params.threshold = data<float>(threshold, ScalarType::Float);
  params.threshold_stride = threshold && threshold->numel() > 1;
  STD_TORCH_CHECK(params.kind != SelectKind::kThreshold || params.threshold,
                  "attnforge_native: a threshold is missing");
  params.k = k, params.mass = mass, params.first = first, params.last = last;
  params.slots = ids.size(1);
  params.ids = output<int32_t>(ids, ScalarType::Int, params.rows * params.slots);
  params.lens = output<int32_t>(lens, ScalarType::Int, params.rows);
  return params;
}

}  // namespace attnforge::cpu
