// Packing: the three operand layouts that gemm.h reads, widened to fp32 on the way.
//
//   row groups     A operand: [rows / kMR][dim][kMR], rows padded with zeros to a whole group
//   key panels     B = K^T:   [keys / kNR][dim][kNR], keys padded with zeros to a whole panel
//   column panels  B = V:     [dim / kNR][rows][kNR], columns padded with zeros to a whole vector
#pragma once

#include "cpu/micro/gemm.h"
#include "cpu/simd/codes.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// Rows of one head lie a whole token apart: too far for the hardware to foresee the next one.
// Into L2: as many requests for L1 fill its miss queue and halve the rate (measured in decode,
// Zen 4: 43% of the read bandwidth against 70 to 90%).
template <class T>
AF_INLINE void prefetch_row(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 512 / kBits<T>) __builtin_prefetch(channel(row, d), 0, 2);
}
constexpr int64_t kRowsAhead = 8;

// One row (of `dim` elements, unit stride) into its place in the row groups, times scale.
template <class T>
AF_INLINE void pack_row(const T* src, int64_t dim, float scale, int64_t row, float* groups) {
  float* dst = groups + row / kMR * kMR * dim + row % kMR;
  for (int64_t d = 0; d < dim; d += kLanes) {
    int64_t n = min64(kLanes, dim - d);
    float lanes[kLanes];
    store(lanes, load_partial(src + d, n) * splat(scale));
    for (int64_t i = 0; i < n; ++i) dst[(d + i) * kMR] = lanes[i];
  }
}

AF_INLINE void zero_rows(int64_t first, int64_t end, int64_t dim, float* groups) {
  for (int64_t row = first; row < end; ++row) {
    float* dst = groups + row / kMR * kMR * dim + row % kMR;
    for (int64_t d = 0; d < dim; ++d) dst[d * kMR] = 0.0f;
  }
}

// Channels [d, dim) of keys [j, j + 4) into a key panel, four by four; dim is a multiple of 4.
template <class Row>
AF_INLINE void pack_four_keys(const Row& row, int64_t j, int64_t keys, int64_t d, int64_t dim,
                              float* panel) {
  const int64_t n = max64(0, min64(4, keys - j));
  for (; d < dim; d += 4) {
    Vec4 r[4] = {};
    for (int64_t i = 0; i < n; ++i) r[i] = load4(channel(row(j + i), d));
    transpose4(r[0], r[1], r[2], r[3]);
    for (int64_t i = 0; i < 4; ++i) store4(panel + (d + i) * kNR + j, r[i]);
  }
}

#if (ATTNFORGE_LANES == 16 && defined(__AVX512F__)) || (ATTNFORGE_LANES == 8 && defined(__AVX2__))
// Whole vectors of keys are transposed in registers, log2(kLanes) shuffles per vector of dwords.
// bf16 goes two channels to a dword and is widened afterwards.
template <class T>
constexpr int64_t kPackStep = kLanes;  // channels at a time
template <>
constexpr int64_t kPackStep<BFloat16> = 2 * kLanes;
template <>
constexpr int64_t kPackStep<Int4> = 0;  // is not loaded by whole vectors

AF_INLINE VecU load_dwords(const BFloat16* p) {
  return load_raw<VecU>(p);
}
template <class T>
AF_INLINE VecU load_dwords(const T* p) {
  return float_to_bits(load(p));
}
AF_INLINE void store_dwords(BFloat16, VecU x, int64_t i, float* panel) {
  store(panel + 2 * i * kNR, bits_to_float(x << 16));
  store(panel + (2 * i + 1) * kNR, bits_to_float(x & 0xffff0000u));
}
template <class T>
AF_INLINE void store_dwords(T, VecU x, int64_t i, float* panel) {
  store(panel + i * kNR, bits_to_float(x));
}

#if ATTNFORGE_LANES == 16
// One stage of a transposition: blocks of S x S off the diagonal change places.
template <int S>
AF_INLINE void exchange(VecU (&r)[kLanes]) {
  VecU low, high;
  for (int l = 0; l < kLanes; ++l) {
    low[l] = l & S ? kLanes + l - S : l;
    high[l] = l & S ? kLanes + l : l + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const VecU a = r[i], b = r[i + S];
    r[i] = __builtin_shuffle(a, b, low);
    r[i + S] = __builtin_shuffle(a, b, high);
  }
}
AF_INLINE void transpose_keys(VecU (&r)[kLanes]) {
  exchange<1>(r);
  exchange<2>(r);
  exchange<4>(r);
  exchange<8>(r);
}
#else
// By instructions of one shuffle each: neighbours interleaved twice, then halves put together.
AF_INLINE void transpose_keys(VecU (&r)[kLanes]) {
  constexpr VecU kLow = {0, 8, 1, 9, 4, 12, 5, 13}, kHigh = {2, 10, 3, 11, 6, 14, 7, 15};
  constexpr VecU kLowPairs = {0, 1, 8, 9, 4, 5, 12, 13}, kHighPairs = {2, 3, 10, 11, 6, 7, 14, 15};
  constexpr VecU kFirst = {0, 1, 2, 3, 8, 9, 10, 11}, kLast = {4, 5, 6, 7, 12, 13, 14, 15};
  VecU pair[kLanes], four[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 2) {
    pair[i] = __builtin_shuffle(r[i], r[i + 1], kLow);
    pair[i + 1] = __builtin_shuffle(r[i], r[i + 1], kHigh);
  }
#pragma GCC unroll 2
  for (int i = 0; i < kLanes; i += 4) {  // channels 0 and 4, 1 and 5 .. of keys i .. i + 3
    four[i] = __builtin_shuffle(pair[i], pair[i + 2], kLowPairs);
    four[i + 1] = __builtin_shuffle(pair[i], pair[i + 2], kHighPairs);
    four[i + 2] = __builtin_shuffle(pair[i + 1], pair[i + 3], kLowPairs);
    four[i + 3] = __builtin_shuffle(pair[i + 1], pair[i + 3], kHighPairs);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = __builtin_shuffle(four[i], four[i + 4], kFirst);
    r[i + 4] = __builtin_shuffle(four[i], four[i + 4], kLast);
  }
}
#endif

// kLanes keys from row(j) on, which are of type T; returns the channels done.
template <class T, class Row>
AF_INLINE int64_t pack_vector_of_keys(const Row& row, const T*, int64_t j, int64_t dim,
                                      float* panel) {
  int64_t d = 0;
  if constexpr (kPackStep<T> > 0) {
    const T* rows[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = row(j + i);
    for (; d + kPackStep<T> <= dim; d += kPackStep<T>) {
      VecU r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) r[i] = load_dwords(rows[i] + d);
      transpose_keys(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store_dwords(T{}, r[i], i, panel + d * kNR + j);
    }
  }
  return d;
}
#else
template <class T, class Row>
AF_INLINE int64_t pack_vector_of_keys(const Row&, const T*, int64_t, int64_t, float*) {
  return 0;
}
#endif

// Up to kNR of `keys` keys into one key panel; row(j) is key j, dim is a multiple of 4.
template <class Row>
AF_INLINE void pack_key_rows(const Row& row, int64_t keys, int64_t dim, float* panel) {
  for (int64_t j = 0; j < kNR; j += kLanes) {
    for (int64_t i = j + kRowsAhead; i < min64(j + kRowsAhead + kLanes, keys); ++i) {
      prefetch_row(row(i), dim);
    }
    int64_t d = 0;
    if (j + kLanes <= keys) d = pack_vector_of_keys(row, row(j), j, dim, panel);
    for (int64_t i = j; i < j + kLanes; i += 4) pack_four_keys(row, i, keys, d, dim, panel);
  }
}

// The same with rows at a distance of `stride` elements.
template <class T>
AF_INLINE void pack_key_panel(const T* src, int64_t stride, int64_t keys, int64_t dim,
                              float* panel) {
  pack_key_rows([=](int64_t j) { return src + j * stride; }, keys, dim, panel);
}

// Rows into column panels (panel_stride >= rows * kNR floats apart); value(j, x) is what a vector
// of row j becomes. Returns true if every element was finite.
template <class Row, class Value>
AF_INLINE bool pack_value_rows(const Row& row, const Value& value, int64_t rows, int64_t dim,
                               float* panels, int64_t panel_stride) {
  VecF poison{};
  for (int64_t j = 0; j < rows; ++j) {
    if (j + kRowsAhead < rows) prefetch_row(row(j + kRowsAhead), dim);
    const auto* src = row(j);
    for (int64_t d = 0; d < dim; d += kLanes) {
      VecF x = value(j, load_partial(channel(src, d), dim - d));
      poison += x * splat(0.0f);  // NaN as soon as one element is NaN or infinite
      store(panels + d / kNR * panel_stride + j * kNR + d % kNR, x);
    }
  }
  return reduce_add(poison) == 0.0f;
}

// The same with rows at a distance of `stride` elements, times scale.
template <class T>
AF_INLINE bool pack_column_panels(const T* src, int64_t stride, int64_t rows, int64_t dim,
                                  float scale, float* panels, int64_t panel_stride) {
  return pack_value_rows([=](int64_t j) { return src + j * stride; },
                         [=](int64_t, VecF x) { return x * splat(scale); }, rows, dim, panels,
                         panel_stride);
}

// y += a * x, where x is one row of column panels.
AF_INLINE void axpy_panels(float a, const float* panels, int64_t panel_stride, int64_t dim,
                           float* y) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    const float* x = panels + d / kNR * panel_stride + d % kNR;
    store(y + d, fma(splat(a), load(x), load(y + d)));
  }
}

AF_INLINE int64_t vectors_of(int64_t columns) {
  return ceil_div(columns, kLanes);
}
AF_INLINE int64_t padded_columns(int64_t columns) {
  return round_up(columns, kNR);
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
