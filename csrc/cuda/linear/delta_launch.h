// Launchers of the delta rules and of the diagonal scan, for GPUs from sm_80 on: as launch.h.
#pragma once

#include "attnforge/delta.h"
#include "cuda/flash/launch.h"

namespace attnforge::cuda {

// One of the two walks of a delta rule whose triangular systems have to be solved.
//
//   forward  o, or where `errors` is given, what each state lacks of its token's value:
//            errors = v - S~^T k
//   reverse  dv = beta dwrite, with dwrite = dS^T k and dS the gradient of the state that token
//            leaves. Of its errors it takes dbeta = <dwrite, error>, a part per 16 columns, and
//            leaves in their place what was written, beta error.
struct DeltaWalk {
  DeltaProblem problem;  // initial_state: of this walk, a gradient in reverse
  bool reverse = false;
  TensorRef out;
  float* final_state = nullptr;
  float* errors = nullptr;  // as all floats below contiguous [B, T, value_heads, V]
  // Reverse:
  TensorRef dout;
  float* dvalues = nullptr;      // dv
  float* dout32 = nullptr;       // dout, or null
  float* dbeta_parts = nullptr;  // [B, T, value_heads, parts]
  int64_t parts = 0;             // four for every 64 values
};

template <DType kDType>
int delta_walk(const DeltaWalk& walk, void* stream);
template <>
int delta_walk<DType::kFloat32>(const DeltaWalk&, void*);
template <>
int delta_walk<DType::kFloat16>(const DeltaWalk&, void*);
template <>
int delta_walk<DType::kBFloat16>(const DeltaWalk&, void*);

// Gates of either kind; head dims up to 128.
int delta_chunk_fwd(const DeltaChunkFwdParams& params, void* stream);

// Bytes of params.workspace, a multiple of 16.
int64_t delta_chunk_bwd_workspace(const DeltaChunkBwdParams& params);
int delta_chunk_bwd(const DeltaChunkBwdParams& params, void* stream);

// Gates of either kind; keys up to 128.
int delta_step(const DeltaStepParams& params, void* stream);

// params.dg holds the states of the forward in between.
int diag_scan_fwd(const DiagScanParams& params, void* stream);
int diag_scan_bwd(const DiagScanParams& params, void* stream);

}  // namespace attnforge::cuda
