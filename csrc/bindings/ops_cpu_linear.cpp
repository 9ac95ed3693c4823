// Private CPU operators of the linear family's additive part (namespace attnforge_native): see
// ops_cpu.cpp. Rows that no sequence covers are left as they are.
#include "bindings/linear.h"

namespace attnforge::cpu {
namespace {

// An output of q's dtype: its rows are written in the order of heads, 4 KiB pages apart.
TensorRef output(const Tensor& t, DType dtype) {
  advise_huge_pages(t, t.numel() * (dtype == DType::kFloat32 ? 4 : 2));
  return ref(t, dtype);
}

void linear_chunk_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& gate,
                      const OptionalTensor& initial_state, const OptionalTensor& initial_z,
                      const OptionalTensor& cu_seqlens, const Tensor& out,
                      const Tensor& final_state, const Tensor& final_z, const Tensor& den,
                      const Tensor& out_lo, int64_t gate_kind, int64_t normalize, double scale,
                      double eps, bool causal) {
  LinearFwdParams params;
  LinearProblem& p = params.problem;
  p = linear_problem(q, k, v, gate, cu_seqlens, {gate_kind, normalize, scale, eps, causal});
  p.initial_state = floats(initial_state, state_size(p));
  p.initial_z = floats(initial_z, z_size(p));
  params.out = output(out, p.dtype);
  if (out_lo.dim() == 4) params.out_lo = ref(out_lo, p.dtype);
  params.final_state = floats(final_state, state_size(p));
  params.final_z = floats(final_z, z_size(p));
  params.den = floats(den, q.size(0) * p.rows * p.value_heads);
  STD_TORCH_CHECK(params.den || p.normalize == LinearNorm::kNone || q.numel() == 0,
                  "attnforge_native: a normalised call needs room for denominators");
  if (p.sequences == 0) return;
  const Workers threads = workers();
  Tensor scratch = workspace(kernels().linear_chunk_fwd_workspace(params, threads.num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernels().linear_chunk_fwd(params, threads);
}

void linear_chunk_bwd(const Tensor& dout, const OptionalTensor& dfinal_state,
                      const OptionalTensor& dfinal_z, const Tensor& q, const Tensor& k,
                      const Tensor& v, const Tensor& out, const Tensor& final_state,
                      const Tensor& final_z, const Tensor& den, const Tensor& out_lo,
                      const OptionalTensor& gate, const OptionalTensor& initial_state,
                      const OptionalTensor& initial_z, const OptionalTensor& cu_seqlens,
                      const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dgate,
                      const Tensor& dinitial_state, const Tensor& dinitial_z, int64_t gate_kind,
                      int64_t normalize, double scale, double eps, bool causal) {
  LinearBwdParams params;
  LinearProblem& p = params.problem;
  p = linear_problem(q, k, v, gate, cu_seqlens, {gate_kind, normalize, scale, eps, causal});
  const int64_t states = state_size(p), zs = z_size(p);
  p.initial_state = floats(initial_state, states), p.initial_z = floats(initial_z, zs);
  params.dout = ref(dout, p.dtype), params.out = ref(out, p.dtype);
  if (out_lo.dim() == 4) params.out_lo = ref(out_lo, p.dtype);
  params.den = floats(den, q.size(0) * p.rows * p.value_heads);
  params.dfinal_state = floats(dfinal_state, states), params.dfinal_z = floats(dfinal_z, zs);
  params.final_state = floats(final_state, states), params.final_z = floats(final_z, zs);
  params.dq = output(dq, p.dtype), params.dk = output(dk, p.dtype);
  params.dv = output(dv, p.dtype);
  params.dgate = floats(dgate, gate_size(p, q.size(0), p.rows));
  if (p.gate_kind == LinearGate::kNone) params.dgate = nullptr;
  params.dinitial_state = floats(dinitial_state, states);
  params.dinitial_z = floats(dinitial_z, zs);
  if (p.sequences == 0) return;
  const Workers threads = workers();
  Tensor scratch = workspace(kernels().linear_chunk_bwd_workspace(params, threads.num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernels().linear_chunk_bwd(params, threads);
}

// q, k [B, H, K], v [B, HV, V] as sequences of one token.
void linear_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& states,
                 const OptionalTensor& zs, const OptionalTensor& gate,
                 const OptionalTensor& state_indices, const Tensor& out, int64_t gate_kind,
                 int64_t normalize, double scale, double eps) {
  LinearStepParams params;
  LinearProblem& p = params.problem;
  p = linear_problem(q, k, v, gate, std::nullopt, {gate_kind, normalize, scale, eps, true});
  STD_TORCH_CHECK(states.dim() == 4 && p.rows == 1,
                  "attnforge_native: want a pool of states and one token");
  params.slots = states.size(0);
  params.states = floats(states, params.slots * p.value_heads * p.key_dim * p.value_dim);
  if (p.normalize != LinearNorm::kNone) {
    params.zs = floats(zs, params.slots * p.value_heads * p.key_dim);
    STD_TORCH_CHECK(params.zs, "attnforge_native: a normalised step needs z");
  }
  params.state_indices = data<int32_t>(state_indices, ScalarType::Int);
  STD_TORCH_CHECK(!state_indices || state_indices->numel() == p.sequences,
                  "attnforge_native: state_indices must have one entry per row");
  params.out = ref(out, p.dtype);
  kernels().linear_step(params, workers());
}

}  // namespace
}  // namespace attnforge::cpu

#define ATTNFORGE_NUMBERS "int gate_kind, int normalize, float scale, float eps"

STABLE_TORCH_LIBRARY_FRAGMENT(attnforge_native, m) {
  m.def(
      "linear_chunk_fwd(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? initial_state, "
      "Tensor? initial_z, Tensor? cu_seqlens, Tensor(a!) out, Tensor(b!) final_state, "
      "Tensor(c!) final_z, Tensor(d!) den, Tensor(e!) out_lo, " ATTNFORGE_NUMBERS
      ", bool causal) -> ()");
  m.def(
      "linear_chunk_bwd(Tensor dout, Tensor? dfinal_state, Tensor? dfinal_z, Tensor q, Tensor k, "
      "Tensor v, Tensor out, Tensor final_state, Tensor final_z, Tensor den, Tensor out_lo, "
      "Tensor? gate, Tensor? initial_state, Tensor? initial_z, Tensor? cu_seqlens, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dgate, Tensor(e!) dinitial_state, "
      "Tensor(f!) dinitial_z, " ATTNFORGE_NUMBERS ", bool causal) -> ()");
  m.def(
      "linear_step(Tensor q, Tensor k, Tensor v, Tensor(a!) states, Tensor(b!)? zs, "
      "Tensor? gate, Tensor? state_indices, Tensor(c!) out, " ATTNFORGE_NUMBERS ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(attnforge_native, CPU, m) {
  m.impl("linear_chunk_fwd", TORCH_BOX(&attnforge::cpu::linear_chunk_fwd));
  m.impl("linear_chunk_bwd", TORCH_BOX(&attnforge::cpu::linear_chunk_bwd));
  m.impl("linear_step", TORCH_BOX(&attnforge::cpu::linear_step));
}
