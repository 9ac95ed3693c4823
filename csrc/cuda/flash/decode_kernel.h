// The decode kernel over any store of keys: what decode.cu says of it.
#pragma once

#include "cuda/flash/rows_kernel.h"

namespace attnforge::cuda {

constexpr int kDecodeRows = 16;

// States of the warps of a block, over the memory of their streams: O [kDecodeRows, kValueDim] fp32
// with rows 32 bytes apart beyond their length (a quad's pairs of eight rows then fill all banks
// once), then top and total of each row.
template <int kValueDim>
struct DecodeStates {
  static constexpr int kRowBytes = 4 * kValueDim + 32;
  static constexpr int kBytes = kDecodeRows * (kRowBytes + 8);
  uint32_t base;
  AF_DEVICE uint32_t value(int warp, int row, int column) const {
    return base + static_cast<uint32_t>(warp * kBytes + row * kRowBytes + 4 * column);
  }
  AF_DEVICE uint32_t sums(int warp, int row) const {
    return base + static_cast<uint32_t>(warp * kBytes + kDecodeRows * kRowBytes + 8 * row);
  }
};

// The end of a decode: adds up the states of the warps. kLow: with the second 16-bit part of the
// output, which a backward wants.
template <FwdTile kTile, bool kLow, class Walk, class Sums>
AF_DEVICE void finish_decode(const FlashFwdParams& params, const SplitParams& splits,
                             const RowWork& work, const Walk& walk, const Sums& sums,
                             const typename RowKernel<kTile>::Output& out) {
  using Kernel = RowKernel<kTile>;
  using T = typename Kernel::T;
  constexpr int kWarps = kTile.warps, kDim = kTile.v_head_dim;
  static_assert(kWarps * DecodeStates<kDim>::kBytes <= Kernel::Walk::kStreamBytes);
  const FlashProblem& p = params.problem;
  const DecodeStates<kDim> states = {walk.stream()};
  ptx::sync_threads();  // all warps are done with their streams
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = fragment_row(0, 0, h);
    if (fragment_column(0, 0) == 0) {
      ptx::store_shared(states.sums(warp_id(), row), FloatPair{sums.top[0][h], sums.total[0][h]});
    }
#pragma unroll
    for (int d = 0; d < Kernel::kD; ++d) {
      ptx::store_shared(states.value(warp_id(), row, fragment_column(d, 0)),
                        FloatPair{out[0][d][2 * h], out[0][d][2 * h + 1]});
    }
  }
  ptx::sync_threads();
  for (int n = static_cast<int>(threadIdx.x); n < kDecodeRows * kDim / 4; n += 32 * kWarps) {
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
      for (int i = 0; i < 4; ++i) o[i] = ptx::fma(ptx::float_from_bits(part.v[i]), weight, o[i]);
    }
    const RowEnd end = finish_row(top, total, Kernel::sink(p, work, r));
    if (column == 0) *work.lse(params, splits, r) = end.lse;
    if (column >= p.v_head_dim) continue;
    if (splits.out.data != nullptr) {
      if (work.nothing()) continue;
      float* to = work.part(splits, r) + column;
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = o[i] * end.scale;
    } else {
      T* to = Kernel::row_of(params.out, work, r) + column;
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = narrow<T>(o[i] * end.scale);
      if (kLow && params.out_lo.data != nullptr) {
        T* low = Kernel::row_of(params.out_lo, work, r) + column;
#pragma unroll
        for (int i = 0; i < 4; ++i) low[i] = narrow<T>(residue<T>(o[i] * end.scale));
      }
    }
  }
}

template <FwdTile kTile, class Store, class Mod = NoMod>
AF_DEVICE void run_decode(const FlashFwdParams& params, const SplitParams& splits,
                          const RowGrid& grid, const Store& store, const Mod& mod = {}) {
  using Kernel = RowKernel<kTile, Mod>;
  Kernel::run(params, splits, grid, store, mod,
              [&](const RowWork& work, const auto& walk, const auto& sums,
                  const typename Kernel::Output& out) {
                finish_decode<kTile, false>(params, splits, work, walk, sums, out);
              });
}

}  // namespace attnforge::cuda
