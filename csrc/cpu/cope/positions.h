// Contextual positions of one row of scores: gates, their sums from the right, the interpolated
// table, and all of it backwards.
//
//   x_j = scale <q, k_j>    g_j = sigmoid(x_j)    p_j = min(sum of g_t over t >= j, top)
//   s_j = x_j + T[n] + (p_j - n) (T[n + 1] - T[n]),  n = min(floor(p_j), top - 1),  T = q E
//
// Once the sum has reached `top` all keys further left have the last position, no gates and no
// gradient through them: such a row is plain attention with one constant more.
#pragma once

#include "attnforge/cope.h"
#include "cpu/micro/softmax.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// x plus x moved by kStep lanes, zeros following. Steps are template arguments: GCC builds the
// indices of a shuffle that it does not know lane by lane, at run time.
template <int kStep>
AF_INLINE VecF add_right(VecF x) {
  VecI from;
  for (int i = 0; i < kLanes; ++i) from[i] = i + kStep;  // at or past kLanes: a zero
  return x + __builtin_shuffle(x, VecF{}, from);
}
template <int kStep>
AF_INLINE VecF add_left(VecF x) {
  VecI from;
  for (int i = 0; i < kLanes; ++i) from[i] = i >= kStep ? i - kStep : kLanes;
  return x + __builtin_shuffle(x, VecF{}, from);
}

// Lane i gets the sum over the lanes at and right of it; prefix: at and left of it.
AF_INLINE VecF suffix_sums(VecF x) {
  x = add_right<2>(add_right<1>(x));
  if constexpr (kLanes > 4) x = add_right<4>(x);
  if constexpr (kLanes > 8) x = add_right<8>(x);
  return x;
}
AF_INLINE VecF prefix_sums(VecF x) {
  x = add_left<2>(add_left<1>(x));
  if constexpr (kLanes > 4) x = add_left<4>(x);
  if constexpr (kLanes > 8) x = add_left<8>(x);
  return x;
}

AF_INLINE VecF gather(const float* table, VecI index) {
#if ATTNFORGE_LANES == 16 && defined(__AVX512F__)
  return (VecF)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif ATTNFORGE_LANES == 8 && defined(__AVX2__)
  return (VecF)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = table[index[i]];
  return load(lanes);
#endif
}

// The table of one row in base 2, and its steps: slope[n] = value[n + 1] - value[n].
struct RowTable {
  float *value, *slope;  // [padded]
  int64_t top;           // the last position

  // value holds q E in natural units.
  AF_INLINE_MEMBER void finish(int64_t padded) const {
    for (int64_t n = 0; n < padded; n += kLanes) store(value + n, load(value + n) * splat(kLog2E));
    for (int64_t n = 0; n < top; ++n) slope[n] = value[n + 1] - value[n];
  }
};

// Columns [0, n) of a row, n a multiple of kLanes; it sees [lo, hi) of them.
struct RowSpan {
  int64_t n, lo, hi;

  AF_INLINE_MEMBER VecI seen(int64_t c) const {
    VecI index;
    for (int i = 0; i < kLanes; ++i) index[i] = i;
    index += static_cast<int32_t>(c);
    return (index >= static_cast<int32_t>(lo)) & (index < static_cast<int32_t>(hi));
  }
};

// What a vector of products becomes.
struct Gated {
  VecF gate, position, weight, score;  // weight: position - index
  VecI index;
};

// The logistic function of a base-2 logit.
AF_INLINE VecF gate_of(VecF x2) {
  const VecF tail = exp2(splat(0.0f) - vabs(x2));
  return (x2 >= splat(0.0f) ? splat(1.0f) : tail) / (splat(1.0f) + tail);
}

// products: raw <q, k>; carry: the sum of gates right of them, updated.
AF_INLINE Gated gated(VecF products, float scale2, VecI seen, const RowTable& t, float& carry) {
  Gated r;
  const VecF x2 = products * splat(scale2), top = splat(static_cast<float>(t.top));
  r.gate = seen ? gate_of(x2) : VecF{};
  const VecF sums = suffix_sums(r.gate) + splat(carry);
  carry = sums[0];
  r.position = sums > top ? top : sums;  // a NaN stays
  VecI n = __builtin_convertvector(r.position, VecI);
  const VecI last = splat_int(static_cast<int32_t>(t.top - 1)), zero{};
  n = n > last ? last : n;
  r.index = n < zero ? zero : n;  // what a NaN converts to
  r.weight = r.position - __builtin_convertvector(r.index, VecF);
  const VecF bias = fma(r.weight, gather(t.slope, r.index), gather(t.value, r.index));
  r.score = seen ? x2 + bias : splat(-kInf);
  return r;
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
