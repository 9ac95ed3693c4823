// Layouts of a chunk and the products over them, shared by the chunk kernels of the delta rules.
//
//   rows     [token][padded dim]         as in memory, widened to fp32
//   tile     [dim][kChunk]               a chunk transposed: the A operand of a product over
//   channels
//                                        or over tokens, and the B operand whose columns are tokens
//   panels   [dim / kNR][kRoom][kNR]     the B operand of products over tokens, and their result
//   square   [kRoom][kChunk]             token by token
//   state    [V / kNR][key rows][kNR]    panels over the keys
//
// Dead tokens (behind the end of a sequence, up to the next multiple of kSub) are zeros everywhere.
// Products may compute up to kMR - 1 rows more than asked for; every buffer has room for them.
#pragma once

#include "cpu/linear/squares.h"
#include "cpu/linear/tokens.h"
#include "cpu/micro/denormals.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// 64 tokens: the triangular work grows with the chunk, the products with the state shrink with it.
constexpr int64_t kChunk = 64;
constexpr int64_t kSub = 16;    // rows solved together, and the sub-chunks of channel gates
constexpr int64_t kRoom = 72;   // rows of 64 rounded up to every kMR
constexpr int64_t kSlack = 64;  // floats behind a tile that a product may read

AF_INLINE int64_t padded_dim(int64_t dim) {
  return round_up(dim, 16);
}
AF_INLINE int64_t tile_rows(int64_t dim) {
  return round_up(padded_dim(dim), kMR);
}
AF_INLINE int64_t tile_floats(int64_t dim) {
  return tile_rows(dim) * kChunk + kSlack;
}
AF_INLINE int64_t panels_of(int64_t dim) {
  return ceil_div(dim, kNR);
}
AF_INLINE int64_t state_floats(int64_t key_dim, int64_t value_dim) {
  return panels_of(value_dim) * tile_rows(key_dim) * kNR;
}
constexpr int64_t kSquare = kRoom * kChunk + kSlack;
constexpr int64_t kPanel = kRoom * kNR;

template <class... Pointers>
AF_INLINE void take_floats(Arena& arena, int64_t count, Pointers&... pointers) {
  ((pointers = arena.take<float>(count)), ...);
}

AF_INLINE void fill_zero(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, VecF{});  // n a multiple of 16
}

// n rows of a tensor into rows [live][ld]; columns past dim and rows past n become zeros.
template <class T>
AF_INLINE void load_rows(const T* src, int64_t stride, int64_t n, int64_t live, int64_t dim,
                         float* dst, int64_t ld) {
  for (int64_t i = 0; i < n; ++i, src += stride) {
    if (i + kRowsAhead < n) prefetch_row(src + kRowsAhead * stride, dim);
    for (int64_t d = 0; d < ld; d += kLanes) {
      store(dst + i * ld + d, d < dim ? load_partial(src + d, dim - d) : VecF{});
    }
  }
  fill_zero(dst + n * ld, (live - n) * ld);
}

template <class T>
AF_INLINE void store_rows(const float* src, int64_t ld, int64_t n, int64_t dim, T* dst,
                          int64_t stride) {
  for (int64_t i = 0; i < n; ++i, dst += stride, src += ld) {
    for (int64_t d = 0; d < dim; d += kLanes) store_partial(dst + d, load(src + d), dim - d);
  }
}

// dst[c][r] = src[r][c] of rows x columns, both multiples of 4.
[[gnu::noinline]] static void transpose(const float* src, int64_t ld, int64_t rows, int64_t columns,
                                        float* dst, int64_t dst_ld) {
  for (int64_t r = 0; r < rows; r += 4) {
    for (int64_t c = 0; c < columns; c += 4) {
      const float* from = src + r * ld + c;
      Vec4 x0 = load4(from), x1 = load4(from + ld), x2 = load4(from + 2 * ld),
           x3 = load4(from + 3 * ld);
      transpose4(x0, x1, x2, x3);
      float* to = dst + c * dst_ld + r;
      store4(to, x0), store4(to + dst_ld, x1), store4(to + 2 * dst_ld, x2),
          store4(to + 3 * dst_ld, x3);
    }
  }
}

template <class T>
AF_INLINE void load_panel(const T* src, int64_t stride, int64_t n, int64_t live, int64_t columns,
                          float* panel) {
  load_rows(src, stride, n, live, min64(columns, kNR), panel, kNR);
}

// Columns first .. end - 1 of a state [K][V] in memory into panels; null is zero.
AF_INLINE void load_state(const float* src, int64_t key_dim, int64_t value_dim, int64_t first,
                          int64_t end, float* state) {
  const int64_t rows = tile_rows(key_dim);
  for (int64_t c = first; c < end; c += kNR, state += rows * kNR) {
    fill_zero(state, rows * kNR);
    if (!src) continue;
    for (int64_t k = 0; k < key_dim; ++k) {
      for (int64_t d = c; d < min64(c + kNR, end); d += kLanes) {
        store(state + k * kNR + d - c, load_partial(src + k * value_dim + d, end - d));
      }
    }
  }
}
AF_INLINE void store_state(const float* state, int64_t key_dim, int64_t value_dim, int64_t first,
                           int64_t end, float* dst) {
  for (int64_t c = first; c < end; c += kNR, state += tile_rows(key_dim) * kNR) {
    for (int64_t k = 0; k < key_dim; ++k) {
      for (int64_t d = c; d < min64(c + kNR, end); d += kLanes) {
        store_partial(dst + k * value_dim + d, load(state + k * kNR + d - c), end - d);
      }
    }
  }
}

// ---- products; `vectors` (1 or 2) is the width of a panel ----

// panel[rows] += A B, the plain product of one panel of columns.
template <int ARow, int AK>
AF_INLINE void panel_product(int64_t rows, int64_t vectors, int64_t depth, const float* a,
                             const float* b, float* c) {
  gemm<ARow, AK>(rows, vectors, depth, a, int64_t{ARow}, b, 0, c, kNR, true);
}

// panel += A B with A lower triangular (zeros above its diagonal): half the work.
AF_INLINE void lower_product(int64_t live, int64_t vectors, const float* a, const float* b,
                             float* c) {
  for (int64_t row = 0; row < live; row += kMR) {
    panel_tile<kMR, kChunk, 1>(vectors, min64(row + kMR, live), a + row * kChunk, b, c + row * kNR);
  }
}

// panel += A^T B with the same A.
AF_INLINE void upper_product(int64_t live, int64_t vectors, const float* a, const float* b,
                             float* c) {
  for (int64_t row = 0; row < live; row += kMR) {
    panel_tile<kMR, 1, kChunk>(vectors, live - row, a + row * kChunk + row, b + row * kNR,
                               c + row * kNR);
  }
}

// ---- the triangular systems ----
// The erase matrix E[i][j] = -<k_i, k_j> decay (j < i, zeros elsewhere) never gets inverted: block
// forward substitution on the right-hand side stays accurate on identical keys, where powers of E
// explode.
constexpr int kSolveRows = kLanes == 16 ? 8 : 4;  // divides kSub

// error_i = x_i + sum_{j < i} E_ij write_j, write_i = beta_i error_i; x is overwritten by error.
[[gnu::noinline]] static void solve_forward(int64_t live, int64_t vectors, const float* erase,
                                            const float* beta, float* error, float* write) {
  for (int64_t first = 0; first < live; first += kSub) {
    for (int64_t r = first; first > 0 && r < first + kSub; r += kSolveRows) {
      panel_tile<kSolveRows, kChunk, 1>(vectors, first, erase + r * kChunk, write, error + r * kNR);
    }
    for (int64_t j = first; j < first + kSub; ++j) {
      VecF w0 = load(error + j * kNR) * splat(beta[j]);
      VecF w1 = load(error + j * kNR + kLanes) * splat(beta[j]);
      store(write + j * kNR, w0), store(write + j * kNR + kLanes, w1);
      for (int64_t i = j + 1; i < first + kSub; ++i) {
        VecF e = splat(erase[i * kChunk + j]);
        float* x = error + i * kNR;
        store(x, fma(e, w0, load(x)));
        store(x + kLanes, fma(e, w1, load(x + kLanes)));
      }
    }
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
