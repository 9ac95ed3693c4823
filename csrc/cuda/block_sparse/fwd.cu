// Block-sparse attention, forward, for the sm_80 class: flash attention over the keys of listed
// blocks.
//
//   block      rows that share a list: queries of one list row, with all query heads of the list's
//              head packed. Up to 16 of them (a query of native sparse attention; Yuan et al.,
//              2025) are in every warp, and warps share out the tiles of keys, as in
//              flash/decode.cu; more are dealt to the warps, as in flash/fwd.cu
//   keys       the stream of the list's blocks (tile/listed.h), gathered row by row by cp.async; a
//              range of it that every row sees whole runs without masks
//   grid       part of a list row, list row, head, batch; late rows first
//   flops      2 (D + Dv) per listed pair, rows padded to the tile
//   bytes      Q, O once; K and V of the listed blocks once per tile of rows, from L2 mostly
//
// A row's result depends on its own Q, list and keys only. Lists of single query heads with one row
// use one row of 16: see docs/block_sparse.md. Limits: head dims up to 256, multiples of 8.
#include "cuda/block_sparse/instances.h"
#include "cuda/flash/decode_kernel.h"
#include "cuda/flash/fwd_kernel.h"

namespace attnforge::cuda {

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    block_sparse_fwd_kernel(const __grid_constant__ FlashFwdParams params,
                            const __grid_constant__ BlockListRef lists,
                            const __grid_constant__ ListGrid grid) {
  using Kernel = RowKernel<Case::kTile>;
  using Keys = typename Kernel::Walk::Keys;
  const ListedWork w = listed_work(params.problem, lists, grid, Kernel::Walk::kRows);
  if (!w.work.some) return;
  const SplitParams whole;
  Kernel::attend(params, w.work, grid.map, listed_keys<Keys>(params, w), NoMod{},
                 [&](const RowWork& work, const auto& walk, const auto& sums,
                     const typename Kernel::Output& out) {
                   if constexpr (Case::kTile.team == TeamKind::kWarp) {
                     finish_decode<Case::kTile, true>(params, whole, work, walk, sums, out);
                   } else {
                     finish_forward<Case::kTile>(params, whole, work, walk, sums, out);
                   }
                 });
}

template <>
int block_sparse_fwd<kThisDType>(const FlashFwdParams& params, const BlockListRef& lists,
                                 void* stream) {
  const FlashProblem& p = params.problem;
  return with_listed_dims(p, [&]<int kDims>() {
    const auto launch = [&]<ListRows kRows>() {
      using Case = ListedFwdCase<kThisDType, kDims, kRows>;
      using Walk = typename RowKernel<Case::kTile>::Walk;
      const ListGrid grid = ListGrid::of(p, lists, Walk::kRows);
      if (grid.blocks() == 0) return 0;
      return ATTNFORGE_LAUNCH((block_sparse_fwd_kernel<Case>), dim3(grid.blocks()),
                              dim3(32 * Case::kTile.warps), Walk::kSharedBytes, stream, params,
                              lists, grid);
    };
    return lists.q_block * lists.pack <= kDecodeRows
               ? launch.template operator()<ListRows::kFew>()
               : launch.template operator()<ListRows::kMany>();
  });
}

}  // namespace attnforge::cuda
