// Flash attention, forward, for the sm_80 class (mma.sync, cp.async): FlashAttention-2 order (Dao,
// 2023), online softmax in base 2.
//
//   block      a tile of query rows of one head, or of all heads of a KV head's group where
//   sequences
//              are short or keys are split; walks the keys its rows see (tile/attend.h)
//   grid       split, tile, head, batch from fastest to slowest: tiles of one head are neighbours
//   and
//              find K and V in L2; late ones, which see most keys under a causal mask, go first
//   registers  O and S stay in accumulators; P goes to the second product without shared memory
//   flops      2 (D + Dv) per visible pair; head dims are padded to the next tile
//   bytes      Q, O once; K, V ceil(rows / tile) times, from L2 mostly
//   splits     write fp32 states, which merge.cu adds up; the sink belongs to the first split
//
// A row's result depends on its own Q and its own keys only. Numerics: fp32 sums and statistics;
// P is rounded to 16 bits for the second product. Limits: head dims up to 256, multiples of 8.
#include "cuda/flash/fwd_kernel.h"

namespace attnforge::cuda {

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    flash_fwd_kernel(const __grid_constant__ FlashFwdParams params,
                     const __grid_constant__ SplitParams splits,
                     const __grid_constant__ RowGrid grid) {
  run_forward<Case::kTile>(params, splits, grid, TensorStore{params});
}

template <>
int flash_fwd_rows<kThisDType>(const FlashFwdParams& params, const SplitParams& splits, bool packed,
                               void* stream) {
  const FlashProblem& p = params.problem;
  return with_head_dims(p, [&]<int kDims>() {
    const auto launch = [&]<bool kFeatures>() {
      using Case = FwdCase<kThisDType, kDims, kFeatures>;
      using Walk = typename RowKernel<Case::kTile>::Walk;
      // Rows of short sequences share tiles with the other heads of their group.
      const bool pack = packed || p.seqlen_q <= Walk::kRows / 2;
      const int group = static_cast<int>(p.heads_q / p.heads_k);
      const RowGrid grid = RowGrid::of(p, Walk::kRows, pack ? group : 1, splits.splits);
      if (grid.blocks() == 0) return 0;
      return ATTNFORGE_LAUNCH((flash_fwd_kernel<Case>), dim3(grid.blocks()),
                              dim3(32 * Case::kTile.warps), Walk::kSharedBytes, stream, params,
                              splits, grid);
    };
    return has_features(p) ? launch.template operator()<true>()
                           : launch.template operator()<false>();
  });
}

}  // namespace attnforge::cuda
