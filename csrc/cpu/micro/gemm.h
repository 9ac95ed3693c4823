// The register-tiled matrix product that every flash kernel is made of.
//
// C[m, n] (+)= A[m, depth] * B[depth, n] with B packed in column panels and A read by broadcasts:
//   B panel  [depth][kNR]       kNR = two vectors of columns; rows may lie BK apart instead, so
//   that
//            a matrix with that leading dimension serves without packing
//   A        element (row, k) at a[row * ARow + k * AK], both strides known at compile time, so
//   that
//            packed Q groups, a score tile and its transpose all use the same code
//   C        row-major, ldc at run time
// Each C element is one chain of FMAs in ascending k, started from C itself: results are bitwise
// the same for every tile height and for every neighbour a row may have.
//
// A tile is MR rows x 2 vectors, accumulators named one by one: arrays of vectors get spilled by
// GCC (2.8x slower, measured on Zen 3). Registers: 6x2 + 2 + 1 = 15 of 16 (AVX2), 12x2 + 2 + 1 = 27
// of 32 (AVX-512), 4x2 + 2 + 2 = 12 of 16 (SSE, whose multiply needs a copy).
#pragma once

#include "cpu/simd/vec.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

#if ATTNFORGE_LANES == 16
constexpr int kMR = 12, kTailMR = 6, kFewMR = 4;
#elif ATTNFORGE_LANES == 8
constexpr int kMR = 6, kTailMR = 4, kFewMR = 3;
#else
constexpr int kMR = 4, kTailMR = 2, kFewMR = 1;
#endif
constexpr int kNR = 2 * kLanes;

#define AF_ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

// Memory that a later product reads, asked for a line per step of this one: a burst of as many
// requests would fill the core's buffers for misses, and the next loads would wait for them.
struct LinesSoon {
  const char* at;
  int64_t left;

  // The first of n lines to ask for; lines that are here already where none are left.
  AF_INLINE_MEMBER const char* take(int64_t n, const float* here) {
    const char* line = left > 0 ? at : reinterpret_cast<const char*>(here);
    at += n * kLine;
    left -= n;
    return line;
  }
  static constexpr int64_t kLine = 64;
};

template <int MR, int NV, int ARow, int AK, int BK = kNR, bool kAsks = false>
[[gnu::noinline]] static void gemm_tile(int64_t depth, const float* a, const float* b, float* c,
                                        int64_t ldc, bool accumulate, const char* line = nullptr) {
  static_assert(MR <= 12 && (NV == 1 || NV == 2));
#define AF_DECLARE(r) VecF x##r{}, y##r{};
  AF_ROWS(AF_DECLARE)
#undef AF_DECLARE
  if (accumulate) {
#define AF_LOAD(r)                                            \
  if constexpr (MR > r) {                                     \
    x##r = load(c + r * ldc);                                 \
    if constexpr (NV == 2) y##r = load(c + r * ldc + kLanes); \
  }
    AF_ROWS(AF_LOAD)
#undef AF_LOAD
  }
  do {  // depth >= 1; a loop that may run zero times keeps both sets of accumulators alive
    VecF b0 = load(b), b1{};
    if constexpr (NV == 2) b1 = load(b + kLanes);
#define AF_STEP(r)                                  \
  if constexpr (MR > r) {                           \
    VecF s = splat(a[r * ARow]);                    \
    x##r = fma(s, b0, x##r);                        \
    if constexpr (NV == 2) y##r = fma(s, b1, y##r); \
  }
    AF_ROWS(AF_STEP)
#undef AF_STEP
    if constexpr (kAsks) {
      __builtin_prefetch(line);
      line += LinesSoon::kLine;
    }
    a += AK;
    b += BK;
  } while (--depth > 0);
#define AF_STORE(r)                                           \
  if constexpr (MR > r) {                                     \
    store(c + r * ldc, x##r);                                 \
    if constexpr (NV == 2) store(c + r * ldc + kLanes, y##r); \
  }
  AF_ROWS(AF_STORE)
#undef AF_STORE
}

template <int MR, int ARow, int AK, int BK, class... Soon>
AF_INLINE void gemm_rows(bool pair, int64_t depth, const float* a, const float* b, float* c,
                         int64_t ldc, bool accumulate, Soon&... soon) {
  constexpr bool kAsks = sizeof...(soon) > 0;
  if (pair) {
    gemm_tile<MR, 2, ARow, AK, BK, kAsks>(depth, a, b, c, ldc, accumulate, soon.take(depth, b)...);
  } else {
    gemm_tile<MR, 1, ARow, AK, BK, kAsks>(depth, a, b, c, ldc, accumulate, soon.take(depth, b)...);
  }
}

// Rows are computed in steps of kMR; what is left in one step of kFewMR, kTailMR or kMR, for which
// A and C must have room. `vectors` is the number of column vectors wanted. a_row_stride: distance
// of consecutive rows that start a kMR group (depth for packed groups). `soon`: nothing, or the
// LinesSoon of what is read next.
template <int ARow, int AK, int BK = kNR, class... Soon>
AF_INLINE void gemm(int64_t rows, int64_t vectors, int64_t depth, const float* a,
                    int64_t a_row_stride, const float* b, int64_t panel_stride, float* c,
                    int64_t ldc, bool accumulate, Soon&... soon) {
  for (int64_t v = 0; v < vectors; v += 2, b += panel_stride, c += kNR) {
    const bool pair = v + 1 < vectors;
    for (int64_t row = 0; row < rows; row += kMR) {
      const int64_t left = rows - row;
      const float* rows_a = a + row * a_row_stride;
      float* rows_c = c + row * ldc;
      if (left > kTailMR) {
        gemm_rows<kMR, ARow, AK, BK>(pair, depth, rows_a, b, rows_c, ldc, accumulate, soon...);
      } else if (left > kFewMR) {
        gemm_rows<kTailMR, ARow, AK, BK>(pair, depth, rows_a, b, rows_c, ldc, accumulate, soon...);
      } else {
        gemm_rows<kFewMR, ARow, AK, BK>(pair, depth, rows_a, b, rows_c, ldc, accumulate, soon...);
      }
    }
  }
}

AF_INLINE int64_t round_up(int64_t x, int64_t step) {
  return (x + step - 1) / step * step;
}
AF_INLINE int64_t ceil_div(int64_t x, int64_t y) {
  return (x + y - 1) / y;
}
AF_INLINE int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
AF_INLINE int64_t max64(int64_t a, int64_t b) {
  return a > b ? a : b;
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
