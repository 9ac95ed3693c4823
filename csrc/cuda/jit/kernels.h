// The kernels that are compiled at run time, by NVRTC on a user's machine: the forward and the
// decode of flash/ with scores or masks of the user's own, or for head dims that no library was
// built for, and the merge of split keys.
//
// The source around this header is written by attnforge/backends/jit/_source.py: the user's
// functions, a struct Mod that calls them (tile/mods.h), and a Case, which says what is compiled.
// A kernel takes one struct, Case::Call, whose layout that source checks against its Python twin.
// How it is launched stands in its template arguments, and so in its name: what one block does
// (rows of a tile, or of a merge), its threads, and its bytes of shared memory.
#pragma once

#include "cuda/flash/decode_kernel.h"
#include "cuda/flash/fwd_kernel.h"
#include "cuda/flash/merge_kernel.h"

namespace attnforge::cuda::jit {

// A tensor of the user's, indexed by one number per dimension. 16-bit floats are read as float.
template <class T, int kRank>
struct View {
  const T* data;
  int64_t stride[kRank];  // elements

  template <class... Index>
  AF_DEVICE auto operator()(Index... index) const {
    static_assert(sizeof...(Index) == kRank, "want one index per dimension of the tensor");
    int64_t at = 0;
    int d = 0;
    ((at += static_cast<int64_t>(index) * stride[d++]), ...);
    if constexpr (kSame<T, Half> || kSame<T, BFloat16>) {
      return widen(data[at]);
    } else {
      return data[at];
    }
  }
};

// The tile of a kernel. A mod's registers ask for the smaller tiles of the features.
constexpr FwdTile tile_of(bool decode, DType dtype, HeadDims dims, bool features, bool mod) {
  FwdTile tile = decode ? decode_tile(dtype, dims) : fwd_tile(dtype, dims, features || mod);
  tile.features = features;
  return tile;
}

// A forward or decode of query rows.
template <bool kDecode_, FwdTile kTile_, class Mod_>
struct RowCase {
  static constexpr FwdTile kTile = kTile_;
  using Mod = Mod_;
  using Walk = typename RowKernel<kTile, Mod>::Walk;
  static constexpr int kRows = Walk::kRows, kThreads = 32 * kTile.warps;
  static constexpr int kShared = Walk::kSharedBytes;

  struct Call {
    FlashFwdParams params;
    SplitParams splits;
    RowGrid grid;
    Mod mod;
  };

  AF_DEVICE static void run(const Call& call) {
    const TensorStore store = {call.params};
    if constexpr (kDecode_) {
      run_decode<kTile>(call.params, call.splits, call.grid, store, call.mod);
    } else {
      run_forward<kTile>(call.params, call.splits, call.grid, store, call.mod);
    }
  }
};

// The merge of splits: fp32 parts.
template <class T>
struct MergeCase {
  static constexpr int kRows = kMergeRows, kThreads = 32 * kMergeRows, kShared = 0;

  struct Call {
    MergeParams params;
  };

  AF_DEVICE static void run(const Call& call) { merge_rows<float, T>(call.params, false); }
};

template <class Case, int kRows, int kThreads, int kShared>
__global__ void __launch_bounds__(kThreads)
    kernel(const __grid_constant__ typename Case::Call call) {
  Case::run(call);
}

}  // namespace attnforge::cuda::jit
