// The operators of the delta rules as walks. A forward is one (delta.cu). A backward is two of a
// delta rule and four of the additive recurrence, since with w = beta e and dv = beta dwrite known
// a delta rule is additive: S takes w k^T, and dS takes dO q^T and gives up dv k^T.
//
//                x    y    z    out    gates of channels act on   order     own token
//   dq           dO   w    k    dq     columns                    forward   read
//   dk, erased   dv   w    k    -dk    columns                    forward   not yet
//   dk, erased   w    dv   k    -dk    columns                    reverse   not yet
//   dk, written  w    dO   q    dk     columns                    reverse   read
//
// So the backward keeps no state, writes none but the last one, and every sum has one order. dk is
// summed up from walk to walk in fp32, and so are gradients of gates: the sum over their and later
// tokens of q dq + k dk_1 - k (dk_2 + dk_3), from <dfinal_state, final_state> at the end.
//
// workspace, floats per token and value head: 2 V (w and dv) and V (dO of 16-bit calls), K (dk), K
// (dq of grouped heads), a part of dbeta per 16 values, four dots of a scalar gate per 16 keys.
#include <initializer_list>

#include "cuda/linear/delta_launch.h"
#include "cuda/linear/gates.h"

namespace attnforge::cuda {

namespace {

int64_t batch_of(const DeltaProblem& p) {
  return p.cu_seqlens != nullptr ? 1 : p.sequences;
}
int64_t token_heads(const DeltaProblem& p) {
  return batch_of(p) * p.rows * p.value_heads;
}
int64_t group_of(const DeltaProblem& p) {
  return p.value_heads / p.heads;
}
// Warps of a walk over so many columns: each leaves a sum over its own.
int64_t warps_of(int64_t columns) {
  return (columns + 63) / 64 * 4;
}

// Floats of a workspace, one part after the other, each from a multiple of 16 bytes on.
struct Parts {
  float *writes, *dvalues, *dout, *dq, *dk, *dbeta, *dots, *final_state;
  int64_t used = 0;

  static Parts of(const DeltaChunkBwdParams& params, float* base) {
    const DeltaProblem& p = params.problem;
    const int64_t rows = token_heads(p), values = rows * p.value_dim, keys = rows * p.key_dim;
    const bool scalar = params.dg != nullptr && !p.channel_gates;
    Parts parts;
    const auto take = [&](int64_t floats) {
      float* at = base == nullptr || floats == 0 ? nullptr : base + parts.used;
      parts.used += (floats + 3) / 4 * 4;
      return at;
    };
    parts.writes = take(values), parts.dvalues = take(values);
    parts.dout = take(p.dtype == DType::kFloat32 ? 0 : values);
    parts.dk = take(keys), parts.dq = take(group_of(p) > 1 ? keys : 0);
    parts.dbeta = take(rows * warps_of(p.value_dim));
    parts.dots = take(scalar ? 4 * warps_of(p.key_dim) * rows : 0);
    const bool final_state = params.dg != nullptr && params.dfinal_state != nullptr;
    parts.final_state =
        take(final_state ? p.sequences * p.value_heads * p.key_dim * p.value_dim : 0);
    return parts;
  }
};

int walk_delta(const DeltaWalk& walk, void* stream) {
  return with_dtype(walk.problem.dtype,
                    [&]<DType kDType>() { return delta_walk<kDType>(walk, stream); });
}

// [B, T, heads, dim] of floats in one piece.
WalkTensor contiguous(const DeltaProblem& p, float* data, int64_t heads, int64_t dim) {
  return {{data, p.rows * heads * dim, heads * dim, dim}};
}

// Values are read, keys are columns.
LinearWalk additive(const DeltaProblem& p) {
  LinearWalk w;
  w.dtype = p.dtype, w.wide = true;
  w.sequences = p.sequences, w.rows = p.rows, w.cu_seqlens = p.cu_seqlens;
  w.heads = p.value_heads;
  w.dim = p.value_dim, w.columns = p.key_dim;
  w.dim_stride = 1, w.column_stride = p.value_dim;
  w.kind = p.g == nullptr    ? LinearGate::kNone
           : p.channel_gates ? LinearGate::kKey
                             : LinearGate::kScalar;
  w.gate = p.g, w.gate_columns = p.channel_gates;
  w.state = p.key_dim * p.value_dim;
  return w;
}

}  // namespace

int delta_chunk_fwd(const DeltaChunkFwdParams& params, void* stream) {
  DeltaWalk walk;
  walk.problem = params.problem;
  walk.out = params.out, walk.final_state = params.final_state;
  return walk_delta(walk, stream);
}

int64_t delta_chunk_bwd_workspace(const DeltaChunkBwdParams& params) {
  return 4 * Parts::of(params, nullptr).used;
}

int delta_chunk_bwd(const DeltaChunkBwdParams& params, void* stream) {
  const DeltaProblem& p = params.problem;
  const Parts parts = Parts::of(params, static_cast<float*>(params.workspace));
  const int64_t group = group_of(p), rows = token_heads(p);

  DeltaWalk errors;
  errors.problem = p;
  errors.errors = parts.writes, errors.final_state = parts.final_state;
  if (const int error = walk_delta(errors, stream)) return error;

  DeltaWalk back = errors;
  back.problem.initial_state = params.dfinal_state;
  back.reverse = true;
  back.final_state = params.dinitial_state;
  back.dout = params.dout, back.out = params.dv;
  back.dvalues = parts.dvalues, back.dout32 = parts.dout, back.dbeta_parts = parts.dbeta;
  back.parts = warps_of(p.value_dim);
  if (const int error = walk_delta(back, stream)) return error;

  const auto shared = static_cast<int32_t>(group);
  const WalkTensor q = {p.q, shared}, k = {p.k, shared};
  const WalkTensor w = contiguous(p, parts.writes, p.value_heads, p.value_dim);
  const WalkTensor dv = contiguous(p, parts.dvalues, p.value_heads, p.value_dim);
  const WalkTensor dout = parts.dout == nullptr
                              ? WalkTensor{params.dout}
                              : contiguous(p, parts.dout, p.value_heads, p.value_dim);

  LinearWalk dq = additive(p);
  dq.initial = p.initial_state;
  LinearWalk erased = dq, erased_later = additive(p);
  dq.x = dout, dq.y = w, dq.z = k, dq.read = p.scale;
  dq.out = {params.dq}, dq.out32 = parts.dq;
  dq.beside = q;

  erased.strict = true, erased.read = -1.0f;
  erased.x = dv, erased.y = w, erased.z = k;
  erased.out32 = parts.dk;
  erased.beside = k;

  erased_later.reverse = erased_later.strict = true, erased_later.write = -1.0f;
  erased_later.x = w, erased_later.y = dv, erased_later.z = k;
  erased_later.plus = erased_later.out32 = parts.dk;
  erased_later.beside = k;

  LinearWalk written = additive(p);
  written.reverse = true, written.write = p.scale;
  written.x = w, written.y = dout, written.z = q;
  written.plus = parts.dk, written.out = {params.dk};
  if (group > 1) written.out32 = parts.dk;
  written.initial = params.dfinal_state, written.other = parts.final_state;
  written.beside = k;

  LinearWalk* const walks[] = {&dq, &erased, &erased_later, &written};
  if (params.dg != nullptr) {
    constexpr WalkExtra kOfChannels[] = {WalkExtra::kProduct, WalkExtra::kPlus, WalkExtra::kMinus,
                                         WalkExtra::kSuffix};
    for (int i = 0; i < 4; ++i) {
      walks[i]->extra = p.channel_gates ? kOfChannels[i] : WalkExtra::kDots;
      walks[i]->gates = params.dg;
      walks[i]->dots = parts.dots + i * warps_of(p.key_dim) * rows, walks[i]->plane = rows;
    }
  }
  for (const LinearWalk* walk : walks) {
    const int error =
        with_dtype(p.dtype, [&]<DType kDType>() { return linear_walk<kDType>(*walk, stream); });
    if (error != 0) return error;
  }

  const auto sum = [&](DType dtype, int64_t heads, int64_t of, int64_t dim, const float* from,
                       const TensorRef& to) {
    return linear_group_sum(
        {dtype, batch_of(p), p.rows, heads, of, dim, p.sequences, p.cu_seqlens, from, to}, stream);
  };
  if (group > 1) {
    if (const int error = sum(p.dtype, p.heads, group, p.key_dim, parts.dq, params.dq)) {
      return error;
    }
    if (const int error = sum(p.dtype, p.heads, group, p.key_dim, parts.dk, params.dk)) {
      return error;
    }
  }
  const WalkTensor dbeta = contiguous(p, params.dbeta, p.value_heads, 1);
  if (const int error =
          sum(DType::kFloat32, p.value_heads, warps_of(p.value_dim), 1, parts.dbeta, dbeta.t)) {
    return error;
  }
  if (params.dg == nullptr || p.channel_gates) return 0;
  return linear_gate_scan(
      {p.sequences, p.rows, p.value_heads, p.key_dim * p.value_dim, p.cu_seqlens, p.g, parts.dots,
       2 * warps_of(p.key_dim), rows, params.dfinal_state, parts.final_state, params.dg},
      stream);
}

}  // namespace attnforge::cuda
