// Many rows over a cache in pages: the kernel of flash/fwd.cu through a page table.
#include "cuda/flash/fwd_kernel.h"
#include "cuda/paged/instances.h"

namespace attnforge::cuda {

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    paged_prefill_kernel(const __grid_constant__ FlashFwdParams params,
                         const __grid_constant__ PageSource source,
                         const __grid_constant__ SplitParams splits,
                         const __grid_constant__ Pieces pieces,
                         const __grid_constant__ RowGrid grid) {
  run_forward<Case::kTile>(params, splits, grid, PageStore{source, params.problem, pieces});
}

template <>
int paged_prefill<kThisDType>(const PagedFwdParams& params, const SplitParams& splits,
                              const Pieces& pieces, RowRange rows, void* stream) {
  const FlashProblem& p = params.flash.problem;
  return with_paged_dims(params, [&]<int kDims, bool kCodes>() {
    using Case = PagedPrefillCase<kThisDType, kDims, kCodes>;
    using Walk = typename RowKernel<Case::kTile>::Walk;
    const int group = static_cast<int>(p.heads_q / p.heads_k);
    const int pack = rows.most < kAnyRows || splits.splits > 1 ? group : 1;
    const RowGrid grid = paged_grid(p, Walk::kRows, pack, splits, pieces, rows);
    if (grid.blocks() == 0) return 0;
    return ATTNFORGE_LAUNCH((paged_prefill_kernel<Case>), dim3(grid.blocks()),
                            dim3(32 * Case::kTile.warps), Walk::kSharedBytes, stream, params.flash,
                            PageSource::of(params.pool, p.heads_k), splits, pieces, grid);
  });
}

}  // namespace attnforge::cuda
