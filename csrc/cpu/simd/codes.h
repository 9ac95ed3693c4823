// Whole codes of 8 and 4 bits that a KV cache may hold, widened to fp32 in registers (fp8, which it
// may hold too, is in float8.h).
//
//   Int8   signed
//   Int4   two per byte, channel 2 n in the low nibble; a value is its nibble minus 8, so that
//          codes stand around 0
//
// Rows are walked by channel(row, d), the place of channel d (even for Int4). Loads come in the
// same three kinds as those of vec.h: whole vectors, the first n channels, halves of a pair.
#pragma once

#include "cpu/simd/vec.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

struct Int8 {
  int8_t value;
};
struct Int4 {
  uint8_t bits;
};

// Whether a stored element is a code that a scale (and a zero) turn into a value.
template <class E>
constexpr bool kIsCode = false;
template <>
constexpr bool kIsCode<Int8> = true;
template <>
constexpr bool kIsCode<Int4> = true;

// What a loaded element is to be multiplied by, beside its scale.
template <class E>
constexpr float kCodeUnit = 1.0f;

template <class E>
constexpr int kBits = 8 * sizeof(E);
template <>
constexpr int kBits<Int4> = 4;

template <class E>
AF_INLINE E* channel(E* row, int64_t d) {
  return row + d;
}
AF_INLINE const Int4* channel(const Int4* row, int64_t d) {
  return row + d / 2;
}

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes)));

AF_INLINE VecU widen_bytes(Bytes raw) {
#if ATTNFORGE_LANES == 16 && defined(__AVX512F__)
  return (VecU)_mm512_cvtepu8_epi32(__builtin_bit_cast(__m128i, raw));
#elif ATTNFORGE_LANES == 8 && defined(__AVX2__)
  return (VecU)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(__builtin_bit_cast(int64_t, raw)));
#elif ATTNFORGE_LANES == 4 && defined(__SSE4_1__)
  return (VecU)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(__builtin_bit_cast(int32_t, raw)));
#else
  return __builtin_convertvector(raw, VecU);
#endif
}
AF_INLINE VecI widen_signed(Bytes raw) {
#if ATTNFORGE_LANES == 16 && defined(__AVX512F__)
  return (VecI)_mm512_cvtepi8_epi32(__builtin_bit_cast(__m128i, raw));
#elif ATTNFORGE_LANES == 8 && defined(__AVX2__)
  return (VecI)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(__builtin_bit_cast(int64_t, raw)));
#elif ATTNFORGE_LANES == 4 && defined(__SSE4_1__)
  return (VecI)_mm_cvtepi8_epi32(_mm_cvtsi32_si128(__builtin_bit_cast(int32_t, raw)));
#else
  return __builtin_convertvector(__builtin_bit_cast(SignedBytes, raw), VecI);
#endif
}

// The low nibbles of bytes, or the high ones.
template <int kHalf>
AF_INLINE VecF widen_nibbles(VecU bytes) {
#if ATTNFORGE_LANES == 16 && defined(__AVX512F__)
  const VecF values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  const VecU index = kHalf == 0 ? bytes : bytes >> 4;  // of which four bits count
  return (VecF)_mm512_permutexvar_ps((__m512i)index, (__m512)values);
#else
  const VecU nibbles = kHalf == 0 ? bytes & 15u : bytes >> 4;
  return bits_to_float(nibbles | 0x4b000000u) - splat(0x1p23f + 8.0f);  // last bits of 2^23
#endif
}

AF_INLINE VecF load(const Int8* p) {
  return __builtin_convertvector(widen_signed(load_raw<Bytes>(p)), VecF);
}

// kLanes channels in the order of memory.
AF_INLINE VecF load_partial(const Int4* p, int64_t n) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < kLanes && i < n; ++i) {
    lanes[i] = static_cast<float>((p[i / 2].bits >> i % 2 * 4 & 15) - 8);
  }
  return load(lanes);
}

// Of a pair, Int4 gives the even channels, then the odd ones: a byte holds one of each.
template <int kHalf>
AF_INLINE VecF load_pair(const Int4* p) {
  return widen_nibbles<kHalf>(widen_bytes(load_raw<Bytes>(p)));
}
AF_INLINE void unpair(Int4, VecF& x, VecF& y) {
  unpair(BFloat16{}, x, y);
}

// Two vectors in the order of memory to the order in which load_pair<E> gives them.
template <class E>
AF_INLINE void pair_up(E, VecF&, VecF&) {}
AF_INLINE void pair_up(BFloat16, VecF& x, VecF& y) {
  VecI even;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
  VecF low = x, high = y;
  x = __builtin_shuffle(low, high, even);
  y = __builtin_shuffle(low, high, even + 1);
}
AF_INLINE void pair_up(Int4, VecF& x, VecF& y) {
  pair_up(BFloat16{}, x, y);
}

AF_INLINE Vec4 load4(const Int8* p) {
  return Vec4{static_cast<float>(p[0].value), static_cast<float>(p[1].value),
              static_cast<float>(p[2].value), static_cast<float>(p[3].value)};
}
AF_INLINE Vec4 load4(const Int4* p) {
  return Vec4{static_cast<float>((p[0].bits & 15) - 8), static_cast<float>((p[0].bits >> 4) - 8),
              static_cast<float>((p[1].bits & 15) - 8), static_cast<float>((p[1].bits >> 4) - 8)};
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
