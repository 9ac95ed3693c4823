// What the bindings of CUDA operators share: checks, streams, the parts of split keys, and where
// operators are registered: the emulated twin has those of CPU tensors.
#pragma once

#include <string>

#include "bindings/tensors.h"
#include "cuda/flash/launch.h"
#include "cuda/runtime.h"

#if defined(ATTNFORGE_EMULATE)
#define ATTNFORGE_NAMESPACE attnforge_emulated
#define ATTNFORGE_KEY CPU
#else
#define ATTNFORGE_NAMESPACE attnforge_native
#define ATTNFORGE_KEY CUDA
#endif

namespace attnforge::cuda {

using cpu::data;
using cpu::dtype_of;
using cpu::empty;
using cpu::OptionalTensor;
using cpu::problem;
using cpu::ref;
using cpu::ScalarType;
using cpu::stat;
using cpu::Tensor;

inline void check(int error, const char* op) {
  STD_TORCH_CHECK(error != kNoKernel, "attnforge_native::", op,
                  ": no kernel has room for the head dims");
  STD_TORCH_CHECK(error == 0, "attnforge_native::", op, ": ", error_text(error));
}

inline void* stream_of(int64_t handle) {
  return reinterpret_cast<void*>(static_cast<intptr_t>(handle));
}

// 16-byte copies: every row has to start at a multiple of 16 bytes.
inline void check_aligned(const Tensor& t, const char* name) {
  const int64_t item = t.element_size();
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < t.dim(); ++d)
    aligned &= t.size(d) <= 1 || t.stride(d) * item % 16 == 0;
  STD_TORCH_CHECK(aligned || t.numel() == 0, "attnforge_native: rows of ", name,
                  " must start at multiples of 16 bytes");
}

// Contiguous fp32 [splits, B, rows, Hq, Dv] and [splits, B, Hq, rows], B 1 for packed rows.
inline void set_parts(SplitParams& splits, const Tensor& parts, const Tensor& lses,
                      const FlashProblem& p) {
  const int64_t batch = parts.size(1), rows = parts.size(2), row = p.heads_q * p.v_head_dim;
  splits.out = {const_cast<float*>(data<float>(parts, ScalarType::Float)),
                batch > 1 ? rows * row : 0, row, p.v_head_dim};
  splits.lse = {const_cast<float*>(data<float>(lses, ScalarType::Float)),
                batch > 1 ? p.heads_q * rows : 0, rows};
  splits.out_stride = batch * rows * row;
  splits.lse_stride = batch * p.heads_q * rows;
}

}  // namespace attnforge::cuda
