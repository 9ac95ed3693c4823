// Launchers of the delta rules and of the diagonal scan, for GPUs from sm_80 on: as launch.h.
#pragma once

#include "attnforge/delta.h"
#include "cuda/flash/launch.h"

namespace attnforge::cuda {

// Gates per head or none; head dims up to 128.
template <DType kDType>
int delta_chunk_fwd(const DeltaChunkFwdParams& params, void* stream);
template <>
int delta_chunk_fwd<DType::kFloat32>(const DeltaChunkFwdParams&, void*);
template <>
int delta_chunk_fwd<DType::kFloat16>(const DeltaChunkFwdParams&, void*);
template <>
int delta_chunk_fwd<DType::kBFloat16>(const DeltaChunkFwdParams&, void*);

// Gates of either kind; keys up to 128.
int delta_step(const DeltaStepParams& params, void* stream);

// params.dg holds the states of the forward in between.
int diag_scan_fwd(const DiagScanParams& params, void* stream);
int diag_scan_bwd(const DiagScanParams& params, void* stream);

}  // namespace attnforge::cuda
