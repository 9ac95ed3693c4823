// The two products of page_bounds.h as chains of FMAs: kDotKeys pages x four rows of accumulators,
// as in decode. Q is scaled.
#pragma once

#include "cpu/flash/decode_products.h"
#include "cpu/retrieval/page_bounds.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

AF_INLINE VecF positive(VecF x) {
  return vmax(splat(0.0f), x);
}
AF_INLINE VecF negative(VecF x) {
  return splat(0.0f) - positive(splat(0.0f) - x);
}

constexpr int64_t kPageBlock = 16;
constexpr int64_t kBoundRows = kRows;
struct BoundScope {
  AF_INLINE_MEMBER ~BoundScope() {}
};

template <class F>
AF_INLINE void dispatch_bounds(const PageScoresParams& params, const F& f) {
  if (params.scale.data) return f(Int8{});
  dispatch_dtype(params.bounds_dtype, f);
}

// What is max(0, q) of some rows, and min(0, q): sum max(q low, q high) is two chains of FMAs.
struct SplitQuery {
  const float *up, *down;  // [kRows][ldq]
  int64_t ldq;
};

// Scaled halves of the rows of a KV head in pair order: max(0, q), behind them min(0, q).
struct BoundQueries {
  float* base;
  int64_t count, dim, rows, ldq;

  AF_INLINE_MEMBER static int64_t bytes(int64_t rows, int64_t dim) {
    return 2 * round_up(rows, kRows) * round_up(dim, kLanes) * 4;
  }
  AF_INLINE_MEMBER static BoundQueries of(char* base, int64_t rows, int64_t dim) {
    return {reinterpret_cast<float*>(base), rows, dim, round_up(rows, kRows),
            round_up(dim, kLanes)};
  }
  AF_INLINE_MEMBER SplitQuery from(int64_t row) const {
    return {base + row * ldq, base + (rows + row) * ldq, ldq};
  }

  template <class E, class Row>
  AF_INLINE_MEMBER void pack(float scale, const Row& row) const {
    for (int64_t r = 0; r < count; ++r) {
      float x[kMostDim + kLanes];
      row(r, x);
      const SplitQuery q = from(r);
      auto write = [&](int64_t d, VecF y) __attribute__((always_inline)) {
        y *= splat(scale);
        store(const_cast<float*>(q.up) + d, positive(y));
        store(const_cast<float*>(q.down) + d, negative(y));
      };
      int64_t d = 0;
      for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
        VecF a = load(x + d), b = load(x + d + kLanes);
        pair_up(E{}, a, b);
        write(d, a), write(d + kLanes, b);
      }
      for (; d < dim; d += kLanes) write(d, load(x + d));
    }
  }
};

// The bounds of kDotKeys pages for R rows: [page][kRows].
template <int R, class E>
[[gnu::noinline, gnu::noclone]] static void bound_pages(const SplitQuery& q,
                                                        const E* const (&low)[kDotKeys],
                                                        const E* const (&high)[kDotKeys],
                                                        int64_t dim, float* bounds) {
  VecF acc[kDotKeys * kRows]{};
  auto step = [&](const float* rows, int64_t d, const VecF(&x)[kDotKeys])
                  __attribute__((always_inline)) {
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) {
                      const VecF row = load(rows + r * q.ldq + d);
#pragma GCC unroll 4
                      for (int j = 0; j < kDotKeys; ++j)
                        acc[j * kRows + r] = fma(row, x[j], acc[j * kRows + r]);
                    }
                  };
  VecF x[kDotKeys];
  int64_t d = 0;
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_pair<0>(high[j] + d);
    step(q.up, d, x);
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_pair<1>(high[j] + d);
    step(q.up, d + kLanes, x);
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_pair<0>(low[j] + d);
    step(q.down, d, x);
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_pair<1>(low[j] + d);
    step(q.down, d + kLanes, x);
  }
  auto tail = [&]() __attribute__((always_inline)) {  // at most two vectors: see dot_keys
    if (d >= dim) return;
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_partial(high[j] + d, dim - d);
    step(q.up, d, x);
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_partial(low[j] + d, dim - d);
    step(q.down, d, x);
    d += kLanes;
  };
  tail();
  tail();
#pragma GCC unroll 2
  for (int i = 0; i < kDotKeys * kRows; i += kLanes) store(bounds + i, sum_each(acc + i));
}

// bounds [row][kPageBlock] of rows [r0, r0 + rows) and the first `count` pages.
template <class E, class Soon>
AF_INLINE void bound_block(const BoundQueries& queries, int64_t r0, int64_t rows,
                           const Pages<E, kPageBlock>& pages, int64_t count, Soon& soon,
                           float* bounds) {
  const SplitQuery q = queries.from(r0);
  for (int64_t page = 0; page < count; page += kDotKeys) {
    soon(kDotKeys);
    const E *low[kDotKeys], *high[kDotKeys];
    for (int64_t j = 0; j < kDotKeys; ++j)
      low[j] = pages.low[page + j], high[j] = pages.high[page + j];
    float own[kDotKeys * kRows];
    dispatch_rows(rows,
                  [&](auto r) { bound_pages<decltype(r)::value>(q, low, high, queries.dim, own); });
    for (int64_t j = 0; j < kDotKeys; ++j)
      for (int64_t r = 0; r < rows; ++r) bounds[r * kPageBlock + page + j] = own[j * kRows + r];
  }
}

}  // namespace
}  // namespace attnforge::cpu::ATTNFORGE_ISA
