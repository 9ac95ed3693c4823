// The product of gemm.h on bf16 operands, over matrix tiles.
//
// C[m, n] (+)= A[m, depth] * B[depth, n]; the depth is padded with zeros to whole tiles.
//   A   rows of bf16 `lda` apart
//   B   panels of kNR columns: [depth / 32][two tiles of 16 columns], a tile as tiles.h has it
//   C   row-major fp32, with room for whole tiles of rows
// Two by two tiles of C stay in registers beside two of A and two of B: four products, 64 cycles,
// for four loads of 8. (Four chains of a latency of 52 cycles.)
#pragma once

#include "cpu/micro/gemm.h"
#include "cpu/micro/tiles.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

static_assert(kNR == 2 * kTileRows, "a panel is two tiles wide");

// MT by NT tiles of C.
template <int MT, int NT>
[[gnu::noinline]] static void multiply_tiles(int64_t steps, const BFloat16* a, int64_t lda,
                                             const BFloat16* b, float* c, int64_t ldc,
                                             bool accumulate) {
  Tiles t;
  const int64_t a_bytes = lda * 2, c_bytes = ldc * 4;
  float* below = c + kTileRows * ldc;
  if (accumulate) {
    t.load<0>(c, c_bytes);
    if constexpr (NT == 2) t.load<1>(c + kTileRows, c_bytes);
    if constexpr (MT == 2) t.load<2>(below, c_bytes);
    if constexpr (MT == 2 && NT == 2) t.load<3>(below + kTileRows, c_bytes);
  } else {
    t.zero<0>();
    if constexpr (NT == 2) t.zero<1>();
    if constexpr (MT == 2) t.zero<2>();
    if constexpr (MT == 2 && NT == 2) t.zero<3>();
  }
  do {
    t.load<4>(a, a_bytes);
    t.load<6>(b, 64);
    t.dot<0, 4, 6>();
    if constexpr (NT == 2) {
      t.load<7>(b + kTileSize, 64);
      t.dot<1, 4, 7>();
    }
    if constexpr (MT == 2) {
      t.load<5>(a + kTileRows * lda, a_bytes);
      t.dot<2, 5, 6>();
      if constexpr (NT == 2) t.dot<3, 5, 7>();
    }
    a += kTileDepth;
    b += 2 * kTileSize;
  } while (--steps > 0);
  t.store<0>(c, c_bytes);
  if constexpr (NT == 2) t.store<1>(c + kTileRows, c_bytes);
  if constexpr (MT == 2) t.store<2>(below, c_bytes);
  if constexpr (MT == 2 && NT == 2) t.store<3>(below + kTileRows, c_bytes);
}

// `vectors`: of 16 columns. Panels are the outer loop: one is read from L2 once for all rows.
AF_INLINE void tile_gemm(int64_t rows, int64_t vectors, int64_t depth, const BFloat16* a,
                         int64_t lda, const BFloat16* b, int64_t panel_stride, float* c,
                         int64_t ldc, bool accumulate) {
  const int64_t steps = ceil_div(depth, kTileDepth);
  for (int64_t v = 0; v < vectors; v += 2, b += panel_stride, c += kNR) {
    const bool pair = v + 1 < vectors;
    for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
      const auto multiply = rows - row > kTileRows
                                ? (pair ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                                : (pair ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
      multiply(steps, a + row * lda, lda, b, c + row * ldc, ldc, accumulate);
    }
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
