// From a list of tiles to instantiated kernels: the list is the explicit instantiation list, and a
// launch walks it for the entry that serves the call. A source is compiled once per dtype
// (ATTNFORGE_DTYPE), so that a build is parallel and an edit recompiles little.
#pragma once

#include "cuda/flash/launch.h"
#include "cuda/flash/tiles.h"
#include "cuda/launch.h"
#include "cuda/tile/attend.h"

namespace attnforge::cuda {

constexpr DType kThisDType = DType::ATTNFORGE_DTYPE;

// A kernel's one template argument: which entry of the lists it is. (nvcc cannot name a kernel
// whose argument is the tile itself.) The dtype is part of it, as sources for all dtypes meet in a
// library.
template <DType kDType, int kDims, bool kFeatures>
struct FwdCase {
  static constexpr FwdTile kTile = fwd_tile(kDType, kHeadDims[kDims], kFeatures);
};
template <DType kDType, int kDims>
struct DecodeCase {
  static constexpr FwdTile kTile = decode_tile(kDType, kHeadDims[kDims]);
};
template <DType kDType, int kDims, bool kFeatures, Gradient kGradient>
struct BwdCase {
  static constexpr BwdTile kTile = bwd_tile(kDType, kHeadDims[kDims], kFeatures, kGradient);
};

template <TeamKind kKind, int kWarps>
struct TeamOf {
  using Type = BlockTeam<kWarps>;
};
template <int kWarps>
struct TeamOf<TeamKind::kWarp, kWarps> {
  using Type = WarpTeam<kWarps>;
};
template <int kWarps>
struct TeamOf<TeamKind::kColumns, kWarps> {
  using Type = ColumnTeam<kWarps>;
};

// The store of a tile; pages have theirs in paged/instances.h.
template <FwdTile kTile, StoreKind kStore>
struct KeysOf;
template <FwdTile kTile>
struct KeysOf<kTile, StoreKind::kTensor> {
  using Type = TensorKeys<typename ElementOf<kTile.dtype>::Type, kTile.block_n, kTile.head_dim,
                          kTile.v_head_dim>;
};

// Traits of Attend for a tile of the list.
template <FwdTile kTile, class Mod_ = NoMod>
struct FwdTraits {
  using Mod = Mod_;
  using T = typename ElementOf<kTile.dtype>::Type;
  using Team = typename TeamOf<kTile.team, kTile.warps>::Type;
  using Keys = typename KeysOf<kTile, kTile.store>::Type;
  static constexpr int kDim = kTile.head_dim, kValueDim = kTile.v_head_dim;
  static constexpr bool kFeatures = kTile.features;
  static constexpr int kMTiles = kTile.m_tiles, kBlockN = kTile.block_n, kStages = kTile.stages;
  static constexpr int kThreads = 32 * kTile.warps;
};

// Calls f.template operator()<kDims>() for the pair of head dims that serves the problem.
template <int kIndex = 0, class F>
int with_head_dims(const FlashProblem& p, const F& f) {
  if constexpr (kIndex == kNumHeadDims) {
    return kNoKernel;
  } else {
    if (head_dims_of(p.head_dim, p.v_head_dim) == kIndex) {
      return f.template operator()<kIndex>();
    }
    return with_head_dims<kIndex + 1>(p, f);
  }
}

inline bool has_features(const FlashProblem& p) {
  return p.softcap > 0.0f || p.alibi_slopes != nullptr;
}

}  // namespace attnforge::cuda
