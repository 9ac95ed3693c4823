// Private CPU operators of the nsa family (namespace attnforge_native): see ops_cpu.cpp.
#include <algorithm>
#include <limits>
#include <vector>

#include "bindings/tensors.h"

namespace attnforge::cpu {
namespace {

// Importance or indices of an output: [B, heads, rows, n], varlen [heads, rows, n], contiguous.
void check_output(const FlashProblem& p, const Tensor& t, ScalarType type, int64_t n) {
  const int64_t rows = p.cu_seqlens_q ? p.total_q : p.batch * p.seqlen_q;
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == p.heads_k * rows * n,
                  "attnforge_native: an output of nsa_select does not fit");
}

// How a problem is cut into compressed keys and blocks, as both kernels take it.
struct Sizes {
  int64_t cmp_block, cmp_stride, slc_block, blocks, top_n, init_blocks, local_blocks;
};

// Fills all but the problem, q, k and lse. False if there is nothing to do.
bool set_choice(NsaSelectParams& params, const Tensor& positions, const OptionalTensor& importance,
                const OptionalTensor& indices, const Sizes& sizes) {
  const FlashProblem& p = params.problem;
  STD_TORCH_CHECK(sizes.cmp_stride > 0 && sizes.cmp_block >= sizes.cmp_stride &&
                      sizes.cmp_block % sizes.cmp_stride == 0 && sizes.slc_block > 0 &&
                      sizes.slc_block % sizes.cmp_stride == 0,
                  "attnforge_native: the stride must divide both blocks");
  STD_TORCH_CHECK(sizes.blocks >= 0 && sizes.top_n >= 0,
                  "attnforge_native: sizes must not be negative");
  const int64_t rows = p.cu_seqlens_q ? p.total_q : p.seqlen_q;
  const bool shared = positions.numel() == rows;
  STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Int && positions.is_contiguous() &&
                      (shared || (!p.cu_seqlens_q && positions.numel() == p.batch * rows)),
                  "attnforge_native: positions must be contiguous int32, one per query");
  params.positions = static_cast<const int32_t*>(positions.const_data_ptr());
  params.positions_batch = shared ? 0 : rows;
  if (importance) {
    check_output(p, *importance, ScalarType::Float, sizes.blocks);
    params.importance = static_cast<float*>(importance->mutable_data_ptr());
    if (p.cu_seqlens_q) std::fill_n(params.importance, importance->numel(), 0.0f);
  }
  if (indices) {
    check_output(p, *indices, ScalarType::Int, sizes.top_n);
    params.indices = static_cast<int32_t*>(indices->mutable_data_ptr());
    if (p.cu_seqlens_q) std::fill_n(params.indices, indices->numel(), -1);
  }
  params.cmp_block = sizes.cmp_block, params.cmp_stride = sizes.cmp_stride;
  params.slc_block = sizes.slc_block, params.blocks = sizes.blocks;
  params.top_n = sizes.top_n, params.init_blocks = sizes.init_blocks;
  params.local_blocks = sizes.local_blocks;
  return p.heads_q > 0 && p.batch > 0 && rows > 0;
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
  if (!set_choice(params, positions, importance, indices,
                  {cmp_block, cmp_stride, slc_block, blocks, top_n, init_blocks, local_blocks})) {
    return;
  }
  params.q = ref(q, p.dtype), params.k = ref(k, p.dtype);
  params.lse = stat(lse);
  Tensor scratch = workspace(kernels().nsa_select_workspace(params, workers().num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernels().nsa_select(params, workers());
}

void nsa_attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions,
                const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                const OptionalTensor& seqused_k, const Tensor& out, const Tensor& lse,
                const Tensor& indices, int64_t max_seqlen_q, int64_t max_seqlen_k,
                double softmax_scale, int64_t cmp_block, int64_t cmp_stride, int64_t slc_block,
                int64_t blocks, int64_t top_n, int64_t init_blocks, int64_t local_blocks) {
  NsaAttendParams params;
  NsaSelectParams& s = params.select;
  FlashProblem& p = s.problem;
  p = problem(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, {}, {}, max_seqlen_q, max_seqlen_k,
              {softmax_scale, -1, -1, 0.0});
  zero_tail(out, p.cu_seqlens_q, p.batch);
  fill_tail(lse, p.cu_seqlens_q, p.batch, -std::numeric_limits<float>::infinity());
  if (!set_choice(s, positions, {}, indices,
                  {cmp_block, cmp_stride, slc_block, blocks, top_n, init_blocks, local_blocks})) {
    return;
  }
  large(out);
  s.q = ref(q, p.dtype), s.k = ref(k, p.dtype), params.v = ref(v, p.dtype);
  params.out = ref(out, p.dtype);
  s.lse = stat(lse);
  Tensor scratch = workspace(kernels().nsa_attend_workspace(params, workers().num_threads));
  s.workspace = scratch.mutable_data_ptr();
  kernels().nsa_attend(params, workers());
}

// All tensors contiguous, x and out of one dtype, gates fp32.
void combine(const std::vector<Tensor>& x, const Tensor& gates, const Tensor& out) {
  CombineParams params;
  const int64_t branches = static_cast<int64_t>(x.size());
  STD_TORCH_CHECK(branches > 0 && branches <= CombineParams::kMost && out.dim() > 0,
                  "attnforge_native: combine takes 1 to 8 branches");
  params.dtype = dtype_of(out);
  params.branches = branches;
  params.dim = out.size(out.dim() - 1);
  params.rows = params.dim > 0 ? out.numel() / params.dim : 0;
  auto fits = [](const Tensor& t, ScalarType type, int64_t elements) {
    return t.is_contiguous() && t.scalar_type() == type && t.numel() == elements;
  };
  const ScalarType type = out.scalar_type();
  bool all = out.is_contiguous() && fits(gates, ScalarType::Float, params.rows * branches);
  for (int64_t i = 0; i < branches; ++i) {
    all = all && fits(x[i], type, out.numel());
    params.x[i] = x[i].const_data_ptr();
  }
  STD_TORCH_CHECK(all, "attnforge_native: branches, gates and output of combine do not fit");
  if (params.rows == 0) return;
  large(out);
  params.gates = static_cast<const float*>(gates.const_data_ptr());
  params.out = out.mutable_data_ptr();
  kernels().combine(params, workers());
}

}  // namespace
}  // namespace attnforge::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(attnforge_native, m) {
  m.def(
      "nsa_select(Tensor q, Tensor k, Tensor lse, Tensor positions, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor(a!)? importance, Tensor(b!)? indices, "
      "int max_seqlen_q, int max_seqlen_k, float softmax_scale, int cmp_block, int cmp_stride, "
      "int slc_block, int blocks, int top_n, int init_blocks, int local_blocks) -> ()");
  m.def(
      "nsa_attend(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor(a!) out, Tensor(b!) lse, Tensor(c!) "
      "indices, "
      "int max_seqlen_q, int max_seqlen_k, float softmax_scale, int cmp_block, int cmp_stride, "
      "int slc_block, int blocks, int top_n, int init_blocks, int local_blocks) -> ()");
  m.def("combine(Tensor[] x, Tensor gates, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(attnforge_native, CPU, m) {
  m.impl("nsa_select", TORCH_BOX(&attnforge::cpu::nsa_select));
  m.impl("nsa_attend", TORCH_BOX(&attnforge::cpu::nsa_attend));
  m.impl("combine", TORCH_BOX(&attnforge::cpu::combine));
}
