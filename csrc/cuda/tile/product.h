// The two products of attention on fragments of 16 rows per warp (mma.sync, fp32 accumulators):
//
//   product_nt   acc[rows, n] += A[rows, :] B[n, :]^T    both from tiles in shared memory
//   product_nn   acc[rows, d] += P[rows, k] B[k, d]      P from accumulators of the same warp
//
// acc[m][n] is the 16 x 8 fragment of rows 16 m.. and columns 8 n.. of the warp: with g = lane / 4
// and t = lane % 4, its elements are (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
//
// One addressing serves both element sizes: an 8 x 8 matrix of ldmatrix is eight rows of 16 bytes,
// which are 8 columns of 16 bits (k 16 per step) or 4 of 32 bits (k 8 per step). Only the
// transposed operand of product_nn is different: ldmatrix transposes 16-bit elements, fp32 takes
// single loads. There the k index is permuted, (t, t + 4) standing for keys (2 t, 2 t + 1), because
// those are the columns of P that a lane already holds.
#pragma once

#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/warp.h"
#include "cuda/tile/shared_tile.h"

namespace attnforge::cuda {

template <int kM, int kN>
using Accumulators = float[kM][kN][4];

template <int kM, int kN>
AF_DEVICE void fill(Accumulators<kM, kN>& acc, float value) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = value;
    }
  }
}

template <int kM, int kN>
AF_DEVICE void zero(Accumulators<kM, kN>& acc) {
  fill<kM, kN>(acc, 0.0f);
}

// a_row, b_row: first rows of the operands inside their tiles, multiples of 8. kChunks, first:
// the sum goes over so many chunks of a row from an even one on.
template <int kM, int kN, class TileA, class TileB, int kChunks = TileA::kChunks>
AF_DEVICE void product_nt(Accumulators<kM, kN>& acc, const TileA& a, int a_row, const TileB& b,
                          int b_row, int first = 0 AF_SITE) {
  using Mma = Product<typename TileA::Element>;
  static_assert(TileA::kDim == TileB::kDim && kN % 2 == 0 && kChunks % 2 == 0);
  const int lane = static_cast<int>(ptx::lane_id());
  const uint32_t a_home = a.chunk(a_row + lane % 16, lane / 16);
  const uint32_t b_home = b.chunk(b_row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < kChunks; k += 2) {
    typename Mma::Left left[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, TileA::from(a_home, 16 * m, first + k) AF_PASS_SITE);
      left[m] = Mma::left(r);
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, TileB::from(b_home, 8 * n, first + k) AF_PASS_SITE);
      const typename Mma::Right first = Mma::right(r[0], r[1]), second = Mma::right(r[2], r[3]);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        Mma::add(acc[m][n], left[m], first);
        Mma::add(acc[m][n + 1], left[m], second);
      }
    }
  }
}

// P: kK fragments of 8 columns; b's rows from b_row on are its k. first: b's fragment of 8 columns
// that acc begins at, a multiple of 16.
template <int kM, int kK, int kN, class TileB>
AF_DEVICE void product_nn(Accumulators<kM, kN>& acc, const Accumulators<kM, kK>& p, const TileB& b,
                          int b_row, int first = 0 AF_SITE) {
  using T = typename TileB::Element;
  using Mma = Product<T>;
  static_assert(kN % 2 == 0 && kK % 2 == 0);
  const int lane = static_cast<int>(ptx::lane_id());
  constexpr int kStep = sizeof(T) == 2 ? 2 : 1;  // fragments of P per step
  const uint32_t b_home = b.chunk(b_row + lane % 16, first + lane / 16);
#pragma unroll
  for (int k = 0; k < kK; k += kStep) {
    typename Mma::Left left[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const float (&c)[4] = p[m][k];
      if constexpr (sizeof(T) == 2) {
        const float (&d)[4] = p[m][k + 1];
        const uint32_t r[4] = {pack<T>(c[0], c[1]), pack<T>(c[2], c[3]), pack<T>(d[0], d[1]),
                               pack<T>(d[2], d[3])};
        left[m] = Mma::left(r);
      } else {
        const uint32_t r[4] = {ptx::bits_of_float(c[0]), ptx::bits_of_float(c[2]),
                               ptx::bits_of_float(c[1]), ptx::bits_of_float(c[3])};
        left[m] = Mma::left(r);
      }
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t r[4];
      if constexpr (sizeof(T) == 2) {
        ptx::ldmatrix_x4_trans(r, TileB::from(b_home, 8 * k, n) AF_PASS_SITE);
      } else {
        const int row = b_row + 8 * k + lane % 4 * 2, column = 8 * (first + n) + lane / 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          r[i] =
              ptx::load_shared<uint32_t>(b.element(row + i % 2, column + i / 2 * 8) AF_PASS_SITE);
        }
      }
      const typename Mma::Right first = Mma::right(r[0], r[1]), second = Mma::right(r[2], r[3]);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        Mma::add(acc[m][n], left[m], first);
        Mma::add(acc[m][n + 1], left[m], second);
      }
    }
  }
}

}  // namespace attnforge::cuda
