// Private CPU operators of the nsa family (namespace attnforge_native): see ops_cpu.cpp.
#include <algorithm>

#include "bindings/tensors.h"

namespace attnforge::cpu {
namespace {

// Importance or indices of an output: [B, heads, rows, n], varlen [heads, rows, n], contiguous.
void check_output(const FlashProblem& p, const Tensor& t, ScalarType type, int64_t n) {
  const int64_t rows = p.cu_seqlens_q ? p.total_q : p.batch * p.seqlen_q;
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == p.heads_k * rows * n,
                  "attnforge_native: an output of nsa_select does not fit");
}

void nsa_select(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& positions,
                const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                const OptionalTensor& seqused_k, const OptionalTensor& importance,
                const OptionalTensor& indices, int64_t max_seqlen_q, int64_t max_seqlen_k,
                double softmax_scale, int64_t cmp_block, int64_t cmp_stride, int64_t slc_block,
                int64_t blocks, int64_t top_n, int64_t init_blocks, int64_t local_blocks) {
  NsaSelectParams params;
  FlashProblem& p = params.problem;
  p = problem(q, k, k, cu_seqlens_q, cu_seqlens_k, seqused_k, {}, {}, max_seqlen_q, max_seqlen_k,
              {softmax_scale, -1, -1, 0.0});
  STD_TORCH_CHECK(cmp_stride > 0 && cmp_block >= cmp_stride && cmp_block % cmp_stride == 0 &&
                      slc_block > 0 && slc_block % cmp_stride == 0,
                  "attnforge_native: the stride must divide both blocks");
  STD_TORCH_CHECK(blocks >= 0 && top_n >= 0, "attnforge_native: sizes must not be negative");
  const int64_t rows = p.cu_seqlens_q ? p.total_q : p.seqlen_q;
  const bool shared = positions.numel() == rows;
  STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Int && positions.is_contiguous() &&
                      (shared || (!p.cu_seqlens_q && positions.numel() == p.batch * rows)),
                  "attnforge_native: positions must be contiguous int32, one per query");
  params.positions = static_cast<const int32_t*>(positions.const_data_ptr());
  params.positions_batch = shared ? 0 : rows;
  if (importance) {
    check_output(p, *importance, ScalarType::Float, blocks);
    params.importance = static_cast<float*>(importance->mutable_data_ptr());
    if (p.cu_seqlens_q) std::fill_n(params.importance, importance->numel(), 0.0f);
  }
  if (indices) {
    check_output(p, *indices, ScalarType::Int, top_n);
    params.indices = static_cast<int32_t*>(indices->mutable_data_ptr());
    if (p.cu_seqlens_q) std::fill_n(params.indices, indices->numel(), -1);
  }
  if (p.heads_q == 0 || p.batch == 0 || rows == 0) return;
  params.q = ref(q, p.dtype), params.k = ref(k, p.dtype);
  params.lse = stat(lse);
  params.cmp_block = cmp_block, params.cmp_stride = cmp_stride, params.slc_block = slc_block;
  params.blocks = blocks;
  params.top_n = top_n, params.init_blocks = init_blocks, params.local_blocks = local_blocks;
  Tensor scratch = workspace(kernels().nsa_select_workspace(params, workers().num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernels().nsa_select(params, workers());
}

}  // namespace
}  // namespace attnforge::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(attnforge_native, m) {
  m.def(
      "nsa_select(Tensor q, Tensor k, Tensor lse, Tensor positions, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor(a!)? importance, Tensor(b!)? indices, "
      "int max_seqlen_q, int max_seqlen_k, float softmax_scale, int cmp_block, int cmp_stride, "
      "int slc_block, int blocks, int top_n, int init_blocks, int local_blocks) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(attnforge_native, CPU, m) {
  m.impl("nsa_select", TORCH_BOX(&attnforge::cpu::nsa_select));
}
