// Tensors of the retrieval family to its params structs, for the bindings of every device.
#pragma once

#include "attnforge/retrieval.h"
#include "bindings/tensors.h"

namespace attnforge::cpu {

// How far apart the lists of [batch, heads, entries] lie; -1: not at one distance.
inline int64_t list_stride(const Tensor& t) {
  const int64_t batch = t.size(0), heads = t.size(1), entries = t.size(2);
  if (t.is_contiguous()) return entries;
  const int64_t stride = heads > 1 ? t.stride(1) : batch > 1 ? t.stride(0) : entries;
  const bool even = batch <= 1 || t.stride(0) == heads * stride;
  return even && (entries <= 1 || t.stride(2) == 1) && stride >= entries ? stride : -1;
}

// Lists may be cut from wider ones where the kernel asks for their stride.
inline KeyLists lists_of(const FlashProblem& p, const Tensor& ids, const OptionalTensor& lens,
                         const OptionalTensor& log_bias, bool cut = false) {
  STD_TORCH_CHECK(ids.dim() == 3 && ids.scalar_type() == ScalarType::Int && ids.size(0) == p.batch,
                  "attnforge_native: ids must be int32 [batch, heads, entries]");
  KeyLists lists;
  lists.heads = ids.size(1), lists.slots = ids.size(2), lists.stride = list_stride(ids);
  STD_TORCH_CHECK(cut ? lists.stride >= 0 : ids.is_contiguous(),
                  "attnforge_native: lists must be contiguous");
  STD_TORCH_CHECK(lists.heads == 1 || lists.heads == p.heads_k || lists.heads == p.heads_q,
                  "attnforge_native: lists are one for all, per KV head or per query head");
  STD_TORCH_CHECK(p.heads_q / p.heads_k <= 64 || lists.heads != p.heads_q,
                  "attnforge_native: at most 64 query heads of a KV head have lists of their own");
  STD_TORCH_CHECK(!lens || lens->numel() == p.batch * lists.heads,
                  "attnforge_native: lens must have one entry per list");
  STD_TORCH_CHECK(
      !log_bias || (log_bias->scalar_type() == ScalarType::Float && log_bias->dim() == 3 &&
                    log_bias->numel() == ids.numel() && list_stride(*log_bias) == lists.stride),
      "attnforge_native: log_bias must be fp32 like ids");
  lists.ids = static_cast<const int32_t*>(ids.const_data_ptr());
  lists.lens = data<int32_t>(lens, ScalarType::Int);
  if (log_bias) lists.log_bias = static_cast<const float*>(log_bias->const_data_ptr());
  return lists;
}

// k and v are pages [P, page_size, Hk, D] beside a table.
inline FlashProblem list_problem(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const OptionalTensor& table, const OptionalTensor& used,
                                 double softmax_scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "attnforge_native: q, k and v must be 4-D");
  FlashProblem p;
  p.dtype = p.q_dtype = p.out_dtype = dtype_of(k);
  p.batch = q.size(0), p.seqlen_q = q.size(1), p.heads_q = q.size(2), p.head_dim = q.size(3);
  p.heads_k = k.size(2), p.v_head_dim = v.size(3);
  p.seqlen_k = table ? (k.size(0) > 0 ? table->size(1) * k.size(1) : 0) : k.size(1);
  STD_TORCH_CHECK(p.heads_k > 0 && p.heads_q % p.heads_k == 0 && k.size(3) == p.head_dim &&
                      v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == p.heads_k &&
                      (table || k.size(0) == p.batch),
                  "attnforge_native: shapes of q, k and v do not fit");
  STD_TORCH_CHECK(p.head_dim % 8 == 0 && p.v_head_dim % 8 == 0 && p.head_dim > 0 &&
                      p.v_head_dim > 0 && p.head_dim <= 576 && p.v_head_dim <= 1024,
                  "attnforge_native: head dims must be multiples of 8, up to 576 and 1024 for v");
  STD_TORCH_CHECK(!used || used->numel() == p.batch,
                  "attnforge_native: cache_seqlens must have one entry per sequence");
  p.seqused_k = data<int32_t>(used, ScalarType::Int);
  p.softmax_scale = static_cast<float>(softmax_scale);
  return p;
}

// The parameters of a forward; the workspace is the caller's.
inline IndexedFwdParams indexed_fwd_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const Tensor& ids, const OptionalTensor& lens,
                                           const OptionalTensor& log_bias,
                                           const OptionalTensor& table, const OptionalTensor& used,
                                           double softmax_scale, const Tensor& out,
                                           const Tensor& lse, const OptionalTensor& out_lo,
                                           bool cut = false) {
  IndexedFwdParams params;
  FlashFwdParams& f = params.flash;
  FlashProblem& p = f.problem;
  p = list_problem(q, k, v, table, used, softmax_scale);
  if (empty(p) || p.seqlen_q == 0) return params;
  params.lists = lists_of(p, ids, lens, log_bias, cut);
  f.q = ref(q, p.dtype), f.out = ref(out, p.dtype), f.out_lo = ref(out_lo, p.dtype);
  f.lse = stat(lse);
  if (table) {
    PagePool& pool = params.pool;
    STD_TORCH_CHECK(table->dim() == 2 && table->scalar_type() == ScalarType::Int &&
                        table->size(0) == p.batch && table->is_contiguous() && used,
                    "attnforge_native: block_table must be contiguous int32 rows");
    pool.k = ref(k, p.dtype), pool.v = ref(v, p.dtype);
    pool.pages = k.size(0), pool.page_size = k.size(1);
    pool.table = static_cast<const int32_t*>(table->const_data_ptr());
    pool.table_stride = table->size(1);
  } else {
    f.k = ref(k, p.dtype), f.v = ref(v, p.dtype);
  }
  return params;
}

// Of a backward. dlog_bias: per list and KV head.
inline IndexedBwdParams indexed_bwd_params(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const OptionalTensor& out_lo,
    const Tensor& ids, const OptionalTensor& lens, const OptionalTensor& log_bias,
    const OptionalTensor& used, double softmax_scale, const Tensor& dq, const Tensor& dk,
    const Tensor& dv, const OptionalTensor& dlog_bias) {
  IndexedBwdParams params;
  FlashBwdParams& f = params.flash;
  FlashProblem& p = f.problem;
  p = list_problem(q, k, v, std::nullopt, used, softmax_scale);
  if (empty(p)) return params;
  params.lists = lists_of(p, ids, lens, log_bias);
  f.dout = ref(dout, p.dtype);
  f.q = ref(q, p.dtype), f.k = ref(k, p.dtype), f.v = ref(v, p.dtype);
  f.out = ref(out, p.dtype), f.out_lo = ref(out_lo, p.dtype);
  f.dq = ref(dq, p.dtype), f.dk = ref(dk, p.dtype), f.dv = ref(dv, p.dtype);
  f.lse = stat(lse);
  if (dlse) f.dlse = stat(*dlse);
  if (dlog_bias) {
    const int64_t heads = std::max(params.lists.heads, p.heads_k);
    STD_TORCH_CHECK(dlog_bias->scalar_type() == ScalarType::Float && dlog_bias->is_contiguous() &&
                        dlog_bias->numel() == p.batch * heads * params.lists.slots,
                    "attnforge_native: dlog_bias must be contiguous fp32, per list and KV head");
    params.dlog_bias = static_cast<float*>(dlog_bias->mutable_data_ptr());
  }
  return params;
}

}  // namespace attnforge::cpu
