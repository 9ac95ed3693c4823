// Decode: few query rows over a long cache, split over keys (Flash-Decoding; Dao et al., 2023).
//
//   rows       the query rows of all heads of a KV head's group are the rows of one tile, so that K
//              and V are read once for the group; 16 of them, what mma.sync takes at least
//   warps      each walks key tiles of its own, dealt in turn, through its own pipeline: no barrier
//              until the end, when the warps' states are added up in shared memory, in a fixed
//              order
//   splits     blocks share out the keys; states of several go to fp32, and merge.cu adds them up
//   grid       split, row tile, KV head, batch
//   bytes      K and V once per 16 rows; bound by memory. flops: padded rows cost products only
//
// Calls with more rows than a tile take the forward kernel with packed rows and splits (fwd.cu).
#include "cuda/flash/decode_kernel.h"

namespace attnforge::cuda {

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    flash_decode_kernel(const __grid_constant__ FlashFwdParams params,
                        const __grid_constant__ SplitParams splits,
                        const __grid_constant__ RowGrid grid) {
  run_decode<Case::kTile>(params, splits, grid, TensorStore{params});
}

template <>
int flash_decode<kThisDType>(const FlashFwdParams& params, const SplitParams& splits,
                             void* stream) {
  const FlashProblem& p = params.problem;
  const int group = static_cast<int>(p.heads_q / p.heads_k);
  if (p.seqlen_q * group > kDecodeRows)
    return flash_fwd_rows<kThisDType>(params, splits, true, stream);
  return with_head_dims(p, [&]<int kDims>() {
    using Case = DecodeCase<kThisDType, kDims>;
    const RowGrid grid = RowGrid::of(p, kDecodeRows, group, splits.splits);
    if (grid.blocks() == 0) return 0;
    return ATTNFORGE_LAUNCH(
        (flash_decode_kernel<Case>), dim3(grid.blocks()), dim3(32 * Case::kTile.warps),
        RowKernel<Case::kTile>::Walk::kSharedBytes, stream, params, splits, grid);
  });
}

}  // namespace attnforge::cuda
