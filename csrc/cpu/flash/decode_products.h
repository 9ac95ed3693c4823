// The two products of decode, on rows of K and V as they lie in memory: up to four query rows at a
// time, scores [key][kRows]. What they are for is told in decode.cpp.
#pragma once

#include "cpu/micro/pack.h"
#include "cpu/simd/float8.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int64_t kRows = 4;                              // rows of a register group
constexpr int64_t kColumnVectors = kLanes == 16 ? 4 : 2;  // PV: 16 or 8 accumulators

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
      watch[j].see(k[j] + d);
      x[j] = load_pair<0>(k[j] + d);
    }
    step(d, x);
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_pair<1>(k[j] + d);
    step(d + kLanes, x);
  }
  // What pairs leave is at most two vectors: no loop, in which the sums would live on the stack.
  auto tail = [&]() __attribute__((always_inline)) {
    if (d >= dim) return;
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_partial(k[j] + d, dim - d);
    step(d, x);
    d += kLanes;
  };
  tail();
  tail();
#pragma GCC unroll 2
  for (int i = 0; i < kDotKeys * kRows; i += kLanes) store(s + i, sum_each(acc + i));
#pragma GCC unroll 4
  for (int j = 0; j < kDotKeys; ++j) {
    for (int r = 0; r < kRows && watch[j].any(); ++r) s[j * kRows + r] = __builtin_nanf("");
  }
}

// A run of keys of one kv head.
template <class T>
struct Keys {
  const T *k, *v;  // first key
  int64_t k_stride, v_stride;
  const T* next_k;  // what will be read next: prefetched meanwhile
};

template <int R, class T>
[[gnu::noinline]] static void scores(const float* q, int64_t ldq, const Keys<T>& keys, int64_t n,
                                     int64_t dim, int64_t v_dim, bool prefetch, float* s) {
  for (int64_t c = 0; c < n; c += kDotKeys) {
    const T* k[kDotKeys];
    for (int64_t j = 0; j < kDotKeys; ++j) {  // beyond the last key: the last key again
      const int64_t key = min64(c + j, n - 1);
      k[j] = keys.k + key * keys.k_stride;
      if (prefetch) {
        prefetch_row(keys.v + key * keys.v_stride, v_dim);
        if (keys.next_k) prefetch_row(keys.next_k + key * keys.k_stride, dim);
      }
    }
    dot_keys<R>(q, ldq, k, dim, s + c * kRows);
  }
}

// ---- PV: O[r] += sum over keys of p[key][r] * V[key] ----

template <int R, int NV, class T>
AF_INLINE void weigh_columns(const float* p, const T* v, int64_t stride, int64_t n, int64_t tail,
                             float* o, int64_t ldo) {
  VecF acc[R][NV];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = load(o + r * ldo + j * kLanes);
  NanWatch<T> watch[(NV + 1) / 2];
  for (int64_t c = 0; c < n; ++c, p += kRows, v += stride) {
    VecF x[NV];
    if constexpr (NV == 1) x[0] = load_partial(v, tail);
#pragma GCC unroll 4
    for (int j = 0; j + 1 < NV; j += 2) {
      watch[j / 2].see(v + j * kLanes);
      x[j] = load_pair<0>(v + j * kLanes);
      x[j + 1] = load_pair<1>(v + j * kLanes);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      VecF weight = splat(p[r]);
#pragma GCC unroll 4
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
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(o + r * ldo + j * kLanes, acc[r][j]);
}

template <int R, class T>
[[gnu::noinline]] static void weigh(const float* p, const T* v, int64_t stride, int64_t n,
                                    int64_t dim, float* o, int64_t ldo) {
  int64_t d = 0;
  for (; d + kColumnVectors * kLanes <= dim; d += kColumnVectors * kLanes) {
    weigh_columns<R, kColumnVectors>(p, v + d, stride, n, 0, o + d, ldo);
  }
  if constexpr (kColumnVectors > 2) {  // pairs, as many as there are: the order of Q K and of O
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
      weigh_columns<R, 2>(p, v + d, stride, n, 0, o + d, ldo);
    }
  }
  for (; d < dim; d += kLanes) weigh_columns<R, 1>(p, v + d, stride, n, dim - d, o + d, ldo);
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
