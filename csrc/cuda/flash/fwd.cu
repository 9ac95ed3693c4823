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
#include "cuda/flash/rows_kernel.h"

namespace attnforge::cuda {

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    flash_fwd_kernel(const __grid_constant__ FlashFwdParams params,
                     const __grid_constant__ SplitParams splits,
                     const __grid_constant__ RowGrid grid) {
  using Kernel = RowKernel<Case::kTile>;
  using T = typename Kernel::T;
  constexpr int kM = Kernel::kM, kD = Kernel::kD;
  const FlashProblem& p = params.problem;
  Kernel::run(
      params, splits, grid,
      [&](const RowWork& work, const auto& walk, const auto& sums,
          const typename Kernel::Output& out) {
        const int warp_row = walk.first_row(), dim = static_cast<int>(p.v_head_dim);
        float scale[kM][2];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int r = fragment_row(warp_row, m, h);
            const RowEnd end =
                finish_row(sums.top[m][h], sums.total[m][h], Kernel::sink(p, work, r));
            scale[m][h] = end.scale;
            if (work.rows.exists(r) && fragment_column(0, 0) == 0)
              *work.lse(params, splits, r) = end.lse;
          }
        }
        const auto value = [&](int m, int d, int i) { return out[m][d][i] * scale[m][i / 2]; };
        if (splits.out != nullptr) {
          store_pairs<kM, kD>(warp_row, dim, value, [&](int r) { return work.part(p, splits, r); });
          return;
        }
        store_rows<kM, kD>(walk.q_tile(), warp_row, dim, value,
                           [&](int r) { return Kernel::row_of(params.out, work, r); });
        if (params.out_lo.data != nullptr) {
          store_rows<kM, kD>(
              walk.q_tile(), warp_row, dim,
              [&](int m, int d, int i) { return residue<T>(value(m, d, i)); },
              [&](int r) { return Kernel::row_of(params.out_lo, work, r); });
        }
      });
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
