// Latent attention (MLA, absorbed; DeepSeek-V2, 2024) over pages: one KV head of 576 channels,
// whose first 512 are V.
//
//   block      16 rows, of the heads of the one KV head; K lands once and serves both products
//   warps      share rows and keys and split channels: each multiplies 144 of Q and K, the partial
//              scores are added up through shared memory in the order of warps, and each has 128
//              channels of the output
//   barriers   two per key tile, three where the tile is not seen whole
//   bytes      K once per 16 rows, from L2 where a group has more
#include "cuda/flash/fwd_kernel.h"
#include "cuda/paged/instances.h"

namespace attnforge::cuda {

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    paged_latent_kernel(const __grid_constant__ FlashFwdParams params,
                        const __grid_constant__ PageSource source,
                        const __grid_constant__ SplitParams splits,
                        const __grid_constant__ Pieces pieces,
                        const __grid_constant__ RowGrid grid) {
  run_forward<Case::kTile>(params, splits, grid, PageStore{source, params.problem, pieces});
}

template <DType kDType, bool kCodes>
int launch_latent(const PagedFwdParams& params, const SplitParams& splits, const Pieces& pieces,
                  RowRange rows, void* stream) {
  if constexpr (kDType == DType::kFloat32) {
    return kNoKernel;  // Q and two tiles of K would be 108 KiB
  } else {
    using Case = LatentCase<kDType, kCodes>;
    using Walk = typename RowKernel<Case::kTile>::Walk;
    const FlashProblem& p = params.flash.problem;
    const int group = static_cast<int>(p.heads_q / p.heads_k);
    const RowGrid grid = paged_grid(p, Walk::kRows, group, splits, pieces, rows);
    if (grid.blocks() == 0) return 0;
    return ATTNFORGE_LAUNCH((paged_latent_kernel<Case>), dim3(grid.blocks()),
                            dim3(32 * Case::kTile.warps), Walk::kSharedBytes, stream, params.flash,
                            PageSource::of(params.pool, p.heads_k), splits, pieces, grid);
  }
}

template <>
int paged_latent<kThisDType>(const PagedFwdParams& params, const SplitParams& splits,
                             const Pieces& pieces, RowRange rows, void* stream) {
  return holds_codes(params.pool)
             ? launch_latent<kThisDType, true>(params, splits, pieces, rows, stream)
             : launch_latent<kThisDType, false>(params, splits, pieces, rows, stream);
}

}  // namespace attnforge::cuda
