// Scores to probabilities, row by row, in the base-2 domain: score maps, masks, online softmax.
// (Score functions without a maximum keep natural units: their unit is 1 where it is log2(e) here.)
//
// A row of a score tile holds n columns, n a multiple of kNR. What a query may see is always one
// interval of keys, so a mask is two bounds, and columns outside are -inf before the maximum.
#pragma once

#include "cpu/micro/gemm.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr float kLn2 = 0.69314718055994530942f;

// What a logit in natural units is multiplied by.
AF_INLINE float score_unit(const FlashProblem& p) {
  const ScoreFn fn = p.mods.score_fn;
  return fn == ScoreFn::kSoftmax || fn == ScoreFn::kSignedSoftmax ? kLog2E : 1.0f;
}

// How q.k becomes a base-2 logit: cap2 * tanh(q_scale * q.k) with a softcap, q_scale * q.k without.
struct ScoreMap {
  float q_scale;  // folded into Q when it is packed
  float cap2;     // softcap * unit, or 0
};

AF_INLINE ScoreMap score_map(const FlashProblem& p) {
  if (p.softcap > 0.0f) return {p.softmax_scale / p.softcap, p.softcap * score_unit(p)};
  return {p.softmax_scale * score_unit(p), 0.0f};
}

// slope2 = ALiBi slope * unit of this (batch, head), 0 without.
AF_INLINE float alibi_slope2(const FlashProblem& p, int64_t batch, int64_t head) {
  if (!p.alibi_slopes) return 0.0f;
  return p.alibi_slopes[batch * p.alibi_batch_stride + head] * score_unit(p);
}

AF_INLINE VecF lane_index() {
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(i);
  return v;
}

// distance: position of the query minus position of column 0.
AF_INLINE void add_alibi(float* s, int64_t n, float slope2, int64_t distance) {
  for (int64_t c = 0; c < n; c += kLanes) {
    VecF d = splat(static_cast<float>(distance - c)) - lane_index();
    store(s + c, load(s + c) - splat(slope2) * vabs(d));
  }
}

AF_INLINE void apply_softcap(float* s, int64_t n, float cap2) {
  for (int64_t c = 0; c < n; c += kLanes) store(s + c, splat(cap2) * tanh(load(s + c)));
}

AF_INLINE void scale_row(float* s, int64_t n, float scale) {
  for (int64_t c = 0; c < n; c += kLanes) store(s + c, load(s + c) * splat(scale));
}

AF_INLINE void fill(float* s, int64_t lo, int64_t hi, float value) {
  int64_t c = lo;
  for (; c + kLanes <= hi; c += kLanes) store(s + c, splat(value));
  for (; c < hi; ++c) s[c] = value;
}

// Columns outside [lo, hi) become `value`: -inf before softmax, 0 for probabilities. n is a
// multiple of kLanes. Whole vectors only: a vector load after element stores would wait for all of
// them.
AF_INLINE void mask_row(float* s, int64_t n, int64_t lo, int64_t hi, float value) {
  const VecF index = lane_index(), outside = splat(value);
  const int64_t first = lo / kLanes * kLanes, last = hi / kLanes * kLanes;
  for (int64_t c = 0; c < first; c += kLanes) store(s + c, outside);
  if (first < lo && first < n) {
    store(s + first, index < splat(static_cast<float>(lo - first)) ? outside : load(s + first));
  }
  if (last < hi && last < n) {
    store(s + last, index < splat(static_cast<float>(hi - last)) ? load(s + last) : outside);
  }
  for (int64_t c = round_up(hi, kLanes); c < n; c += kLanes) store(s + c, outside);
}

// For a softmax over sizes: |x|, but what is hidden (-inf) stays so; and the sign, 0 at 0.
AF_INLINE VecF size_of(VecF x) {
  return x == splat(-kInf) ? x : vabs(x);
}
AF_INLINE VecF with_sign_of(VecF x, VecF size) {
  return x > splat(0.0f) ? size : x < splat(0.0f) ? splat(0.0f) - size : size * x;
}

// A maximum stays in force while scores are less than this above it, in the base-2 domain: weights
// are then up to 256 instead of 1, and few rows of few blocks have anything to rescale. (A branch
// that one row in three takes costs as much as a third of the exponentials.)
constexpr float kMaxSlack = 8.0f;

// One online-softmax step of a row: s becomes 2^(s - m), m and l are updated.
// Returns the factor for what was accumulated under the old maximum.
// A row that has seen only -inf keeps m = -inf and gets zeros: no (-inf) - (-inf) anywhere.
// kSigned: s becomes sign(s) 2^(|s| - m), and l sums the sizes.
template <bool kSigned = false>
AF_INLINE float softmax_row(float* s, int64_t n, float& m, float& l) {
  auto size = [](VecF x) __attribute__((always_inline)) { return kSigned ? size_of(x) : x; };
  VecF max0 = splat(-kInf), max1 = max0;
  for (int64_t c = 0; c < n; c += kNR) {
    max0 = vmax(size(load(s + c)), max0);
    max1 = vmax(size(load(s + c + kLanes)), max1);
  }
  const float top = reduce_max(vmax(max0, max1));
  float alpha = 1.0f;
  if (top > m + kMaxSlack) {
    alpha = m == -kInf ? 0.0f : exp2(splat(m - top))[0];
    m = top;
  }
  VecF base = splat(m == -kInf ? 0.0f : m);
  VecF sum0{}, sum1{};
  for (int64_t c = 0; c < n; c += kNR) {
    VecF s0 = load(s + c), s1 = load(s + c + kLanes);
    VecF p0 = exp2(size(s0) - base), p1 = exp2(size(s1) - base);
    store(s + c, kSigned ? with_sign_of(s0, p0) : p0);
    store(s + c + kLanes, kSigned ? with_sign_of(s1, p1) : p1);
    sum0 += p0;
    sum1 += p1;
  }
  l = l * alpha + reduce_add(sum0 + sum1);
  return alpha;
}

// The softcap of a row for the backward: s becomes cap2 tanh(s), `slope` its derivative by the
// uncapped logit.
AF_INLINE void apply_softcap_with_slope(float* s, int64_t n, float cap2, float* slope) {
  for (int64_t c = 0; c < n; c += kLanes) {
    VecF tanh_x = tanh(load(s + c));
    store(slope + c, fma(splat(0.0f) - tanh_x, tanh_x, splat(1.0f)));
    store(s + c, splat(cap2) * tanh_x);
  }
}

// Logits s and dP of a row become P = 2^(s - lse2) and dS = P (dP - delta) [slope].
AF_INLINE void softmax_row_backward(float* s, float* dp, int64_t n, float lse2, float delta,
                                    const float* slope) {
  for (int64_t c = 0; c < n; c += kLanes) {
    VecF prob = exp2(load(s + c) - splat(lse2));
    VecF ds = prob * (load(dp + c) - splat(delta));
    if (slope) ds *= load(slope + c);
    store(s + c, prob);
    store(dp + c, ds);
  }
}

// The end of a row whose base-2 statistics are (m, l): what multiplies the accumulated O, and the
// natural-log LSE. The sink is a virtual key with value 0: it enters the sum and the LSE, not O.
struct RowEnd {
  float scale;
  float lse;
};

AF_INLINE RowEnd finish_softmax(float m, float l, float sink) {
  if (sink == kInf) return {0.0f, kInf};
  float scale = 1.0f;
  if (sink != -kInf) {
    float top = sink * kLog2E;
    if (top > m) {
      scale = m == -kInf ? 0.0f : exp2(splat(m - top))[0];
      m = top;
    }
    l = l * scale + exp2(splat(top - m))[0];
  }
  if (l == 0.0f) return {0.0f, -kInf};
  double lse = static_cast<double>(m) * 0.693147180559945309417 + __builtin_log(l);
  return {scale / l, static_cast<float>(lse)};
}

// <dout, out + lo>; lo may be null.
template <class T, class U>
AF_INLINE float dot_residue(const T* dout, const U* out, const U* lo, int64_t dim) {
  VecF sum{};
  for (int64_t d = 0; d < dim; d += kLanes) {
    int64_t n = dim - d;
    VecF o = load_partial(out + d, n);
    if (lo) o += load_partial(lo + d, n);
    sum = fma(load_partial(dout + d, n), o, sum);
  }
  return reduce_add(sum);
}

// Rounds one row of O to the output type; `lo`, if wanted, gets what the rounding dropped.
template <class T>
AF_INLINE void store_output(const float* o, float scale, int64_t dim, T* out, T* lo) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    VecF exact = load(o + d) * splat(scale);
    T rounded[kLanes];
    store(rounded, exact);
    store_partial(out + d, exact, dim - d);
    if (lo) store_partial(lo + d, exact - load(rounded), dim - d);
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
