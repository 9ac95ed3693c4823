// Tensors of LSH codes and tables to params structs, for the bindings of every device.
#pragma once

#include "bindings/scores.h"

namespace attnforge::cpu {

inline LshEncodeParams lsh_encode_params(const Tensor& x, const OptionalTensor& mean,
                                         const Tensor& planes, int64_t bits, const Tensor& codes) {
  LshEncodeParams params;
  STD_TORCH_CHECK(
      x.dim() == 4 && x.size(3) % 8 == 0 && x.size(3) > 0 && x.size(3) <= 256 && codes.dim() == 4,
      "attnforge_native: x must be [batch, seq, heads, dim] with a dim of at most 256");
  params.dtype = dtype_of(x);
  params.batch = x.size(0), params.seqlen = x.size(1), params.heads = x.size(2);
  params.dim = x.size(3), params.bits = bits, params.tables = codes.size(3);
  STD_TORCH_CHECK(bits >= 0 && bits <= 15 && params.tables > 0,
                  "attnforge_native: codes have 0 to 15 bits");
  STD_TORCH_CHECK(!mean || mean->numel() == params.batch * params.heads * params.dim,
                  "attnforge_native: mean must be [batch, heads, dim]");
  params.x = ref(x, params.dtype);
  params.mean = data<float>(mean, ScalarType::Float);
  STD_TORCH_CHECK(planes.scalar_type() == ScalarType::Float && planes.is_contiguous() &&
                      planes.numel() == params.dim * bits * params.tables,
                  "attnforge_native: planes must be contiguous fp32 [dim, bits * tables]");
  params.planes = static_cast<const float*>(planes.const_data_ptr());
  params.codes = output<uint16_t>(codes, ScalarType::Short,
                                  params.batch * params.heads * params.seqlen * params.tables);
  return params;
}

// starts [batch, heads, segments, tables, 2^bits + 1], ids [.., segment] int16.
inline LshTables tables_of(const Tensor& starts, const Tensor& ids, int64_t bits) {
  STD_TORCH_CHECK(starts.dim() == 5 && ids.dim() == 5 && bits >= 0 && bits <= 15 &&
                      starts.size(4) == (int64_t{1} << bits) + 1 && ids.size(4) <= 65536,
                  "attnforge_native: tables of another shape");
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(starts.size(d) == ids.size(d), "attnforge_native: starts and ids do not fit");
  }
  LshTables t;
  t.batch = ids.size(0), t.heads = ids.size(1), t.segments = ids.size(2), t.tables = ids.size(3);
  t.bits = bits, t.segment = ids.size(4);
  t.starts = output<int32_t>(starts, ScalarType::Int, starts.numel());
  t.ids = output<uint16_t>(ids, ScalarType::Short, ids.numel());
  return t;
}

inline const int32_t* per_sequence(const Tensor& t, const LshTables& tables) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.numel() == tables.batch,
      "attnforge_native: lengths must be int32, one per sequence");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

inline LshInsertParams lsh_insert_params(const Tensor& starts, const Tensor& ids, int64_t bits,
                                         const Tensor& codes, const Tensor& first,
                                         const Tensor& count) {
  LshInsertParams params;
  params.tables = tables_of(starts, ids, bits);
  const LshTables& t = params.tables;
  STD_TORCH_CHECK(codes.dim() == 4 && codes.is_contiguous() &&
                      codes.scalar_type() == ScalarType::Short && codes.size(0) == t.batch &&
                      codes.size(1) == t.heads && codes.size(3) == t.tables,
                  "attnforge_native: codes must be int16 [batch, heads, rows, tables]");
  params.codes = static_cast<const uint16_t*>(codes.const_data_ptr());
  params.rows = codes.size(2);
  params.first = per_sequence(first, t), params.count = per_sequence(count, t);
  return params;
}

inline LshTruncateParams lsh_truncate_params(const Tensor& starts, const Tensor& ids, int64_t bits,
                                             const Tensor& length) {
  LshTruncateParams params;
  params.tables = tables_of(starts, ids, bits);
  params.length = per_sequence(length, params.tables);
  return params;
}

// What a look-up is asked, but for its outputs.
inline LshRetrieveParams lsh_query_params(const Tensor& starts, const Tensor& table_ids,
                                          int64_t bits, const Tensor& codes, const Tensor& q,
                                          const Tensor& k, const OptionalTensor& mean,
                                          const Tensor& norms, const Tensor& begin,
                                          const Tensor& end, int64_t min_hits, double clip) {
  LshRetrieveParams params;
  params.tables = tables_of(starts, table_ids, bits);
  const LshTables& t = params.tables;
  FlashProblem& p = params.problem;
  p = list_problem(q, k, k, std::nullopt, std::nullopt, 1.0);
  STD_TORCH_CHECK(p.seqlen_q == 1 && p.batch == t.batch && p.heads_k == t.heads &&
                      p.head_dim <= 256 && codes.scalar_type() == ScalarType::Short &&
                      codes.is_contiguous() && codes.numel() == p.batch * p.heads_q * t.tables,
                  "attnforge_native: one query per sequence, with its codes");
  STD_TORCH_CHECK(norms.dim() == 3 && norms.is_contiguous() && norms.size(0) == p.batch &&
                      norms.size(1) == p.heads_k && norms.size(2) >= p.seqlen_k &&
                      norms.scalar_type() == ScalarType::Float,
                  "attnforge_native: norms must be fp32 [batch, heads, keys]");
  STD_TORCH_CHECK(!mean || mean->numel() == p.batch * p.heads_k * p.head_dim,
                  "attnforge_native: mean must be [batch, heads, dim]");
  STD_TORCH_CHECK(min_hits == 1 || min_hits == 2, "attnforge_native: min_hits is 1 or 2");
  params.q = ref(q, p.dtype), params.k = ref(k, p.dtype);
  params.codes = static_cast<const uint16_t*>(codes.const_data_ptr());
  params.mean = data<float>(mean, ScalarType::Float);
  params.norms = static_cast<const float*>(norms.const_data_ptr());
  params.norm_stride = norms.size(2);
  params.begin = per_sequence(begin, t), params.end = per_sequence(end, t);
  params.min_hits = min_hits, params.clip = static_cast<float>(clip);
  return params;
}

inline LshRetrieveParams lsh_retrieve_params(const Tensor& starts, const Tensor& table_ids,
                                             int64_t bits, const Tensor& codes, const Tensor& q,
                                             const Tensor& k, const OptionalTensor& mean,
                                             const Tensor& norms, const Tensor& begin,
                                             const Tensor& end, int64_t min_hits, double clip,
                                             const Tensor& ids, const Tensor& lens,
                                             const Tensor& log_bias) {
  LshRetrieveParams params = lsh_query_params(starts, table_ids, bits, codes, q, k, mean, norms,
                                              begin, end, min_hits, clip);
  const FlashProblem& p = params.problem;
  params.slots = ids.size(ids.dim() - 1);
  params.ids = output<int32_t>(ids, ScalarType::Int, p.batch * p.heads_q * params.slots);
  params.lens = output<int32_t>(lens, ScalarType::Int, p.batch * p.heads_q);
  params.log_bias = output<float>(log_bias, ScalarType::Float, ids.numel());
  return params;
}

}  // namespace attnforge::cpu
