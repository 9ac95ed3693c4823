// How likely it was that a key shares buckets with a query, from their angle alone.
//
// With p = 1 - angle / pi and P = p^bits, a key is hit at least twice in L tables with
//     u = 1 - (1 - P)^L - L P (1 - P)^(L - 1)
// and at least once with 1 - (1 - P)^L. Where L P < 1 the difference cancels: there the tail of the
// binomial distribution is summed term by term.
#pragma once

#include "cpu/micro/softmax.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr float kLeast = 1e-12f;  // of an inclusion probability that is a divisor
constexpr int kTerms = 12;        // of the binomial tail: the next one is below 1e-9 of the sum

AF_INLINE VecF square_root(VecF x) {
#if ATTNFORGE_LANES == 16 && defined(__AVX512F__)
  return (VecF)_mm512_sqrt_ps((__m512)x);
#elif ATTNFORGE_LANES == 8 && defined(__AVX__)
  return (VecF)_mm256_sqrt_ps((__m256)x);
#elif ATTNFORGE_LANES == 4 && defined(__SSE__)
  return (VecF)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// 1 - acos(c) / pi for c in [-1, 1], relative error below 1e-6 for either sign: Abramowitz and
// Stegun 4.4.46 gives acos of |c|, which is what is left of pi for a negative one.
AF_INLINE VecF collision(VecF c) {
  const VecF x = vabs(c);
  constexpr float kSeries[] = {0.0066700901f, -0.0170881256f, 0.0308918810f, -0.0501743046f,
                               0.0889789874f, -0.2145988016f, 1.5707963050f};
  VecF p = splat(-0.0012624911f);
  for (const float a : kSeries) p = fma(p, x, splat(a));
  const VecF part = p * square_root(splat(1.0f) - x) * splat(0.31830988618f);
  return c < splat(0.0f) ? part : splat(1.0f) - part;
}

AF_INLINE VecF power(VecF x, int64_t n) {
  VecF y = splat(1.0f);
  for (; n > 0; n >>= 1, x *= x) {
    if (n & 1) y *= x;
  }
  return y;
}

AF_INLINE VecF log_of(VecF x) {  // x > 0, normal
  const VecU bits = float_to_bits(x);
  const VecF exponent = __builtin_convertvector((VecI)(bits >> 23) - 127, VecF);
  const VecF m = bits_to_float((bits & 0x007fffffu) | 0x3f800000u);
  return fma(exponent, splat(kLn2), log1p_unit(m - splat(1.0f)));
}

// The probability that a key at cosine c is hit at least min_hits (1 or 2) times.
AF_INLINE VecF inclusion(VecF c, int64_t bits, int64_t tables, int64_t min_hits) {
  const float l = static_cast<float>(tables);
  const VecF one = splat(1.0f), p = power(collision(c), bits), miss = one - p;
  const VecF none = power(miss, tables - 1);
  VecF sure = one - none * miss, term = splat(l) * p * none;
  // From the term of j hits to that of j + 1: (l - j) / (j + 1) p / (1 - p).
  const VecF ratio = miss > splat(0.0f) ? p / miss : splat(0.0f);
  VecF tail = min_hits == 1 ? term : splat(0.0f);
  if (min_hits == 2) sure -= term;
  for (int j = 1; j <= kTerms; ++j) {
    term *= ratio * splat((l - static_cast<float>(j)) / static_cast<float>(j + 1));
    tail += term;
  }
  return p * splat(l) < one ? tail : sure;
}

// -log(u + clip), where u + clip counts as at least kLeast and at most 1.
AF_INLINE VecF log_bias_of(VecF cosine, int64_t bits, int64_t tables, int64_t min_hits,
                           float clip) {
  const VecF u = vmax(splat(kLeast), inclusion(cosine, bits, tables, min_hits) + splat(clip));
  return splat(0.0f) - log_of(u > splat(1.0f) ? splat(1.0f) : u);
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
