// Products inside a chunk of tokens: squares, token by token, of which the half up to the diagonal
// counts. kSide is the length of a row, and that of a tile [dim][kSide] with tokens side by side.
#pragma once

#include "cpu/micro/gemm.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// MR rows of a panel (+)= A B; `vectors` (1 or 2) is its width.
template <int MR, int ARow, int AK>
AF_INLINE void panel_tile(int64_t vectors, int64_t depth, const float* a, const float* b, float* c,
                          bool accumulate = true) {
  if (vectors == 2) {
    gemm_tile<MR, 2, ARow, AK>(depth, a, b, c, kNR, accumulate);
  } else {
    gemm_tile<MR, 1, ARow, AK>(depth, a, b, c, kNR, accumulate);
  }
}

// square[i][j] (+)= sum_d a[d][i] b[d][j] over two tiles, for j up to i and a little more, MR
// rows at a time.
template <int kSide, int MR = kMR>
AF_INLINE void tile_square(int64_t live, int64_t dim, const float* a, const float* b, float* c,
                           bool accumulate = false) {
  for (int64_t row = 0; row < live; row += MR) {
    const int64_t columns = min64(row + MR, live);
    for (int64_t v = 0; v < columns; v += kNR) {
      float* to = c + row * kSide + v;
      if (columns - v > kLanes) {
        gemm_tile<MR, 2, 1, kSide, kSide>(dim, a + row, b + v, to, kSide, accumulate);
      } else {
        gemm_tile<MR, 1, 1, kSide, kSide>(dim, a + row, b + v, to, kSide, accumulate);
      }
    }
  }
}

// The lanes of x that stand for columns j, j + 1, ... up to `last`; zero elsewhere.
AF_INLINE VecF keep_up_to(int64_t last, int64_t j, VecF x) {
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane <= splat_int(static_cast<int32_t>(last - j)) ? x : VecF{};
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
