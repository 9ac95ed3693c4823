// Private CPU operators of contextual position encoding (namespace attnforge_native): see
// ops_cpu.cpp.
#include <limits>

#include "bindings/tensors.h"

namespace attnforge::cpu {
namespace {

// What forward and backward have in common: a problem and its table [heads|1, D, padded].
struct Call {
  FlashProblem problem;
  CopeTable table;
};

Call call_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table,
             int64_t positions, const OptionalTensor& cu_seqlens_q,
             const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k,
             int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, int64_t window_left,
             int64_t window_right) {
  Call call;
  FlashProblem& p = call.problem;
  p = problem(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, std::nullopt, std::nullopt,
              max_seqlen_q, max_seqlen_k, {softmax_scale, window_left, window_right, 0.0});
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float && table.is_contiguous() &&
                      table.dim() == 3 && (table.size(0) == 1 || table.size(0) == p.heads_q) &&
                      table.size(1) == p.head_dim && table.size(2) % kCopePadding == 0 &&
                      positions >= 1 && positions <= table.size(2),
                  "attnforge_native: the table must be contiguous float32 [heads_q|1, head_dim, "
                  "positions], padded to a multiple of 32");
  call.table = {static_cast<const float*>(table.const_data_ptr()), table.size(0), positions,
                table.size(2)};
  return call;
}

// Rows of no sequence: the caller has filled them.
template <class Params>
void run(Params& params, int64_t (*bytes)(const Params&, int64_t),
         void (*kernel)(const Params&, const Workers&)) {
  if (empty(params.problem)) return;
  Tensor scratch = workspace(bytes(params, workers().num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernel(params, workers());
}

void cope_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table,
              int64_t positions, const OptionalTensor& cu_seqlens_q,
              const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k,
              int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, int64_t window_left,
              int64_t window_right, const Tensor& out, const Tensor& lse,
              const OptionalTensor& out_lo) {
  CopeFwdParams params;
  const Call call = call_of(q, k, v, table, positions, cu_seqlens_q, cu_seqlens_k, seqused_k,
                            max_seqlen_q, max_seqlen_k, softmax_scale, window_left, window_right);
  const FlashProblem& p = params.problem = call.problem;
  params.table = call.table;
  params.q = ref(q, p.dtype), params.k = ref(k, p.dtype), params.v = ref(v, p.dtype);
  params.out = ref(out, p.dtype), params.out_lo = ref(out_lo, p.dtype);
  params.lse = stat(lse);
  run(params, kernels().cope_fwd_workspace, kernels().cope_fwd);
}

void cope_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
              const Tensor& v, const Tensor& table, int64_t positions, const Tensor& out,
              const Tensor& lse, const OptionalTensor& out_lo, const OptionalTensor& cu_seqlens_q,
              const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k,
              int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, int64_t window_left,
              int64_t window_right, const Tensor& dq, const Tensor& dk, const Tensor& dv,
              const Tensor& dtable) {
  CopeBwdParams params;
  const Call call = call_of(q, k, v, table, positions, cu_seqlens_q, cu_seqlens_k, seqused_k,
                            max_seqlen_q, max_seqlen_k, softmax_scale, window_left, window_right);
  const FlashProblem& p = params.problem = call.problem;
  params.table = call.table;
  params.dout = ref(dout, p.dtype);
  params.q = ref(q, p.dtype), params.k = ref(k, p.dtype), params.v = ref(v, p.dtype);
  params.out = ref(out, p.dtype), params.out_lo = ref(out_lo, p.dtype);
  params.dq = ref(dq, p.dtype), params.dk = ref(dk, p.dtype), params.dv = ref(dv, p.dtype);
  params.lse = stat(lse);
  if (dlse) params.dlse = stat(*dlse);
  STD_TORCH_CHECK(dtable.scalar_type() == ScalarType::Float && dtable.is_contiguous() &&
                      dtable.dim() == 5 && dtable.size(0) == p.batch &&
                      dtable.size(1) == p.heads_q && dtable.size(2) >= 1 &&
                      dtable.size(3) == call.table.padded && dtable.size(4) == p.head_dim,
                  "attnforge_native: dtable must be contiguous float32 [batch, heads_q, chunks, "
                  "padded, head_dim]");
  params.dtable = static_cast<float*>(dtable.mutable_data_ptr());
  params.chunks = dtable.size(2);
  run(params, kernels().cope_bwd_workspace, kernels().cope_bwd);
}

}  // namespace
}  // namespace attnforge::cpu

#define ATTNFORGE_COPE_PROBLEM                                                            \
  "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, int max_seqlen_q, int " \
  "max_seqlen_k, float softmax_scale, int window_left, int window_right, "

STABLE_TORCH_LIBRARY_FRAGMENT(attnforge_native, m) {
  m.def(
      "cope_fwd(Tensor q, Tensor k, Tensor v, Tensor table, int positions, " ATTNFORGE_COPE_PROBLEM
      "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? out_lo) -> ()");
  m.def(
      "cope_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor table, int "
      "positions, Tensor out, Tensor lse, Tensor? out_lo, " ATTNFORGE_COPE_PROBLEM
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dtable) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(attnforge_native, CPU, m) {
  m.impl("cope_fwd", TORCH_BOX(&attnforge::cpu::cope_fwd));
  m.impl("cope_bwd", TORCH_BOX(&attnforge::cpu::cope_bwd));
}
