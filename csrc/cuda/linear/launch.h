// Launchers of the linear family's additive part, for GPUs from sm_80 on. They launch on the
// current device, allocate nothing, wait for nothing and may be captured into a graph. They return
// a cudaError_t as int, or kNoKernel.
#pragma once

#include "attnforge/linear.h"
#include "cuda/flash/launch.h"

namespace attnforge::cuda {

// A tensor that value head h reads or writes at head h / group.
struct WalkTensor {
  TensorRef t;
  int32_t group = 1;
};

// What a walk leaves for the gradient of gates, with out and another tensor `beside` it:
// kDots     dots[plane, token, head] = sum over a warp's 16 columns of beside out
// kProduct  gates[token, head, column] = beside out
// kPlus     gates += beside out
// kMinus    gates -= beside out
// kSuffix   gates <- sum over this and later tokens of (gates - beside out), from the end of the
//           sequence, where it is sum over the state's channels of initial other
enum class WalkExtra : int32_t { kNone = 0, kDots, kProduct, kPlus, kMinus, kSuffix };

// The recurrence with its roles free. S [dim, columns] in fp32, tokens from the first one on, or
// from the last one:
//
//   S <- decay S + write z y^T (as [columns, dim]);   out = read S x
//
// In reverse the decay before a token is that of the token after it, the last token's own is
// applied at the end.
struct LinearWalk {
  DType dtype = DType::kFloat32;
  int64_t sequences = 0, rows = 0;  // as in LinearProblem
  const int32_t* cu_seqlens = nullptr;
  int64_t heads = 0;  // value heads
  int64_t dim = 0, columns = 0;
  bool reverse = false;
  bool strict = false;                  // read before its own token is written
  bool wide = false;                    // x and y are fp32, whatever the dtype
  LinearGate kind = LinearGate::kNone;  // where gates lie in memory
  bool gate_columns = false;            // of gates of channels: which side of this walk's state
  const float* gate = nullptr;
  float read = 1.0f, write = 1.0f;
  WalkTensor x, y, z, out;
  // Contiguous [B, T, heads, columns]: what is added to out in the end; where it goes instead.
  const float* plus = nullptr;
  float* out32 = nullptr;
  // States [sequences, heads, ..] with these strides, and `state` elements apart; null is zero.
  const float* initial = nullptr;
  float* final = nullptr;
  int64_t state = 0, dim_stride = 0, column_stride = 0;
  WalkExtra extra = WalkExtra::kNone;
  WalkTensor beside;
  const float* other = nullptr;  // like initial
  float *dots = nullptr, *gates = nullptr;
  int64_t plane = 0;  // elements from one plane of dots to the next
};

template <DType kDType>
int linear_walk(const LinearWalk& walk, void* stream);
template <>
int linear_walk<DType::kFloat32>(const LinearWalk&, void*);
template <>
int linear_walk<DType::kFloat16>(const LinearWalk&, void*);
template <>
int linear_walk<DType::kBFloat16>(const LinearWalk&, void*);

int linear_chunk_fwd(const LinearFwdParams& params, void* stream);

// Bytes of params.workspace, a multiple of 16.
int64_t linear_chunk_bwd_workspace(const LinearBwdParams& params);
int linear_chunk_bwd(const LinearBwdParams& params, void* stream);

int linear_step(const LinearStepParams& params, void* stream);

}  // namespace attnforge::cuda
