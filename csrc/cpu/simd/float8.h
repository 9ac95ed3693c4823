// fp8 e4m3: 1.4.3 bits, bias 7, no infinities, NaN 0x7f and 0xff. Input only, widened in registers.
//
// Exponent and mantissa are put where fp16 has its own, under the sign: that is the fp16 of 2^-8
// the value, subnormals too, and the hardware widens it. So every load here gives 2^-8 of the
// value, and kFloat8Unit is what products of such vectors are owed. In pages it is a code as
// others.
#pragma once

#include "cpu/simd/codes.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

struct E4M3 {
  uint8_t bits;
};
constexpr float kFloat8Unit = 0x1p8f;
template <>
constexpr bool kIsCode<E4M3> = true;
template <>
constexpr float kCodeUnit<E4M3> = kFloat8Unit;

typedef int16_t VecHS __attribute__((vector_size(kLanes * 2)));

AF_INLINE VecHS load_signed(const E4M3* p) {
#if ATTNFORGE_LANES == 16 && defined(__AVX2__)
  return (VecHS)_mm256_cvtepi8_epi16(load_raw<__m128i>(p));
#elif ATTNFORGE_LANES == 8 && defined(__SSE4_1__)
  return (VecHS)_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
#else
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  return __builtin_convertvector(load_raw<Bytes>(p), VecHS);
#endif
}

// fp16 bits from a sign-extended byte; all ones, which would be 1.875, become NaN.
template <class V>
AF_INLINE V half_bits(V byte) {
  const V bits = (byte << 7) & static_cast<int16_t>(0xbf80);
  return (bits & 0x3f80) == 0x3f80 ? bits | 0x7c00 : bits;
}

AF_INLINE VecF load(const E4M3* p) {
  return widen(__builtin_bit_cast(VecH, half_bits(load_signed(p))), Half{});
}
AF_INLINE Vec4 load4(const E4M3* p) {
  typedef int8_t Bytes __attribute__((vector_size(4)));
  typedef int16_t Words __attribute__((vector_size(8)));
  Half lanes[4];
  store_raw(lanes, half_bits(__builtin_convertvector(load_raw<Bytes>(p), Words)));
  return load4(lanes);
}

// fp16 bits of finite numbers below 2, which is all that fp8 makes, to fp32. Where no hardware
// does it, in fewer registers than fp16 in general takes.
AF_INLINE VecF widen_small(VecHS half) {
#if defined(__F16C__) || defined(__AVX512F__)
  return widen(__builtin_bit_cast(VecH, half), Half{});
#else
  const VecU wide = __builtin_bit_cast(VecU, __builtin_convertvector(half, VecI));
  return bits_to_float((wide << 13) & 0x87f00000u) * splat(0x1p112f);
#endif
}

// The pair order of bf16: even elements, then odd ones. NaN is not looked at here, which would
// cost as much as all the rest: a NanWatch beside the loads does.
template <int kHalf>
AF_INLINE VecF load_pair(const E4M3* p) {
  const VecH raw = load_raw<VecH>(p);
  const VecHS top = __builtin_bit_cast(VecHS, kHalf == 0 ? raw << 8 : raw);
  return widen_small((top >> 1) & static_cast<int16_t>(0xbf80));
}
AF_INLINE void unpair(E4M3, VecF& x, VecF& y) {
  unpair(BFloat16{}, x, y);
}
AF_INLINE void pair_up(E4M3, VecF& x, VecF& y) {
  pair_up(BFloat16{}, x, y);
}

// Whether load_pair() met a NaN, and in which lanes. For types that show NaN themselves: nothing.
template <class T>
struct NanWatch {
  AF_INLINE_MEMBER void see(const T*) {}
  AF_INLINE_MEMBER bool any() const { return false; }
  template <int kHalf>
  AF_INLINE_MEMBER VecF lanes() const {
    return VecF{};
  }
};
template <>
struct NanWatch<E4M3> {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes * 2)));
  Bytes largest{};  // of the magnitudes, byte by byte

  AF_INLINE_MEMBER void see(const E4M3* p) {
    const Bytes x = load_raw<Bytes>(p) & 0x7f;
#if ATTNFORGE_LANES == 16 && defined(__AVX2__)
    largest = (Bytes)_mm256_max_epu8((__m256i)largest, (__m256i)x);
#elif ATTNFORGE_LANES == 8 && defined(__SSE2__)
    largest = (Bytes)_mm_max_epu8((__m128i)largest, (__m128i)x);
#else
    largest = x > largest ? x : largest;
#endif
  }
  AF_INLINE_MEMBER bool any() const {
    uint64_t words[kLanes / 4], found = 0;
    store_raw(words, largest);
    for (int i = 0; i < kLanes / 4; ++i) found |= words[i] + 0x0101010101010101u;
    return found & 0x8080808080808080u;  // 0x7f + 1
  }
  // NaN where there was one, else 0.
  template <int kHalf>
  AF_INLINE_MEMBER VecF lanes() const {
    const VecH raw = __builtin_bit_cast(VecH, largest);
    const VecU byte = widen_bits(kHalf == 0 ? raw & 0xff : raw >> 8);
    return byte == 0x7fu ? splat(__builtin_nanf("")) : VecF{};
  }
};

}  // namespace attnforge::cpu::ATTNFORGE_ISA
