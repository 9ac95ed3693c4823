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
#include "cuda/flash/rows_kernel.h"

namespace attnforge::cuda {

namespace {

constexpr int kRows = 16;

// States of the warps of a block, over the memory of their streams: O [kRows, kValueDim] fp32 with
// rows 32 bytes apart beyond their length (a quad's pairs of eight rows then fill all banks once),
// then top and total of each row.
template <int kValueDim>
struct States {
  static constexpr int kRowBytes = 4 * kValueDim + 32;
  static constexpr int kBytes = kRows * (kRowBytes + 8);
  uint32_t base;
  AF_DEVICE uint32_t value(int warp, int row, int column) const {
    return base + static_cast<uint32_t>(warp * kBytes + row * kRowBytes + 4 * column);
  }
  AF_DEVICE uint32_t sums(int warp, int row) const {
    return base + static_cast<uint32_t>(warp * kBytes + kRows * kRowBytes + 8 * row);
  }
};

}  // namespace

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    flash_decode_kernel(const __grid_constant__ FlashFwdParams params,
                        const __grid_constant__ SplitParams splits,
                        const __grid_constant__ RowGrid grid) {
  using Kernel = RowKernel<Case::kTile>;
  using T = typename Kernel::T;
  constexpr int kWarps = Case::kTile.warps, kDim = Case::kTile.v_head_dim;
  static_assert(kWarps * States<kDim>::kBytes <= Kernel::Walk::kStreamBytes);
  const FlashProblem& p = params.problem;
  Kernel::run(params, splits, grid,
              [&](const RowWork& work, const auto& walk, const auto& sums,
                  const typename Kernel::Output& out) {
                const States<kDim> states = {walk.stream()};
                ptx::sync_threads();  // all warps are done with their streams
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                  const int row = fragment_row(0, 0, h);
                  if (fragment_column(0, 0) == 0) {
                    ptx::store_shared(states.sums(warp_id(), row),
                                      FloatPair{sums.top[0][h], sums.total[0][h]});
                  }
#pragma unroll
                  for (int d = 0; d < Kernel::kD; ++d) {
                    ptx::store_shared(states.value(warp_id(), row, fragment_column(d, 0)),
                                      FloatPair{out[0][d][2 * h], out[0][d][2 * h + 1]});
                  }
                }
                ptx::sync_threads();
                for (int n = static_cast<int>(threadIdx.x); n < kRows * kDim / 4;
                     n += 32 * kWarps) {
                  const int r = n / (kDim / 4), column = n % (kDim / 4) * 4;
                  if (!work.rows.exists(r)) continue;
                  float top = -kInf;
                  for (int w = 0; w < kWarps; ++w) {
                    top = ptx::max(top, ptx::load_shared<FloatPair>(states.sums(w, r)).x);
                  }
                  const float base = top == -kInf ? 0.0f : top;
                  float total = 0.0f, o[4] = {};
                  for (int w = 0; w < kWarps; ++w) {
                    const auto state = ptx::load_shared<FloatPair>(states.sums(w, r));
                    const auto part = ptx::load_shared<ptx::U32x4>(states.value(w, r, column));
                    const float weight = ptx::exp2_approx(state.x - base);
                    total = ptx::fma(state.y, weight, total);
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                      o[i] = ptx::fma(ptx::float_from_bits(part.v[i]), weight, o[i]);
                  }
                  const RowEnd end = finish_row(top, total, Kernel::sink(p, work, r));
                  if (column == 0) *work.lse(params, splits, r) = end.lse;
                  if (column >= p.v_head_dim) continue;
                  if (splits.out != nullptr) {
                    float* to = work.part(p, splits, r) + column;
#pragma unroll
                    for (int i = 0; i < 4; ++i) to[i] = o[i] * end.scale;
                  } else {
                    T* to = Kernel::row_of(params.out, work, r) + column;
#pragma unroll
                    for (int i = 0; i < 4; ++i) to[i] = narrow<T>(o[i] * end.scale);
                  }
                }
              });
}

template <>
int flash_decode<kThisDType>(const FlashFwdParams& params, const SplitParams& splits,
                             void* stream) {
  const FlashProblem& p = params.problem;
  const int group = static_cast<int>(p.heads_q / p.heads_k);
  if (p.seqlen_q * group > kRows) return flash_fwd_rows<kThisDType>(params, splits, true, stream);
  return with_head_dims(p, [&]<int kDims>() {
    using Case = DecodeCase<kThisDType, kDims>;
    const RowGrid grid = RowGrid::of(p, kRows, group, splits.splits);
    if (grid.blocks() == 0) return 0;
    return ATTNFORGE_LAUNCH(
        (flash_decode_kernel<Case>), dim3(grid.blocks()), dim3(32 * Case::kTile.warps),
        RowKernel<Case::kTile>::Walk::kSharedBytes, stream, params, splits, grid);
  });
}

}  // namespace attnforge::cuda
