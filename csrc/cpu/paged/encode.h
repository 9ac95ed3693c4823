// Rows of fp32 to what pages hold, and back.
#pragma once

#include "cpu/micro/gemm.h"
#include "cpu/simd/float8.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

AF_INLINE VecF clamped(VecF x, float low, float high) {  // NaN stays
  x = x < splat(low) ? splat(low) : x;
  return x > splat(high) ? splat(high) : x;
}
// To the nearest whole number, ties to even; |x| < 2^22.
AF_INLINE VecF rounded(VecF x) {
  const VecF magic = splat(0x1.8p23f);
  return (x + magic) - magic;
}

typedef uint8_t ByteLanes __attribute__((vector_size(kLanes)));

AF_INLINE ByteLanes narrow(VecF x, E4M3) {
  const VecU bits = float_to_bits(clamped(x, -448.0f, 448.0f));
  const VecU sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
  // Below 2^-6 codes are multiples of 2^-9; above, the mantissa keeps three bits.
  const VecU small = __builtin_convertvector(rounded(bits_to_float(size) * splat(512.0f)), VecU);
  const VecU large = ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
  VecU code = size < 0x3c800000u ? small : large;
  code = size > 0x7f800000u ? VecU{} + 0x7fu : code;
  return __builtin_convertvector(code | sign, ByteLanes);
}
AF_INLINE VecF whole_code(VecF x, float scale, float zero, float low, float high) {
  const VecF y = x / splat(scale);
  return rounded(clamped((y == y ? y : VecF{}) + splat(zero), low, high));
}

// One row x [dim, readable to a whole vector] of floats to stored elements.
template <class T>
AF_INLINE void encode_row(const float* x, int64_t dim, float, float, T* out) {
  for (int64_t d = 0; d < dim; d += kLanes) store_partial(out + d, load(x + d), dim - d);
}
AF_INLINE void store_bytes(uint8_t* out, ByteLanes x, int64_t n) {
  if (n >= kLanes) return store_raw(out, x);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i];
}
AF_INLINE void encode_row(const float* x, int64_t dim, float scale, float, E4M3* out) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    store_bytes(&out[d].bits, narrow(load(x + d) / splat(scale), E4M3{}), dim - d);
  }
}
AF_INLINE void encode_row(const float* x, int64_t dim, float scale, float zero, Int8* out) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    VecI code = __builtin_convertvector(whole_code(load(x + d), scale, zero, -128, 127), VecI);
    store_bytes(reinterpret_cast<uint8_t*>(out + d), __builtin_convertvector(code, ByteLanes),
                dim - d);
  }
}
AF_INLINE void encode_row(const float* x, int64_t dim, float scale, float zero, Int4* out) {
  for (int64_t d = 0; d < dim; d += 2 * kLanes) {
    float codes[2 * kLanes] = {};
    for (int64_t half = 0; half < 2 && d + half * kLanes < dim; ++half) {
      store(codes + half * kLanes,
            whole_code(load(x + d + half * kLanes), scale, zero, 0.0f, 15.0f));
    }
    for (int64_t i = 0; i < 2 * kLanes && d + i < dim; i += 2) {
      const auto low = static_cast<uint8_t>(codes[i]), high = static_cast<uint8_t>(codes[i + 1]);
      out[(d + i) / 2].bits = static_cast<uint8_t>(low | high << 4);
    }
  }
}

// A stored row as attention reads it; x has room for whole vectors. zero is relative to what is
// loaded.
template <class E>
AF_INLINE void decode_row(const E* row, int64_t dim, float scale, float zero, float* x) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    VecF value = load_partial(channel(row, d), dim - d);
    if constexpr (kIsCode<E>) value = (value - splat(zero)) * splat(scale * kCodeUnit<E>);
    store(x + d, value);
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
