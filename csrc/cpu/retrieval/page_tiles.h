// The two products of page_bounds.h on matrix tiles, for bounds in int8: pages are the rows of A as
// they lie in memory, the rows of a KV head the columns of B, in codes too. Their sums are exact; Q
// is right to a part in 32,000 of its largest element.
#pragma once

#include "cpu/micro/tile_pack.h"
#include "cpu/retrieval/page_bounds.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kPageBlock = 2 * kTileRows;   // pages at a time
using BoundScope = TileScope;                   // stands around blocks
constexpr int64_t kBoundRows = kTileRows / 2;   // rows at a time: a column for each of two codes
constexpr int64_t kCodeDepth = 2 * kTileDepth;  // codes of a row of A
constexpr float kMostCode = 127.0f * 128.0f;    // of Q, 128 times the one code and the other

AF_INLINE bool served_by_tiles(const PageScoresParams& params) {
  return params.scale.data && params.problem.softmax_scale > 0.0f;
}
template <class F>
AF_INLINE void dispatch_bounds(const PageScoresParams&, const F& f) {
  f(Int8{});
}

// The rows of a KV head as B, kBoundRows at a time: tiles of max(0, q), then of min(0, q), each of
// 15 bits and a sign in two codes; columns of high codes, then of low ones.
struct BoundQueries {
  char* base;
  int64_t rows, dim;

  AF_INLINE_MEMBER static int64_t scale_bytes(int64_t rows) { return round_up(rows, kLanes) * 4; }
  AF_INLINE_MEMBER static int64_t tile_bytes(int64_t dim) {
    return 2 * ceil_div(dim, kCodeDepth) * kCodeDepth * kTileRows;
  }
  AF_INLINE_MEMBER static int64_t bytes(int64_t rows, int64_t dim) {
    return scale_bytes(rows) + ceil_div(rows, kBoundRows) * tile_bytes(dim);
  }
  AF_INLINE_MEMBER static BoundQueries of(char* base, int64_t rows, int64_t dim) {
    return {base, rows, dim};
  }
  AF_INLINE_MEMBER float* scales() const { return reinterpret_cast<float*>(base); }
  AF_INLINE_MEMBER int8_t* tiles(int64_t row) const {
    return reinterpret_cast<int8_t*>(base + scale_bytes(rows) + row / kBoundRows * tile_bytes(dim));
  }

  // row(r, x) gives row r as fp32, not scaled. Rows that are not finite have a scale of NaN.
  template <class E, class Row>
  AF_INLINE_MEMBER void pack(float scale, const Row& row) const {
    fill(scales(), 0, round_up(rows, kLanes), 0.0f);
    __builtin_memset(tiles(0), 0, bytes(rows, dim) - scale_bytes(rows));
    for (int64_t r = 0; r < rows; ++r) {
      float x[kMostDim + kLanes], most = 0.0f;
      row(r, x);
      VecF poison{};
      for (int64_t d = 0; d < dim; d += kLanes) {
        poison += load(x + d) * splat(0.0f);
        const float top = reduce_max(vabs(load(x + d)));
        most = top > most ? top : most;
      }
      if (reduce_add(poison) != 0.0f) {  // NaN
        scales()[r] = __builtin_nanf("");
        continue;
      }
      if (most == 0.0f) continue;
      scales()[r] = most / kMostCode * scale;
      for (int64_t d = 0; d < dim; ++d) {
        const auto code = static_cast<int32_t>(__builtin_rintf(x[d] / most * kMostCode));
        const int32_t high = (code + 64) >> 7;
        int8_t* at = tiles(r) + (code > 0 ? 0 : tile_bytes(dim) / 2) +
                     d / kCodeDepth * kCodeDepth * kTileRows + d % kCodeDepth / 4 * 64 + d % 4 +
                     r % kBoundRows * 4;
        at[0] = static_cast<int8_t>(high);
        at[kBoundRows * 4] = static_cast<int8_t>(code - 128 * high);
      }
    }
  }
};

// A block of rows of bounds as A: where they lie, if a fixed way apart and whole tiles long, or a
// copy of them.
struct BoundRows {
  const Int8* rows;
  int64_t stride;

  AF_INLINE_MEMBER BoundRows(const Int8* const (&x)[kPageBlock], int64_t dim, Int8* copy) {
    const int64_t step = x[1] - x[0], depth = round_up(dim, kCodeDepth);
    bool even = dim == depth;
    for (int64_t j = 2; j < kPageBlock; ++j) even &= x[j] - x[j - 1] == step;
    rows = even ? x[0] : copy, stride = even ? step : depth;
    if (even) return;
    for (int64_t j = 0; j < kPageBlock; ++j) {
      __builtin_memcpy(copy + j * depth, x[j], dim);
      __builtin_memset(static_cast<void*>(copy + j * depth + dim), 0, depth - dim);
    }
  }
};

// sums [page][column] of one group of rows; soon(n) between steps.
template <class Soon>
AF_INLINE void sum_codes(const BoundRows& high, const BoundRows& low, int64_t steps,
                         const int8_t* b, int32_t* sums, Soon& soon) {
  Tiles t;
  t.zero<0>(), t.zero<1>();
  for (int64_t half = 0; half < 2; ++half) {
    const BoundRows& a = half ? low : high;
    const Int8* rows = a.rows;
    for (int64_t step = 0; step < steps; ++step, rows += kCodeDepth, b += kCodeDepth * kTileRows) {
      t.load<6>(b, 64);
      t.load<4>(rows, a.stride);
      t.dot_codes<0, 4, 6>();
      soon(2);
      t.load<5>(rows + kTileRows * a.stride, a.stride);
      t.dot_codes<1, 5, 6>();
      soon(2);
    }
  }
  t.store<0>(sums, 64);
  t.store<1>(sums + kTileRows * kTileRows, 64);
}

// bounds [row][kPageBlock] of rows [r0, r0 + rows), less the scales of pages.
template <class Soon>
AF_INLINE void bound_block(const BoundQueries& q, int64_t r0, int64_t rows,
                           const Pages<Int8, kPageBlock>& pages, int64_t, Soon& soon,
                           float* bounds) {
  Int8 copy[2][kPageBlock * (kMostDim + kCodeDepth)];
  int32_t sums[kPageBlock * kTileRows];
  sum_codes(BoundRows(pages.high, q.dim, copy[0]), BoundRows(pages.low, q.dim, copy[1]),
            ceil_div(q.dim, kCodeDepth), q.tiles(r0), sums, soon);
  for (int64_t page = 0; page < kPageBlock; page += kLanes) {
    VecU x[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) x[i] = load_raw<VecU>(sums + (page + i) * kTileRows);
    transpose_pairs(x);
    for (int64_t r = 0; r < rows; ++r) {
      const VecF high = __builtin_convertvector((VecI)x[r], VecF),
                 low = __builtin_convertvector((VecI)x[kBoundRows + r], VecF);
      store(bounds + r * kPageBlock + page,
            fma(high, splat(128.0f), low) * splat(q.scales()[r0 + r]));
    }
  }
}

}  // namespace
}  // namespace attnforge::cpu::ATTNFORGE_ISA
