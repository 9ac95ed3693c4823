// Decode over a cache in pages: the kernel of flash/decode.cu through a page table.
#include "cuda/flash/decode_kernel.h"
#include "cuda/paged/instances.h"

namespace attnforge::cuda {

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    paged_decode_kernel(const __grid_constant__ FlashFwdParams params,
                        const __grid_constant__ PageSource source,
                        const __grid_constant__ SplitParams splits,
                        const __grid_constant__ Pieces pieces,
                        const __grid_constant__ RowGrid grid) {
  run_decode<Case::kTile>(params, splits, grid, PageStore{source, params.problem, pieces});
}

template <>
int paged_decode<kThisDType>(const PagedFwdParams& params, const SplitParams& splits,
                             const Pieces& pieces, RowRange rows, void* stream) {
  const FlashProblem& p = params.flash.problem;
  return with_paged_dims(params, [&]<int kDims, bool kCodes>() {
    using Case = PagedDecodeCase<kThisDType, kDims, kCodes>;
    const int group = static_cast<int>(p.heads_q / p.heads_k);
    const RowGrid grid = paged_grid(p, kDecodeRows, group, splits, pieces, rows);
    if (grid.blocks() == 0) return 0;
    return ATTNFORGE_LAUNCH((paged_decode_kernel<Case>), dim3(grid.blocks()),
                            dim3(32 * Case::kTile.warps),
                            RowKernel<Case::kTile>::Walk::kSharedBytes, stream, params.flash,
                            PageSource::of(params.pool, p.heads_k), splits, pieces, grid);
  });
}

}  // namespace attnforge::cuda
