// Launchers of the retrieval kernels of the sm_80 class: as those of flash (flash/launch.h).
#pragma once

#include "attnforge/retrieval.h"
#include "cuda/flash/launch.h"

namespace attnforge::cuda {

// Defined once per dtype. splits.keys: entries of a split, a multiple of every key tile; a list
// that is longer than splits.splits of those has longer ones.
template <DType kDType>
int indexed_fwd(const IndexedFwdParams& params, const SplitParams& splits, void* stream);

template <>
int indexed_fwd<DType::kFloat32>(const IndexedFwdParams&, const SplitParams&, void*);
template <>
int indexed_fwd<DType::kFloat16>(const IndexedFwdParams&, const SplitParams&, void*);
template <>
int indexed_fwd<DType::kBFloat16>(const IndexedFwdParams&, const SplitParams&, void*);

}  // namespace attnforge::cuda
