// Private CPU operators of the delta rules and the diagonal scan (namespace attnforge_native): see
// ops_cpu.cpp.
#include "bindings/delta.h"

namespace attnforge::cpu {
namespace {

void delta_chunk_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                     const Tensor& beta, const OptionalTensor& initial_state,
                     const OptionalTensor& cu_seqlens, double scale, const Tensor& out,
                     const Tensor& final_state) {
  DeltaChunkFwdParams params;
  params.problem = delta_problem(q, k, v, g, beta, initial_state, cu_seqlens, scale);
  params.out = ref(out, params.problem.dtype);
  params.final_state = wanted(final_state, state_numel(params.problem));
  if (params.problem.sequences == 0) return;
  const Workers threads = workers();
  Tensor scratch = workspace(kernels().delta_chunk_fwd_workspace(params, threads.num_threads));
  params.workspace = scratch.mutable_data_ptr();
  large(out);
  kernels().delta_chunk_fwd(params, threads);
}

void delta_chunk_bwd(const Tensor& dout, const OptionalTensor& dfinal_state, const Tensor& q,
                     const Tensor& k, const Tensor& v, const OptionalTensor& g, const Tensor& beta,
                     const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                     double scale, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                     const Tensor& dg, const Tensor& dbeta, const Tensor& dinitial_state) {
  DeltaChunkBwdParams params;
  params.problem = delta_problem(q, k, v, g, beta, initial_state, cu_seqlens, scale);
  const DeltaProblem& p = params.problem;
  params.dout = ref(dout, p.dtype);
  params.dfinal_state = delta_floats(dfinal_state, state_numel(p));
  params.dq = ref(dq, p.dtype), params.dk = ref(dk, p.dtype), params.dv = ref(dv, p.dtype);
  const int64_t tokens = q.size(0) * p.rows * p.value_heads;
  params.dg = wanted(dg, tokens * (p.channel_gates ? p.key_dim : 1));
  params.dbeta = delta_floats(dbeta, tokens);
  params.dinitial_state = wanted(dinitial_state, state_numel(p));
  if (p.sequences == 0) return;
  const Workers threads = workers();
  Tensor scratch = workspace(kernels().delta_chunk_bwd_workspace(params, threads.num_threads));
  params.workspace = scratch.mutable_data_ptr();
  large(dq, dk, dv, dg);
  kernels().delta_chunk_bwd(params, threads);
}

// q, k [B, 1, H, K] and v [B, 1, HV, V].
void delta_step(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                const Tensor& beta, const Tensor& states, const OptionalTensor& state_indices,
                double scale, const Tensor& out) {
  DeltaStepParams params;
  params.problem = delta_problem(q, k, v, g, beta, std::nullopt, std::nullopt, scale);
  const DeltaProblem& p = params.problem;
  params.slots = states.size(0);
  params.states = delta_floats(states, params.slots * p.value_heads * p.key_dim * p.value_dim);
  params.state_indices = data<int32_t>(state_indices, ScalarType::Int);
  STD_TORCH_CHECK(p.rows == 1 && (!state_indices || state_indices->numel() == p.sequences),
                  "attnforge_native: a step has one token per sequence and one index for each");
  params.out = ref(out, p.dtype);
  kernels().delta_step(params, workers());
}

void diag_scan_fwd(const Tensor& x, const Tensor& g, const OptionalTensor& initial_state,
                   const OptionalTensor& cu_seqlens, const Tensor& out, const Tensor& final_state) {
  DiagScanParams params = scan_of(x, g, initial_state, cu_seqlens);
  params.out = scan_like(out, x);
  params.final_state = wanted(final_state, params.sequences * params.dim);
  large(out);
  kernels().diag_scan_fwd(params, workers());
}

void diag_scan_bwd(const Tensor& dout, const OptionalTensor& dfinal_state, const Tensor& x,
                   const Tensor& g, const OptionalTensor& initial_state,
                   const OptionalTensor& cu_seqlens, const Tensor& dx, const Tensor& dg,
                   const Tensor& dinitial_state) {
  DiagScanParams params = scan_of(x, g, initial_state, cu_seqlens);
  params.dout = scan_like(dout, x);
  params.dfinal_state = delta_floats(dfinal_state, params.sequences * params.dim);
  params.dx = scan_like(dx, x);
  params.dg = delta_floats(dg, x.numel());
  params.dinitial_state = wanted(dinitial_state, params.sequences * params.dim);
  const Workers threads = workers();
  Tensor scratch = workspace(kernels().diag_scan_bwd_workspace(params, threads.num_threads));
  params.workspace = scratch.mutable_data_ptr();
  large(dx, dg);
  kernels().diag_scan_bwd(params, threads);
}

}  // namespace
}  // namespace attnforge::cpu

#define ATTNFORGE_OPERANDS                                                  \
  "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, Tensor? initial, " \
  "Tensor? cu_seqlens, float scale, "
#define ATTNFORGE_SCAN "Tensor x, Tensor g, Tensor? initial, Tensor? cu_seqlens, "

STABLE_TORCH_LIBRARY_FRAGMENT(attnforge_native, m) {
  m.def("delta_chunk_fwd(" ATTNFORGE_OPERANDS "Tensor(a!) out, Tensor(b!) final_state) -> ()");
  m.def("delta_chunk_bwd(Tensor dout, Tensor? dfinal_state, " ATTNFORGE_OPERANDS
        "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dg, Tensor(e!) dbeta, "
        "Tensor(f!) dinitial) -> ()");
  m.def(
      "delta_step(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, Tensor(a!) states, "
      "Tensor? state_indices, float scale, Tensor(b!) out) -> ()");
  m.def("diag_scan_fwd(" ATTNFORGE_SCAN "Tensor(a!) out, Tensor(b!) final_state) -> ()");
  m.def("diag_scan_bwd(Tensor dout, Tensor? dfinal_state, " ATTNFORGE_SCAN
        "Tensor(a!) dx, Tensor(b!) dg, Tensor(c!) dinitial) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(attnforge_native, CPU, m) {
  m.impl("delta_chunk_fwd", TORCH_BOX(&attnforge::cpu::delta_chunk_fwd));
  m.impl("delta_chunk_bwd", TORCH_BOX(&attnforge::cpu::delta_chunk_bwd));
  m.impl("delta_step", TORCH_BOX(&attnforge::cpu::delta_step));
  m.impl("diag_scan_fwd", TORCH_BOX(&attnforge::cpu::diag_scan_fwd));
  m.impl("diag_scan_bwd", TORCH_BOX(&attnforge::cpu::diag_scan_bwd));
}
