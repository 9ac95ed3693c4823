// The operators of the additive recurrence as walks (launch.h). Every gradient is a walk with its
// roles exchanged, so the backward keeps no state of the forward and writes none:
//
//             x    y    z    out   gates of keys act on   order
//   forward   q    k    v    o     x and y                forward
//   dq        dO   v    k    dq    columns                forward
//   dk        v    dO   q    dk    columns                reverse
//   dv        k    q    dO   dv    x and y                reverse
//
// Gates of values act on the other side of each. The reverse walks begin at dfinal_state and end at
// dinitial_state. A gate's gradient is the sum over its and later tokens of q dq - k dk, or of
// o dO - v dv for gates of values: of channels it is taken in the reverse walk itself.
#include <initializer_list>

#include "cuda/linear/gates.h"

namespace attnforge::cuda {

namespace {

LinearWalk walk_of(const LinearProblem& p) {
  LinearWalk w;
  w.dtype = p.dtype;
  w.sequences = p.sequences, w.rows = p.rows, w.cu_seqlens = p.cu_seqlens;
  w.heads = p.value_heads;
  w.kind = p.gate_kind, w.gate = p.gate;
  w.state = p.key_dim * p.value_dim;
  return w;
}

// The state as it lies, [K, V]: keys are read and values are columns; or the other way round.
void read_keys(LinearWalk& w, const LinearProblem& p) {
  w.dim = p.key_dim, w.columns = p.value_dim;
  w.dim_stride = p.value_dim, w.column_stride = 1;
  w.gate_columns = p.gate_kind == LinearGate::kValue;
}
void read_values(LinearWalk& w, const LinearProblem& p) {
  w.dim = p.value_dim, w.columns = p.key_dim;
  w.dim_stride = 1, w.column_stride = p.value_dim;
  w.gate_columns = p.gate_kind == LinearGate::kKey;
}

int64_t batch_of(const LinearProblem& p) {
  return p.cu_seqlens != nullptr ? 1 : p.sequences;
}
int64_t group_of(const LinearProblem& p) {
  return p.value_heads / p.heads;
}
int64_t token_heads(const LinearProblem& p) {
  return batch_of(p) * p.rows * p.value_heads;
}
// Planes of dots: one per warp of a walk over keys' columns.
int64_t planes_of(const LinearProblem& p) {
  return (p.key_dim + 63) / 64 * 4;
}
bool has_dots(const LinearBwdParams& params) {
  return params.dgate != nullptr && params.problem.gate_kind == LinearGate::kScalar;
}
// Floats of dq and dk by value head, rounded up to 16 bytes.
int64_t grouped_floats(const LinearProblem& p) {
  return group_of(p) == 1 ? 0 : (token_heads(p) * p.key_dim + 3) / 4 * 4;
}

}  // namespace

int linear_chunk_fwd(const LinearFwdParams& params, void* stream) {
  const LinearProblem& p = params.problem;
  if (p.normalize != LinearNorm::kNone || !p.causal) return kNoKernel;
  const auto group = static_cast<int32_t>(group_of(p));
  LinearWalk w = walk_of(p);
  read_keys(w, p);
  w.x = {p.q, group}, w.y = {p.k, group}, w.z = {p.v}, w.out = {params.out};
  w.read = p.scale;
  w.initial = p.initial_state, w.final = params.final_state;
  return with_dtype(p.dtype, [&]<DType kDType>() { return linear_walk<kDType>(w, stream); });
}

int64_t linear_chunk_bwd_workspace(const LinearBwdParams& params) {
  const LinearProblem& p = params.problem;
  const int64_t dots = has_dots(params) ? 2 * planes_of(p) * token_heads(p) : 0;
  return 4 * (2 * grouped_floats(p) + (dots + 3) / 4 * 4);
}

int linear_chunk_bwd(const LinearBwdParams& params, void* stream) {
  const LinearProblem& p = params.problem;
  if (p.normalize != LinearNorm::kNone || !p.causal) return kNoKernel;
  const int64_t group = group_of(p), plane = token_heads(p);
  const auto shared = static_cast<int32_t>(group);
  float* by_head[2] = {static_cast<float*>(params.workspace), nullptr};  // dq, dk
  by_head[1] = by_head[0] + grouped_floats(p);
  float* dots = by_head[1] + grouped_floats(p);
  const bool of_keys = params.dgate != nullptr && p.gate_kind == LinearGate::kKey;
  const bool of_values = params.dgate != nullptr && p.gate_kind == LinearGate::kValue;

  LinearWalk dq = walk_of(p);
  read_values(dq, p);
  dq.read = p.scale;
  dq.x = {params.dout}, dq.y = {p.v}, dq.z = {p.k, shared}, dq.out = {params.dq};
  dq.initial = p.initial_state;
  dq.beside = {p.q, shared};

  LinearWalk dk = walk_of(p);
  read_values(dk, p);
  dk.reverse = true, dk.write = p.scale;
  dk.x = {p.v}, dk.y = {params.dout}, dk.z = {p.q, shared}, dk.out = {params.dk};
  dk.initial = params.dfinal_state, dk.other = params.final_state;
  dk.beside = {p.k, shared};

  LinearWalk dv = walk_of(p);
  read_keys(dv, p);
  dv.reverse = true, dv.write = p.scale;
  dv.x = {p.k, shared}, dv.y = {p.q, shared}, dv.z = {params.dout}, dv.out = {params.dv};
  dv.initial = params.dfinal_state, dv.final = params.dinitial_state, dv.other = params.final_state;
  dv.beside = {p.v};

  if (group > 1) dq.out32 = by_head[0], dk.out32 = by_head[1];
  if (has_dots(params)) {
    dq.extra = dk.extra = WalkExtra::kDots;
    dq.plane = dk.plane = plane;
    dq.dots = dots, dk.dots = dots + planes_of(p) * plane;
  }
  if (of_keys) {
    dq.extra = WalkExtra::kProduct, dk.extra = WalkExtra::kSuffix;
    dq.gates = dk.gates = params.dgate;
  }
  if (of_values) {
    dv.extra = WalkExtra::kSuffix, dv.gates = params.dgate;
    const int error =
        linear_gate_product({p.dtype, batch_of(p), p.rows, p.value_heads, p.value_dim, p.sequences,
                             p.cu_seqlens, params.out, params.dout, params.dgate},
                            stream);
    if (error != 0) return error;
  }

  for (const LinearWalk* walk : {&dq, &dk, &dv}) {
    const int error =
        with_dtype(p.dtype, [&]<DType kDType>() { return linear_walk<kDType>(*walk, stream); });
    if (error != 0) return error;
  }
  if (group > 1) {
    for (int i = 0; i < 2; ++i) {
      const int error =
          linear_group_sum({p.dtype, batch_of(p), p.rows, p.heads, group, p.key_dim, p.sequences,
                            p.cu_seqlens, by_head[i], i == 0 ? params.dq : params.dk},
                           stream);
      if (error != 0) return error;
    }
  }
  if (!has_dots(params)) return 0;
  return linear_gate_scan(
      {p.sequences, p.rows, p.value_heads, p.key_dim * p.value_dim, p.cu_seqlens, p.gate, dots,
       planes_of(p), plane, params.dfinal_state, params.final_state, params.dgate},
      stream);
}

}  // namespace attnforge::cuda
