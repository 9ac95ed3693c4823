// softmax_row of softmax.h for tiles: the scale of the scores on the way in, rounding on the way
// out.
#pragma once

#include "cpu/micro/softmax.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// Two vectors of weights as bf16, side by side.
AF_INLINE void store_rounded(BFloat16* p, VecF x, VecF y) {
#if defined(__AVX512BF16__)
  store_raw(p, _mm512_cvtne2ps_pbh((__m512)y, (__m512)x));
#else
  store(p, x);
  store(p + kLanes, y);
#endif
}

// 2^x for x <= 127 with 12 instructions where exp2() takes 14, relative error below 2 ulp: of x
// rounded to a 32nd, n + j / 32, 2^(j / 32) comes from a table that lies in two registers, and a
// polynomial of degree 2 does the rest. Below -126 it ends in 0, NaN stays NaN.
alignas(64) constexpr uint32_t kExp2Table[32] = {
    // bits of 2^(j / 32), less j << 18
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};

AF_INLINE VecU exp2_table(VecU index) {
#if defined(__AVX512F__)
  return (VecU)_mm512_permutex2var_epi32(_mm512_load_si512(kExp2Table), (__m512i)index,
                                         _mm512_load_si512(kExp2Table + 16));
#else
  VecU x;
  for (int i = 0; i < kLanes; ++i) x[i] = kExp2Table[index[i] % 32];
  return x;
#endif
}

AF_INLINE VecF exp2_by_table(VecF x) {
  x = vmax(splat(-127.0f), x);
  const VecF magic = splat(0x1.8p18f);  // leaves 32 n + j in the low bits
  const VecF shifted = x + magic;
  const VecF f = x - (shifted - magic);
  const VecU bits = float_to_bits(shifted);
  const VecF power = bits_to_float((bits << 18) + exp2_table(bits));
  // Minimax of (2^f - 1) / f on [-1/64, 1/64]: 5.3e-8 of 2^f before rounding.
  const VecF q = fma(splat(0x1.ebfbecp-3f), f, splat(0x1.62e584p-1f));
  return fma(power * f, q, power);
}

// p becomes 2^(scale s - m) in bf16, m and l are updated; l sums weights before rounding. scale >
// 0. p may begin where s does. Returns the factor for what was accumulated under the old maximum.
AF_INLINE float softmax_row_rounded(const float* s, int64_t n, float scale, BFloat16* p, float& m,
                                    float& l) {
  VecF max0 = splat(-kInf), max1 = max0;
  for (int64_t c = 0; c < n; c += kNR) {
    max0 = vmax(load(s + c), max0);
    max1 = vmax(load(s + c + kLanes), max1);
  }
  const float top = reduce_max(vmax(max0, max1)) * scale;
  float alpha = 1.0f;
  if (top > m + kMaxSlack) {
    alpha = m == -kInf ? 0.0f : exp2(splat(m - top))[0];
    m = top;
  }
  const VecF base = splat(m == -kInf ? 0.0f : m), factor = splat(scale);
  VecF sum0{}, sum1{};
  for (int64_t c = 0; c < n; c += kNR) {
    const VecF p0 = exp2_by_table(load(s + c) * factor - base);
    const VecF p1 = exp2_by_table(load(s + c + kLanes) * factor - base);
    sum0 += p0;
    sum1 += p1;
    store_rounded(p + c, p0, p1);
  }
  l = l * alpha + reduce_add(sum0 + sum1);
  return alpha;
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
