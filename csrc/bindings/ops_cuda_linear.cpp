// Private CUDA operators of the linear family: see ops_cuda.cpp. Rows that no sequence covers are
// left as they are.
#include "bindings/cuda.h"
#include "bindings/linear.h"
#include "cuda/linear/launch.h"

namespace attnforge::cuda {
namespace {

// q, k, v, gate and states of a call without a denominator.
LinearProblem problem_of(const Tensor& q, const Tensor& k, const Tensor& v,
                         const OptionalTensor& gate, const OptionalTensor& initial_state,
                         const OptionalTensor& cu_seqlens, int64_t gate_kind, double scale) {
  LinearProblem p =
      cpu::linear_problem(q, k, v, gate, cu_seqlens, {gate_kind, 0, scale, 0.0, true});
  p.initial_state = cpu::floats(initial_state, cpu::state_size(p));
  check_aligned(q, "q"), check_aligned(k, "k"), check_aligned(v, "v");
  const bool channels = p.gate_kind == LinearGate::kKey || p.gate_kind == LinearGate::kValue;
  if (channels && p.gate != nullptr) check_aligned(*gate, "the gate");
  STD_TORCH_CHECK(p.key_dim % 8 == 0 && p.value_dim % 8 == 0 && p.rows < (int64_t{1} << 29),
                  "attnforge_native: head dims of CUDA's linear kernels must be multiples of 8, "
                  "and sequences shorter than 2^29");
  return p;
}

void chunk_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& gate,
               const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
               const Tensor& out, const Tensor& final_state, int64_t gate_kind, double scale,
               int64_t stream) {
  LinearFwdParams params;
  LinearProblem& p = params.problem;
  p = problem_of(q, k, v, gate, initial_state, cu_seqlens, gate_kind, scale);
  check_aligned(out, "out");
  params.out = ref(out, p.dtype);
  params.final_state = cpu::floats(final_state, cpu::state_size(p));
  check(linear_chunk_fwd(params, stream_of(stream)), "cuda_linear_chunk_fwd");
}

void chunk_bwd(const Tensor& dout, const OptionalTensor& dfinal_state, const Tensor& q,
               const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& final_state,
               const OptionalTensor& gate, const OptionalTensor& initial_state,
               const OptionalTensor& cu_seqlens, const Tensor& dq, const Tensor& dk,
               const Tensor& dv, const Tensor& dgate, const Tensor& dinitial_state,
               const Tensor& workspace, int64_t gate_kind, double scale, int64_t stream) {
  LinearBwdParams params;
  LinearProblem& p = params.problem;
  p = problem_of(q, k, v, gate, initial_state, cu_seqlens, gate_kind, scale);
  const int64_t states = cpu::state_size(p);
  check_aligned(dout, "dout"), check_aligned(dq, "dq"), check_aligned(dk, "dk");
  check_aligned(dv, "dv");
  params.dout = ref(dout, p.dtype), params.out = ref(out, p.dtype);
  params.dfinal_state = cpu::floats(dfinal_state, states);
  params.final_state = cpu::floats(final_state, states);
  params.dq = ref(dq, p.dtype), params.dk = ref(dk, p.dtype), params.dv = ref(dv, p.dtype);
  if (p.gate_kind != LinearGate::kNone && p.gate_kind != LinearGate::kHead)
    params.dgate = cpu::floats(dgate, cpu::gate_size(p, q.size(0), p.rows));
  params.dinitial_state = cpu::floats(dinitial_state, states);
  STD_TORCH_CHECK(params.dgate == nullptr || params.dfinal_state == nullptr || params.final_state,
                  "attnforge_native::cuda_linear_chunk_bwd: the gradient of a gate wants the final "
                  "state beside its gradient");
  const int64_t room = workspace.numel() * static_cast<int64_t>(workspace.element_size());
  const int64_t bytes = linear_chunk_bwd_workspace(params);
  STD_TORCH_CHECK(room >= bytes, "attnforge_native::cuda_linear_chunk_bwd: the workspace has ",
                  room, " bytes, not ", bytes);
  params.workspace = const_cast<void*>(workspace.const_data_ptr());
  check(linear_chunk_bwd(params, stream_of(stream)), "cuda_linear_chunk_bwd");
}

// q, k [B, 1, H, K], v [B, 1, HV, V].
void step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& states,
          const OptionalTensor& gate, const OptionalTensor& state_indices, const Tensor& out,
          int64_t gate_kind, double scale, int64_t stream) {
  LinearStepParams params;
  LinearProblem& p = params.problem;
  p = cpu::linear_problem(q, k, v, gate, std::nullopt, {gate_kind, 0, scale, 0.0, true});
  STD_TORCH_CHECK(states.dim() == 4 && p.rows == 1 && p.value_dim % 2 == 0,
                  "attnforge_native::cuda_linear_step: want a pool of states, one token, and an "
                  "even number of values");
  params.slots = states.size(0);
  params.states = cpu::floats(states, params.slots * p.value_heads * p.key_dim * p.value_dim);
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(params.states) % 8 == 0,
      "attnforge_native::cuda_linear_step: the pool of states must start at a multiple of 8 "
      "bytes");
  params.state_indices = data<int32_t>(state_indices, ScalarType::Int);
  STD_TORCH_CHECK(!state_indices || state_indices->numel() == p.sequences,
                  "attnforge_native::cuda_linear_step: state_indices must have one entry per row");
  params.out = ref(out, p.dtype);
  check(linear_step(params, stream_of(stream)), "cuda_linear_step");
}

}  // namespace
}  // namespace attnforge::cuda

#define ATTNFORGE_GIVEN "Tensor? gate, Tensor? initial_state, Tensor? cu_seqlens, "
#define ATTNFORGE_NUMBERS "int gate_kind, float scale, int stream"

STABLE_TORCH_LIBRARY_FRAGMENT(ATTNFORGE_NAMESPACE, m) {
  m.def("cuda_linear_chunk_fwd(Tensor q, Tensor k, Tensor v, " ATTNFORGE_GIVEN
        "Tensor(a!) out, Tensor(b!) final_state, " ATTNFORGE_NUMBERS ") -> ()");
  m.def(
      "cuda_linear_chunk_bwd(Tensor dout, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor final_state, " ATTNFORGE_GIVEN
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dgate, Tensor(e!) dinitial_state, "
      "Tensor(f!) workspace, " ATTNFORGE_NUMBERS ") -> ()");
  m.def(
      "cuda_linear_step(Tensor q, Tensor k, Tensor v, Tensor(a!) states, Tensor? gate, "
      "Tensor? state_indices, Tensor(b!) out, " ATTNFORGE_NUMBERS ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ATTNFORGE_NAMESPACE, ATTNFORGE_KEY, m) {
  m.impl("cuda_linear_chunk_fwd", TORCH_BOX(&attnforge::cuda::chunk_fwd));
  m.impl("cuda_linear_chunk_bwd", TORCH_BOX(&attnforge::cuda::chunk_bwd));
  m.impl("cuda_linear_step", TORCH_BOX(&attnforge::cuda::step));
}
