// Fast functions and conversions.
//
// The approximations flush subnormals to zero and are good to about 2 ulp (ex2, lg2, rcp) or 2^-11
// (tanh); the emulator computes them to fp32 accuracy, so it says nothing about their error.
#pragma once

#include "cuda/ptx/platform.h"

namespace attnforge::ptx {

// ex2.approx.ftz.f32: 2^x; 2^-inf = 0.
AF_DEVICE float exp2_approx(float x) {
#if AF_EMULATE
  return emulate::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// lg2.approx.ftz.f32: log2(x); log2(0) = -inf.
AF_DEVICE float log2_approx(float x) {
#if AF_EMULATE
  return emulate::log2(x);
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// rcp.approx.ftz.f32: 1 / x; 1 / 0 = inf.
AF_DEVICE float rcp_approx(float x) {
#if AF_EMULATE
  return emulate::reciprocal(x);
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// tanh.approx.f32 (sm_75)
AF_DEVICE float tanh_approx(float x) {
#if AF_EMULATE
  return emulate::tanh(x);
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// fma.rn.f32: a b + c, rounded once.
AF_DEVICE float fma(float a, float b, float c) {
#if AF_EMULATE
  return emulate::fma(a, b, c);
#else
  float y;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(a), "f"(b), "f"(c));
  return y;
#endif
}

// max.f32: of a NaN and a number, the number.
AF_DEVICE float max(float a, float b) {
#if AF_EMULATE
  return emulate::max(a, b);
#else
  float y;
  asm("max.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#endif
}

// sqrt.rn.f32
AF_DEVICE float sqrt(float x) {
#if AF_EMULATE
  return emulate::sqrt(x);
#else
  float y;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// popc.b32: how many bits are set.
AF_DEVICE int popcount(uint32_t bits) {
#if AF_EMULATE
  return __builtin_popcount(bits);
#else
  int count;
  asm("popc.b32 %0, %1;" : "=r"(count) : "r"(bits));
  return count;
#endif
}

AF_DEVICE float float_from_bits(uint32_t bits) {
#if AF_EMULATE
  return __builtin_bit_cast(float, bits);
#else
  return __uint_as_float(bits);
#endif
}

AF_DEVICE uint32_t bits_of_float(float x) {
#if AF_EMULATE
  return __builtin_bit_cast(uint32_t, x);
#else
  return __float_as_uint(x);
#endif
}

// cvt.rn.bf16x2.f32: `low` in bits 0..15, `high` in bits 16..31.
AF_DEVICE uint32_t pack_bf16x2(float low, float high) {
#if AF_EMULATE
  return emulate::bf16_bits(low) | uint32_t{emulate::bf16_bits(high)} << 16;
#else
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}

// cvt.rn.f16x2.f32: `low` in bits 0..15, `high` in bits 16..31.
AF_DEVICE uint32_t pack_f16x2(float low, float high) {
#if AF_EMULATE
  return emulate::f16_bits(low) | uint32_t{emulate::f16_bits(high)} << 16;
#else
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}

// cvt.rn.bf16.f32
AF_DEVICE uint16_t bf16_from_float(float x) {
#if AF_EMULATE
  return emulate::bf16_bits(x);
#else
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#endif
}

// A bf16 is the high half of a float.
AF_DEVICE float float_from_bf16(uint16_t bits) {
  return float_from_bits(uint32_t{bits} << 16);
}

// cvt.rn.f16.f32
AF_DEVICE uint16_t f16_from_float(float x) {
#if AF_EMULATE
  return emulate::f16_bits(x);
#else
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#endif
}

// cvt.f32.f16
AF_DEVICE float float_from_f16(uint16_t bits) {
#if AF_EMULATE
  return emulate::f16_value(bits);
#else
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#endif
}

// cvt.rna.tf32.f32: to the nearest of 10 mantissa bits, ties away from zero; the low 13 bits are 0.
AF_DEVICE uint32_t tf32_from_float(float x) {
#if AF_EMULATE
  return emulate::tf32_bits(x);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits & 0xffffe000u;  // PTX leaves them undefined
#endif
}

// cvt.rn.satfinite.e4m3x2.f32 (sm_89): `low` in bits 0..7; values beyond 448 become 448.
AF_DEVICE uint16_t pack_e4m3x2(float low, float high) {
#if AF_EMULATE
  return static_cast<uint16_t>(emulate::e4m3_bits(low) | emulate::e4m3_bits(high) << 8);
#else
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}

// cvt.rn.f16x2.e4m3x2 (sm_89): exact.
AF_DEVICE uint32_t f16x2_from_e4m3x2(uint16_t packed) {
#if AF_EMULATE
  return pack_f16x2(emulate::e4m3_value(packed & 0xff), emulate::e4m3_value(packed >> 8));
#else
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(packed));
  return pair;
#endif
}

// cvt.rn.satfinite.e4m3x2.f16x2 (sm_89)
AF_DEVICE uint16_t e4m3x2_from_f16x2(uint32_t pair) {
#if AF_EMULATE
  return pack_e4m3x2(emulate::f16_value(pair & 0xffff), emulate::f16_value(pair >> 16));
#else
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(packed) : "r"(pair));
  return packed;
#endif
}

// fma.rn.f16x2: a b + c of each half, rounded once.
AF_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
#if AF_EMULATE
  const auto half = [&](int shift) {  // a product of 11-bit numbers is exact in fp32
    const auto x = [&](uint32_t pair) { return emulate::f16_value(pair >> shift & 0xffff); };
    return emulate::fma(x(a), x(b), x(c));
  };
  return pack_f16x2(half(0), half(16));
#else
  uint32_t pair;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  return pair;
#endif
}

// prmt.b32: byte n of the result is byte (selector >> 4 n) & 7 of b:a, a's bytes the lower four.
AF_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if AF_EMULATE
  const uint64_t all = uint64_t{b} << 32 | a;
  uint32_t bytes = 0;
  for (int n = 0; n < 4; ++n) {
    bytes |= static_cast<uint32_t>(all >> 8 * (selector >> 4 * n & 7) & 0xff) << 8 * n;
  }
  return bytes;
#else
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
#endif
}

}  // namespace attnforge::ptx
