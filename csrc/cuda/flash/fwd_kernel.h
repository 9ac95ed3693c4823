// The forward kernel over any store of keys: what fwd.cu says of it, from the walk to the last
// byte.
#pragma once

#include "cuda/flash/rows_kernel.h"

namespace attnforge::cuda {

// The end of a forward: scales rows, and writes them and their LSE.
template <FwdTile kTile, class Walk, class Sums>
AF_DEVICE void finish_forward(const FlashFwdParams& params, const SplitParams& splits,
                              const RowWork& work, const Walk& walk, const Sums& sums,
                              const typename RowKernel<kTile>::Output& out) {
  using Kernel = RowKernel<kTile>;
  using T = typename Kernel::T;
  constexpr int kM = Kernel::kM, kD = Kernel::kD;
  const FlashProblem& p = params.problem;
  const int warp_row = walk.first_row(), first = walk.first_fragment();
  const int dim = static_cast<int>(p.v_head_dim);
  float scale[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = fragment_row(warp_row, m, h);
      const RowEnd end = finish_row(sums.top[m][h], sums.total[m][h], Kernel::sink(p, work, r));
      scale[m][h] = end.scale;
      if (work.rows.exists(r) && fragment_column(first, 0) == 0)
        *work.lse(params, splits, r) = end.lse;
    }
  }
  const auto value = [&](int m, int d, int i) { return out[m][d][i] * scale[m][i / 2]; };
  if (splits.out.data != nullptr) {
    store_pairs<kM, kD>(warp_row, dim, value, [&](int r) { return work.part(splits, r); }, first);
    return;
  }
  store_rows<kM, kD>(
      walk.q_tile(), warp_row, dim, value,
      [&](int r) { return Kernel::row_of(params.out, work, r); }, first);
  if (params.out_lo.data != nullptr) {
    store_rows<kM, kD>(
        walk.q_tile(), warp_row, dim,
        [&](int m, int d, int i) { return residue<T>(value(m, d, i)); },
        [&](int r) { return Kernel::row_of(params.out_lo, work, r); }, first);
  }
}

template <FwdTile kTile, class Store, class Mod = NoMod>
AF_DEVICE void run_forward(const FlashFwdParams& params, const SplitParams& splits,
                           const RowGrid& grid, const Store& store, const Mod& mod = {}) {
  using Kernel = RowKernel<kTile, Mod>;
  Kernel::run(params, splits, grid, store, mod,
              [&](const RowWork& work, const auto& walk, const auto& sums,
                  const typename Kernel::Output& out) {
                finish_forward<kTile>(params, splits, work, walk, sums, out);
              });
}

}  // namespace attnforge::cuda
