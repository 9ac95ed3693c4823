// Dropout's choice for a row of weights: Philox4x32-10 (Salmon et al., 2011), a counter per 4 keys.
//
// Counter (key / 64 * 16 + key % 16, row, head, low word of the offset); of its four words key
// takes number key / 16 % 4. So 64 keys in a row are 16 counters, and kLanes counters at once give
// four runs of kLanes neighbours.
#pragma once

#include "cpu/micro/gemm.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int64_t kDropoutRun = 64;

// One row of one head.
struct Dropout {
  uint32_t key0, key1, offset, head, row;
  uint32_t dropped_to;
  float kept_scale;
};

AF_INLINE Dropout dropout_of(const FlashMods& m, int64_t head, int64_t row) {
  return {static_cast<uint32_t>(m.dropout_seed),
          static_cast<uint32_t>(m.dropout_seed >> 32 ^ m.dropout_offset >> 32),
          static_cast<uint32_t>(m.dropout_offset),
          static_cast<uint32_t>(head),
          static_cast<uint32_t>(row),
          m.dropped_to,
          m.kept_scale};
}

typedef uint64_t VecW __attribute__((vector_size(kLanes * 4)));

// The 64-bit products of the low halves of 64-bit lanes.
AF_INLINE VecW multiply_low(VecW a, VecW b) {
#if ATTNFORGE_LANES == 16 && defined(__AVX512F__)
  return (VecW)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif ATTNFORGE_LANES == 8 && defined(__AVX2__)
  return (VecW)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif ATTNFORGE_LANES == 4 && defined(__SSE2__)
  return (VecW)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

AF_INLINE void multiply_wide(VecU x, uint32_t factor, VecU& low, VecU& high) {
  const VecW a = __builtin_bit_cast(VecW, x), f = VecW{} + factor;
  const VecW even = multiply_low(a, f), odd = multiply_low(a >> 32, f);
  low = __builtin_bit_cast(VecU, (even & 0xffffffffu) | odd << 32);
  high = __builtin_bit_cast(VecU, even >> 32 | (odd & 0xffffffff00000000u));
}

// The four words of kLanes counters, in their place.
AF_INLINE void philox(uint32_t k0, uint32_t k1, VecU& c0, VecU& c1, VecU& c2, VecU& c3) {
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    VecU low0, high0, low1, high1;
    multiply_wide(c0, 0xD2511F53u, low0, high0);
    multiply_wide(c2, 0xCD9E8D57u, low1, high1);
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
  }
}

// What the weights of keys [key0, key0 + n) are multiplied by: 0 or kept_scale.
AF_INLINE void dropout_factors(const Dropout& d, int64_t key0, int64_t n, float* out) {
  VecU lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int64_t run = key0 / kDropoutRun; run * kDropoutRun < key0 + n; ++run) {
    float factors[kDropoutRun];
    for (int64_t t = 0; t < kDropoutRun / 4; t += kLanes) {
      VecU w0 = lane + static_cast<uint32_t>(run * (kDropoutRun / 4) + t);
      VecU w1 = VecU{} + d.row, w2 = VecU{} + d.head, w3 = VecU{} + d.offset;
      philox(d.key0, d.key1, w0, w1, w2, w3);
      auto put = [&](int64_t word, VecU w) __attribute__((always_inline)) {
        VecF factor = w > VecU{} + d.dropped_to ? splat(d.kept_scale) : splat(0.0f);
        store(factors + word * (kDropoutRun / 4) + t, factor);
      };
      put(0, w0), put(1, w1), put(2, w2), put(3, w3);
    }
    const int64_t first = max64(key0, run * kDropoutRun);
    const int64_t count = min64(key0 + n, (run + 1) * kDropoutRun) - first;
    __builtin_memcpy(out + (first - key0), factors + (first - run * kDropoutRun),
                     count * sizeof(float));
  }
}

AF_INLINE void multiply_row(float* x, const float* factors, int64_t n) {
  for (int64_t c = 0; c < n; c += kLanes) store(x + c, load(x + c) * load(factors + c));
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
