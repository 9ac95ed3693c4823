// Private CUDA operators of the delta rules and of the diagonal scan: see ops_cuda.cpp. Rows that
// no sequence covers are left as they are.
#include "bindings/cuda.h"
#include "bindings/delta.h"
#include "cuda/linear/delta_launch.h"

namespace attnforge::cuda {
namespace {

using cpu::delta_floats;
using cpu::delta_problem;
using cpu::scan_like;
using cpu::state_numel;

void check_rows(int64_t rows, const char* op) {
  STD_TORCH_CHECK(rows < (int64_t{1} << 29), "attnforge_native::", op, ": ", rows,
                  " tokens; less than 2^29 are counted");
}

// A call in chunks, whose rows are copied 16 bytes at a time.
DeltaProblem delta_chunk(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
                         const Tensor& beta, const OptionalTensor& initial_state,
                         const OptionalTensor& cu_seqlens, double scale) {
  const DeltaProblem p = delta_problem(q, k, v, g, beta, initial_state, cu_seqlens, scale);
  check_rows(p.rows, "cuda_delta_chunk");
  check_aligned(q, "q"), check_aligned(k, "k"), check_aligned(v, "v");
  if (p.channel_gates) check_aligned(*g, "g");
  STD_TORCH_CHECK(p.key_dim % 8 == 0 && p.value_dim % 8 == 0,
                  "attnforge_native::cuda_delta_chunk: head dims must be multiples of 8");
  return p;
}

void chunk_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
               const Tensor& beta, const OptionalTensor& initial_state,
               const OptionalTensor& cu_seqlens, double scale, const Tensor& out,
               const Tensor& final_state, int64_t stream) {
  DeltaChunkFwdParams params;
  DeltaProblem& p = params.problem;
  p = delta_chunk(q, k, v, g, beta, initial_state, cu_seqlens, scale);
  check_aligned(out, "out");
  params.out = ref(out, p.dtype);
  params.final_state = cpu::wanted(final_state, state_numel(p));
  check(delta_chunk_fwd(params, stream_of(stream)), "cuda_delta_chunk_fwd");
}

void chunk_bwd(const Tensor& dout, const OptionalTensor& dfinal_state, const Tensor& q,
               const Tensor& k, const Tensor& v, const OptionalTensor& g, const Tensor& beta,
               const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, double scale,
               const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dg,
               const Tensor& dbeta, const Tensor& dinitial_state, const Tensor& workspace,
               int64_t stream) {
  DeltaChunkBwdParams params;
  DeltaProblem& p = params.problem;
  p = delta_chunk(q, k, v, g, beta, initial_state, cu_seqlens, scale);
  check_aligned(dout, "dout"), check_aligned(dq, "dq"), check_aligned(dk, "dk");
  check_aligned(dv, "dv");
  params.dout = ref(dout, p.dtype);
  params.dfinal_state = delta_floats(dfinal_state, state_numel(p));
  params.dq = ref(dq, p.dtype), params.dk = ref(dk, p.dtype), params.dv = ref(dv, p.dtype);
  const int64_t tokens = q.size(0) * p.rows * p.value_heads;
  params.dg = cpu::wanted(dg, tokens * (p.channel_gates ? p.key_dim : 1));
  params.dbeta = delta_floats(dbeta, tokens);
  params.dinitial_state = cpu::wanted(dinitial_state, state_numel(p));
  const int64_t room = workspace.numel() * static_cast<int64_t>(workspace.element_size());
  const int64_t bytes = delta_chunk_bwd_workspace(params);
  STD_TORCH_CHECK(room >= bytes, "attnforge_native::cuda_delta_chunk_bwd: the workspace has ", room,
                  " bytes, not ", bytes);
  params.workspace = const_cast<void*>(workspace.const_data_ptr());
  check(delta_chunk_bwd(params, stream_of(stream)), "cuda_delta_chunk_bwd");
}

// q, k [B, 1, H, K], v [B, 1, HV, V].
void step(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& g,
          const Tensor& beta, const Tensor& states, const OptionalTensor& state_indices,
          double scale, const Tensor& out, int64_t stream) {
  DeltaStepParams params;
  DeltaProblem& p = params.problem;
  p = delta_problem(q, k, v, g, beta, std::nullopt, std::nullopt, scale);
  params.slots = states.size(0);
  params.states = delta_floats(states, params.slots * p.value_heads * p.key_dim * p.value_dim);
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(params.states) % 8 == 0,
      "attnforge_native::cuda_delta_step: the pool of states must start at a multiple of 8 "
      "bytes");
  params.state_indices = data<int32_t>(state_indices, ScalarType::Int);
  STD_TORCH_CHECK(p.rows == 1 && (!state_indices || state_indices->numel() == p.sequences),
                  "attnforge_native::cuda_delta_step: want one token and one index per sequence");
  params.out = ref(out, p.dtype);
  check(delta_step(params, stream_of(stream)), "cuda_delta_step");
}

void scan_fwd(const Tensor& x, const Tensor& g, const OptionalTensor& initial_state,
              const OptionalTensor& cu_seqlens, const Tensor& out, const Tensor& final_state,
              int64_t stream) {
  DiagScanParams params = cpu::scan_of(x, g, initial_state, cu_seqlens);
  check_rows(params.rows, "cuda_diag_scan_fwd");
  params.out = scan_like(out, x);
  params.final_state = cpu::wanted(final_state, params.sequences * params.dim);
  check(diag_scan_fwd(params, stream_of(stream)), "cuda_diag_scan_fwd");
}

void scan_bwd(const Tensor& dout, const OptionalTensor& dfinal_state, const Tensor& x,
              const Tensor& g, const OptionalTensor& initial_state,
              const OptionalTensor& cu_seqlens, const Tensor& dx, const Tensor& dg,
              const Tensor& dinitial_state, int64_t stream) {
  DiagScanParams params = cpu::scan_of(x, g, initial_state, cu_seqlens);
  check_rows(params.rows, "cuda_diag_scan_bwd");
  params.dout = scan_like(dout, x);
  params.dfinal_state = delta_floats(dfinal_state, params.sequences * params.dim);
  params.dx = scan_like(dx, x);
  params.dg = delta_floats(dg, x.numel());
  params.dinitial_state = cpu::wanted(dinitial_state, params.sequences * params.dim);
  check(diag_scan_bwd(params, stream_of(stream)), "cuda_diag_scan_bwd");
}

}  // namespace
}  // namespace attnforge::cuda

#define ATTNFORGE_OPERANDS                                                  \
  "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, Tensor? initial, " \
  "Tensor? cu_seqlens, float scale, "
#define ATTNFORGE_SCAN "Tensor x, Tensor g, Tensor? initial, Tensor? cu_seqlens, "

STABLE_TORCH_LIBRARY_FRAGMENT(ATTNFORGE_NAMESPACE, m) {
  m.def("cuda_delta_chunk_fwd(" ATTNFORGE_OPERANDS
        "Tensor(a!) out, Tensor(b!) final_state, int stream) -> ()");
  m.def("cuda_delta_chunk_bwd(Tensor dout, Tensor? dfinal_state, " ATTNFORGE_OPERANDS
        "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dg, Tensor(e!) dbeta, "
        "Tensor(f!) dinitial, Tensor(g!) workspace, int stream) -> ()");
  m.def(
      "cuda_delta_step(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta, Tensor(a!) states, "
      "Tensor? state_indices, float scale, Tensor(b!) out, int stream) -> ()");
  m.def("cuda_diag_scan_fwd(" ATTNFORGE_SCAN
        "Tensor(a!) out, Tensor(b!) final_state, int stream) -> ()");
  m.def("cuda_diag_scan_bwd(Tensor dout, Tensor? dfinal_state, " ATTNFORGE_SCAN
        "Tensor(a!) dx, Tensor(b!) dg, Tensor(c!) dinitial, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ATTNFORGE_NAMESPACE, ATTNFORGE_KEY, m) {
  m.impl("cuda_delta_chunk_fwd", TORCH_BOX(&attnforge::cuda::chunk_fwd));
  m.impl("cuda_delta_chunk_bwd", TORCH_BOX(&attnforge::cuda::chunk_bwd));
  m.impl("cuda_delta_step", TORCH_BOX(&attnforge::cuda::step));
  m.impl("cuda_diag_scan_fwd", TORCH_BOX(&attnforge::cuda::scan_fwd));
  m.impl("cuda_diag_scan_bwd", TORCH_BOX(&attnforge::cuda::scan_bwd));
}
