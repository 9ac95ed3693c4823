// Private CPU operators of the block_sparse family (namespace attnforge_native): see ops_cpu.cpp.
#include <limits>

#include "bindings/tensors.h"

namespace attnforge::cpu {
namespace {

struct Blocks {
  int64_t q_block, kv_block;
};

// indices [B | 1, heads, rows, slots], or varlen [heads, rows, slots]; counts the same less slots.
SelectionRef selection(const FlashProblem& p, const Tensor& indices, const OptionalTensor& counts,
                       const Blocks& blocks) {
  const int64_t h = indices.dim() - 3;
  const bool varlen = p.cu_seqlens_q != nullptr;
  STD_TORCH_CHECK(
      indices.scalar_type() == ScalarType::Int && h == (varlen ? 0 : 1) && indices.is_contiguous(),
      "attnforge_native: indices must be contiguous int32 [B, heads, rows, slots], or "
      "[heads, rows, slots] of packed sequences");
  STD_TORCH_CHECK(blocks.q_block > 0 && blocks.kv_block > 0,
                  "attnforge_native: blocks must not be empty");
  SelectionRef s;
  s.heads = indices.size(h), s.rows = indices.size(h + 1), s.slots = indices.size(h + 2);
  STD_TORCH_CHECK(s.heads == 1 || s.heads == p.heads_k || s.heads == p.heads_q,
                  "attnforge_native: lists must be per query head, per kv head, or one");
  STD_TORCH_CHECK(varlen || indices.size(0) == 1 || indices.size(0) == p.batch,
                  "attnforge_native: lists of another batch");
  s.q_block = blocks.q_block, s.kv_block = blocks.kv_block;
  s.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  s.row_stride = s.slots, s.head_stride = s.rows * s.slots;
  const bool batched = !varlen && indices.size(0) > 1;
  s.batch_stride = batched ? s.heads * s.head_stride : 0;
  if (counts) {
    STD_TORCH_CHECK(counts->scalar_type() == ScalarType::Int && counts->is_contiguous() &&
                        counts->numel() * s.slots == indices.numel(),
                    "attnforge_native: counts must be contiguous int32, one per list");
    s.counts = static_cast<const int32_t*>(counts->const_data_ptr());
    s.counts_head = s.rows;
    s.counts_batch = batched ? s.heads * s.rows : 0;
  }
  return s;
}

void check_dims(const FlashProblem& p) {
  STD_TORCH_CHECK(p.head_dim <= 256 && p.v_head_dim <= 256,
                  "attnforge_native: block-sparse head dims go up to 256");
}

void block_sparse_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& indices,
                      const OptionalTensor& counts, const OptionalTensor& cu_seqlens_q,
                      const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k,
                      const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                      const Tensor& out, const Tensor& lse, const OptionalTensor& out_lo,
                      int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                      int64_t window_left, int64_t window_right, double softcap, int64_t q_block,
                      int64_t kv_block) {
  BlockSparseFwdParams params;
  FlashFwdParams& f = params.flash;
  FlashProblem& p = f.problem;
  p = problem(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sinks, max_seqlen_q,
              max_seqlen_k, {softmax_scale, window_left, window_right, softcap});
  check_dims(p);
  zero_tail(out, p.cu_seqlens_q, p.batch);
  if (out_lo) zero_tail(*out_lo, p.cu_seqlens_q, p.batch);
  fill_tail(lse, p.cu_seqlens_q, p.batch, -std::numeric_limits<float>::infinity());
  if (empty(p)) return;
  large(out);
  params.selection = selection(p, indices, counts, {q_block, kv_block});
  f.q = ref(q, p.dtype), f.k = ref(k, p.dtype), f.v = ref(v, p.dtype);
  f.out = ref(out, p.dtype), f.out_lo = ref(out_lo, p.dtype);
  f.lse = stat(lse);
  Tensor scratch = workspace(kernels().block_sparse_fwd_workspace(params, workers().num_threads));
  f.workspace = scratch.mutable_data_ptr();
  kernels().block_sparse_fwd(params, workers());
}

void block_sparse_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q,
                      const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                      const OptionalTensor& out_lo, const Tensor& indices,
                      const OptionalTensor& counts, const OptionalTensor& cu_seqlens_q,
                      const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k,
                      const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                      const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& delta,
                      int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                      int64_t window_left, int64_t window_right, double softcap, int64_t q_block,
                      int64_t kv_block) {
  BlockSparseBwdParams params;
  FlashBwdParams& f = params.flash;
  FlashProblem& p = f.problem;
  p = problem(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sinks, max_seqlen_q,
              max_seqlen_k, {softmax_scale, window_left, window_right, softcap});
  check_dims(p);
  zero_tail(dq, p.cu_seqlens_q, p.batch);
  zero_tail(dk, p.cu_seqlens_k, p.batch);
  zero_tail(dv, p.cu_seqlens_k, p.batch);
  fill_tail(delta, p.cu_seqlens_q, p.batch, 0.0f);
  if (empty(p)) return;
  large(dq, dk, dv);
  params.selection = selection(p, indices, counts, {q_block, kv_block});
  f.dout = ref(dout, p.dtype);
  f.q = ref(q, p.dtype), f.k = ref(k, p.dtype), f.v = ref(v, p.dtype);
  f.out = ref(out, p.dtype), f.out_lo = ref(out_lo, p.dtype);
  f.dq = ref(dq, p.dtype), f.dk = ref(dk, p.dtype), f.dv = ref(dv, p.dtype);
  f.lse = stat(lse);
  if (dlse) f.dlse = stat(*dlse);
  f.delta = stat(delta);
  Tensor scratch = workspace(kernels().block_sparse_bwd_workspace(params, workers().num_threads));
  f.workspace = scratch.mutable_data_ptr();
  kernels().block_sparse_bwd(params, workers());
}

}  // namespace
}  // namespace attnforge::cpu

#define ATTNFORGE_PROBLEM                                                                \
  "Tensor indices, Tensor? counts, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? " \
  "seqused_k, "                                                                          \
  "Tensor? alibi_slopes, Tensor? sinks, "
#define ATTNFORGE_SCALARS                                                                        \
  "int max_seqlen_q, int max_seqlen_k, float softmax_scale, int window_left, int window_right, " \
  "float softcap, int q_block, int kv_block"

STABLE_TORCH_LIBRARY_FRAGMENT(attnforge_native, m) {
  m.def("block_sparse_fwd(Tensor q, Tensor k, Tensor v, " ATTNFORGE_PROBLEM
        "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? out_lo, " ATTNFORGE_SCALARS ") -> ()");
  m.def(
      "block_sparse_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor? out_lo, " ATTNFORGE_PROBLEM
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) delta, " ATTNFORGE_SCALARS
      ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(attnforge_native, CPU, m) {
  m.impl("block_sparse_fwd", TORCH_BOX(&attnforge::cpu::block_sparse_fwd));
  m.impl("block_sparse_bwd", TORCH_BOX(&attnforge::cpu::block_sparse_bwd));
}
