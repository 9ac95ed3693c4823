// What the backward of the linear family does beside its walks.
#pragma once

#include "cuda/linear/launch.h"

namespace attnforge::cuda {

// dgate[token, head] = sum over this and later tokens of the dots of dq minus those of dk, from
// <dfinal_state, final_state> at the end. dots: [2, planes, B, T, heads]; states as `state` floats.
struct GateScan {
  int64_t sequences, rows, heads, state;
  const int32_t* cu_seqlens;
  const float *gate, *dots;
  int64_t planes, plane;
  const float *dfinal_state, *final_state;
  float* dgate;
};
int linear_gate_scan(const GateScan& scan, void* stream);

// dgate = a b, elements of [B, T, heads, dim] contiguous in dgate: the start of a kSuffix. Rows
// past the end of the last sequence are left as they are, here and below.
struct GateProduct {
  DType dtype;
  int64_t batch, rows, heads, dim, sequences;
  const int32_t* cu_seqlens;
  TensorRef a, b;
  float* dgate;
};
int linear_gate_product(const GateProduct& product, void* stream);

// to[.., h, :] = sum over the heads of h's group, in order, of fp32 [B, T, heads * group, dim].
struct GroupSum {
  DType dtype;
  int64_t batch, rows, heads, group, dim, sequences;
  const int32_t* cu_seqlens;
  const float* from;
  TensorRef to;
};
int linear_group_sum(const GroupSum& sum, void* stream);

}  // namespace attnforge::cuda
