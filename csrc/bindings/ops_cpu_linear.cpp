// Private CPU operators of the linear family's additive part (namespace attnforge_native): see
// ops_cpu.cpp. Rows that no sequence covers are left as they are.
#include "bindings/tensors.h"

namespace attnforge::cpu {
namespace {

constexpr int64_t kMaxDim = 1024;

// A contiguous fp32 tensor of `numel` elements, or null where there is none (or an empty one).
float* floats(const OptionalTensor& t, int64_t numel) {
  if (!t || (t->numel() == 0 && numel != 0)) return nullptr;
  STD_TORCH_CHECK(
      t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == numel,
      "attnforge_native: a state, gate or statistic has the wrong dtype or size");
  return static_cast<float*>(const_cast<void*>(t->const_data_ptr()));
}

LinearGate gate_of(int64_t kind) {
  STD_TORCH_CHECK(kind >= 0 && kind <= 4, "attnforge_native: no such gate");
  return static_cast<LinearGate>(kind);
}

int64_t gate_size(const LinearProblem& p, int64_t batch, int64_t rows) {
  const int64_t heads = batch * rows * p.value_heads;
  switch (p.gate_kind) {
    case LinearGate::kNone:
      return 0;
    case LinearGate::kHead:
      return p.value_heads;
    case LinearGate::kScalar:
      return heads;
    case LinearGate::kKey:
      return heads * p.key_dim;
    case LinearGate::kValue:
      return heads * p.value_dim;
  }
  return 0;
}

// q, k [B, T, H, K], v [B, T, HV, V]; what is not a tensor of the call comes as numbers.
struct Numbers {
  int64_t gate_kind, normalize;
  double scale, eps;
  bool causal;
};

LinearProblem linear_problem(const Tensor& q, const Tensor& k, const Tensor& v,
                             const OptionalTensor& gate, const OptionalTensor& cu_seqlens,
                             const Numbers& numbers) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "attnforge_native: linear attention wants [B, T, H, D]");
  LinearProblem p;
  p.dtype = dtype_of(q);
  p.rows = q.size(1);
  p.sequences = cu_seqlens ? cu_seqlens->numel() - 1 : q.size(0);
  p.cu_seqlens = data<int32_t>(cu_seqlens, ScalarType::Int);
  p.heads = q.size(2), p.value_heads = v.size(2);
  p.key_dim = q.size(3), p.value_dim = v.size(3);
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(k.size(d) == q.size(d) && (d > 1 || v.size(d) == q.size(d)),
                    "attnforge_native: shapes of q, k and v do not fit");
  }
  STD_TORCH_CHECK(p.sequences >= 0 && (!cu_seqlens || q.size(0) == 1) && p.heads > 0 &&
                      p.value_heads % p.heads == 0 && p.key_dim > 0 && p.key_dim <= kMaxDim &&
                      p.value_dim > 0 && p.value_dim <= kMaxDim,
                  "attnforge_native: sizes of a linear attention are out of range");
  p.gate_kind = gate_of(numbers.gate_kind);
  p.normalize = static_cast<LinearNorm>(numbers.normalize);
  p.scale = static_cast<float>(numbers.scale), p.eps = static_cast<float>(numbers.eps);
  p.causal = numbers.causal;
  p.gate = floats(gate, gate_size(p, q.size(0), q.size(1)));
  STD_TORCH_CHECK(p.causal || p.gate_kind == LinearGate::kNone,
                  "attnforge_native: a bidirectional call has no gate");
  STD_TORCH_CHECK(p.gate || p.gate_kind == LinearGate::kNone || q.numel() == 0,
                  "attnforge_native: the gate is missing");
  p.q = ref(q, p.dtype), p.k = ref(k, p.dtype), p.v = ref(v, p.dtype);
  return p;
}

// An output of q's dtype: its rows are written in the order of heads, 4 KiB pages apart.
TensorRef output(const Tensor& t, DType dtype) {
  advise_huge_pages(t, t.numel() * (dtype == DType::kFloat32 ? 4 : 2));
  return ref(t, dtype);
}

int64_t state_size(const LinearProblem& p) {
  return p.sequences * p.value_heads * p.key_dim * p.value_dim;
}
int64_t z_size(const LinearProblem& p) {
  return p.sequences * p.value_heads * p.key_dim;
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
