// The two products of decode, on rows of K and V as they lie in memory: up to four query rows at a
// time, scores [key][kRows]. What they are for is told in decode_tasks.h.
#pragma once

#include "cpu/flash/keys.h"
#include "cpu/simd/float8.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int64_t kRows = 4;  // rows of a register group

// Rounds of a walk for each of some steps; small numbers are divided faster.
template <class E>
AF_INLINE int64_t share_of(const RowsAhead<E>* walk, int64_t steps) {
  const uint32_t left = walk ? static_cast<uint32_t>(walk->left) : 0;
  const uint32_t n = static_cast<uint32_t>(max64(1, steps));
  return (left + n - 1) / n;
}

// ---- QK: scores [key][kRows] ----

// Keys per step: the dot products of kDotKeys keys and four rows fill whole vectors.
constexpr int kDotKeys = kLanes == 16 ? 4 : 2;

template <int R, class T>
AF_INLINE void dot_keys(const float* q, int64_t ldq, const T* const (&k)[kDotKeys], int64_t dim,
                        float* s) {
  VecF acc[kDotKeys * kRows]{};  // [key][row]
  auto step = [&](int64_t d, const VecF(&x)[kDotKeys]) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      VecF row = load(q + r * ldq + d);
#pragma GCC unroll 4
      for (int j = 0; j < kDotKeys; ++j) acc[j * kRows + r] = fma(row, x[j], acc[j * kRows + r]);
    }
  };
  VecF x[kDotKeys];
  NanWatch<T> watch[kDotKeys];
  int64_t d = 0;
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) {
      watch[j].see(channel(k[j], d));
      x[j] = load_pair<0>(channel(k[j], d));
    }
    step(d, x);
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_pair<1>(channel(k[j], d));
    step(d + kLanes, x);
  }
  // What pairs leave is at most two vectors: no loop, in which the sums would live on the stack.
  auto tail = [&]() __attribute__((always_inline)) {
    if (d >= dim) return;
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_partial(channel(k[j], d), dim - d);
    step(d, x);
    d += kLanes;
  };
  tail();
  tail();
#pragma GCC unroll 2
  for (int i = 0; i < kDotKeys * kRows; i += kLanes) store(s + i, sum_each(acc + i));
#pragma GCC unroll 4
  for (int j = 0; j < kDotKeys; ++j) {
    for (int r = 0; r < R && watch[j].any(); ++r) s[j * kRows + r] = __builtin_nanf("");
  }
}

// What *walk allows is walked meanwhile. noclone: GCC's copy for constant arguments keeps pointers
// in vectors, and those on the stack.
template <int R, class Keys>
[[gnu::noinline, gnu::noclone]] static void scores(const float* q, int64_t ldq, const Keys& keys,
                                                   int64_t n, int64_t dim,
                                                   RowsAhead<typename Keys::Element>* walk,
                                                   float* s) {
  const int64_t share = share_of(walk, ceil_div(n, kDotKeys));
  for (int64_t c = 0; c < n; c += kDotKeys) {
    if (share > 0) ask_for(*walk, share);
    const typename Keys::Element* k[kDotKeys];
    for (int64_t j = 0; j < kDotKeys; ++j) {  // beyond the last key: the last key again
      k[j] = keys.k_row(min64(c + j, n - 1));
    }
    dot_keys<R>(q, ldq, k, dim, s + c * kRows);
  }
}

// ---- PV: O[r] += sum over keys of p[key][r] * V[key] ----

// Columns [d, d + NV vectors) of V.
template <int R, int NV, class Keys>
AF_INLINE void weigh_columns(const float* p, const Keys& keys, int64_t n, int64_t d, int64_t tail,
                             float* o, int64_t ldo) {
  VecF acc[R][NV];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[r][j] = load(o + r * ldo + j * kLanes);
  NanWatch<typename Keys::Element> watch[(NV + 1) / 2];
  // Turns are so short that GCC would write them out, and spill.
#pragma GCC unroll 1
  for (int64_t c = 0; c < n; ++c, p += kRows) {
    const auto* v = channel(keys.v_row(c), d);
    VecF x[NV];
    if constexpr (NV == 1) x[0] = load_partial(v, tail);
#pragma GCC unroll 4
    for (int j = 0; j + 1 < NV; j += 2) {
      watch[j / 2].see(channel(v, j * kLanes));
      x[j] = load_pair<0>(channel(v, j * kLanes));
      x[j + 1] = load_pair<1>(channel(v, j * kLanes));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      VecF weight = splat(p[r]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[r][j] = fma(weight, x[j], acc[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j + 1 < NV; j += 2) {
    if (!watch[j / 2].any()) continue;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      acc[r][j] += watch[j / 2].template lanes<0>();
      acc[r][j + 1] += watch[j / 2].template lanes<1>();
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(o + r * ldo + j * kLanes, acc[r][j]);
}

// Keys between which prefetches have their turn: 4 KiB of a row of 128 channels. Codes have fewer
// lines and more arithmetic.
template <class E>
constexpr int64_t kTurnKeys = kBits<E> >= 16 ? 16 : 64;

// As many columns at a time as there are accumulators, then pairs, then what pairs leave: the order
// of Q K and of O. What *walk allows is walked meanwhile.
template <int R, class Keys>
[[gnu::noinline]] static void weigh(const float* p, Keys keys, int64_t n, int64_t dim,
                                    RowsAhead<typename Keys::Element>* walk, float* o,
                                    int64_t ldo) {
  constexpr int kColumns = kLanes == 16 || (kLanes == 8 && R <= 2) ? 4 : 2;  // vectors
  constexpr int64_t kTurn = kTurnKeys<typename Keys::Element>;
  const int64_t share = share_of(walk, ceil_div(n, kTurn) * (dim / (kColumns * kLanes)));
  for (; n > 0; n -= kTurn, p += kTurn * kRows, keys.skip(kTurn)) {
    const int64_t turn = min64(n, kTurn);
    int64_t d = 0;
    for (; d + kColumns * kLanes <= dim; d += kColumns * kLanes) {
      if (share > 0) ask_for(*walk, share);
      weigh_columns<R, kColumns>(p, keys, turn, d, 0, o + d, ldo);
    }
    if constexpr (kColumns > 2) {
      for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
        weigh_columns<R, 2>(p, keys, turn, d, 0, o + d, ldo);
      }
    }
    for (; d < dim; d += kLanes) weigh_columns<R, 1>(p, keys, turn, d, dim - d, o + d, ldo);
  }
  if (share > 0) ask_for(*walk, walk->left);
}

template <int N>
struct Int {
  static constexpr int value = N;
};

template <class F>
AF_INLINE void dispatch_rows(int64_t rows, const F& f) {
  if (rows == 1) return f(Int<1>{});
  if (rows == 2) return f(Int<2>{});
  if (rows == 3) return f(Int<3>{});
  f(Int<4>{});
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
