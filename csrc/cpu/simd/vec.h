// One vector type per ISA level, from compiler vector extensions.
//
// The level's name (ATTNFORGE_ISA) fixes the lane count; the compiler lowers `a * b + c` to FMA
// where the flags allow it. A level wider than the machine ("avx512_soft": 16 lanes under AVX2
// flags) is the same source lowered to register pairs: that is how the 16-lane code is tested where
// no AVX-512 is.
//
// Everything here has internal linkage: a shared inline compiled twice with different flags would
// let the linker keep the AVX-512 copy for an old CPU. For the same reason no STL header is
// included.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "attnforge/params.h"

#ifndef ATTNFORGE_ISA
#error "compile with -DATTNFORGE_ISA=<level>"
#endif

#define ATTNFORGE_CAT_(a, b) a##b
#define ATTNFORGE_CAT(a, b) ATTNFORGE_CAT_(a, b)
#define ATTNFORGE_LANES_baseline 4
#define ATTNFORGE_LANES_avx2 8
#define ATTNFORGE_LANES_avx512 16
#define ATTNFORGE_LANES_avx512_soft 16
#define ATTNFORGE_LANES ATTNFORGE_CAT(ATTNFORGE_LANES_, ATTNFORGE_ISA)

#define AF_INLINE [[gnu::always_inline]] static inline
#define AF_INLINE_MEMBER [[gnu::always_inline]]

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int kLanes = ATTNFORGE_LANES;

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));
typedef float Vec4 __attribute__((vector_size(16)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// x - 0 rather than 0 + x: exact for -0, so the compiler folds it into one broadcast.
AF_INLINE VecF splat(float x) {
  return x - VecF{};
}
AF_INLINE VecI splat_int(int32_t x) {
  return VecI{} + x;
}
AF_INLINE VecF bits_to_float(VecI x) {
  return __builtin_bit_cast(VecF, x);
}
AF_INLINE VecF bits_to_float(VecU x) {
  return __builtin_bit_cast(VecF, x);
}
AF_INLINE VecU float_to_bits(VecF x) {
  return __builtin_bit_cast(VecU, x);
}

template <class V, class T>
AF_INLINE V load_raw(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
AF_INLINE void store_raw(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

AF_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return a * b + c;
}

// The second operand wins when either is NaN (as maxps): vmax(limit, x) keeps a NaN x.
AF_INLINE VecF vmax(VecF a, VecF b) {
#if ATTNFORGE_LANES == 16 && defined(__AVX512F__)
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif ATTNFORGE_LANES == 8 && defined(__AVX__)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#elif ATTNFORGE_LANES == 4 && defined(__SSE__)
  return (VecF)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
AF_INLINE VecF vabs(VecF x) {
  return bits_to_float(float_to_bits(x) & 0x7fffffffu);
}

// ---- 16-bit types: widened to fp32 in registers, rounded to nearest even on the way out ----

AF_INLINE VecU widen_bits(VecH raw) {
#if ATTNFORGE_LANES == 16 && defined(__AVX512F__)
  return (VecU)_mm512_cvtepu16_epi32(__builtin_bit_cast(__m256i, raw));
#elif ATTNFORGE_LANES == 8 && defined(__AVX2__)
  // GCC 12 lowers the conversion below to five instructions here.
  return (VecU)_mm256_cvtepu16_epi32(__builtin_bit_cast(__m128i, raw));
#else
  return __builtin_convertvector(raw, VecU);
#endif
}
AF_INLINE VecF widen(VecH raw, BFloat16) {
  return bits_to_float(widen_bits(raw) << 16);
}

#if defined(__F16C__)
typedef uint16_t Raw8 __attribute__((vector_size(16)));
typedef float Float8 __attribute__((vector_size(32)));
AF_INLINE Float8 widen8(Raw8 raw) {
  return (Float8)_mm256_cvtph_ps(__builtin_bit_cast(__m128i, raw));
}
AF_INLINE Raw8 narrow8(Float8 x) {
  return __builtin_bit_cast(Raw8, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#endif

AF_INLINE VecF widen(VecH raw, Half) {
#if ATTNFORGE_LANES == 16 && defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps(__builtin_bit_cast(__m256i, raw));
#elif ATTNFORGE_LANES == 8 && defined(__F16C__)
  return __builtin_bit_cast(VecF, widen8(__builtin_bit_cast(Raw8, raw)));
#elif ATTNFORGE_LANES == 16 && defined(__F16C__)
  struct PairH {
    Raw8 lo, hi;
  } in = __builtin_bit_cast(PairH, raw);
  struct PairF {
    Float8 lo, hi;
  } out = {widen8(in.lo), widen8(in.hi)};
  return __builtin_bit_cast(VecF, out);
#else
  // Exponent and mantissa as an fp32 bit field, then a power of two re-biases normals and
  // subnormals alike; infinities and NaNs keep their all-ones exponent.
  VecU wide = widen_bits(raw);
  VecU magnitude = (wide & 0x7fffu) << 13;
  VecU scaled = float_to_bits(bits_to_float(magnitude) * splat(0x1p112f));
  VecU special = magnitude | 0x7f800000u;
  VecU result = magnitude >= 0x0f800000u ? special : scaled;
  return bits_to_float(result | ((wide & 0x8000u) << 16));
#endif
}

AF_INLINE VecH narrow(VecF x, BFloat16) {
  VecU bits = float_to_bits(x);
  VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  VecU quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(x == x ? rounded : quiet, VecH);
}

AF_INLINE VecH narrow(VecF x, Half) {
#if ATTNFORGE_LANES == 16 && defined(__AVX512F__)
  return __builtin_bit_cast(VecH, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif ATTNFORGE_LANES == 8 && defined(__F16C__)
  return __builtin_bit_cast(VecH, narrow8(__builtin_bit_cast(Float8, x)));
#elif ATTNFORGE_LANES == 16 && defined(__F16C__)
  struct PairF {
    Float8 lo, hi;
  } in = __builtin_bit_cast(PairF, x);
  struct PairH {
    Raw8 lo, hi;
  } out = {narrow8(in.lo), narrow8(in.hi)};
  return __builtin_bit_cast(VecH, out);
#else
  VecU bits = float_to_bits(x);
  VecU sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  VecU odd = (bits >> 13) & 1u;
  VecU normal = (bits - 0x38000000u + 0xfffu + odd) >> 13;
  // Adding 0.5 aligns a subnormal half's last bit with the fp32 mantissa's: the FPU does the
  // rounding.
  VecU subnormal = float_to_bits(bits_to_float(bits) + splat(0.5f)) - 0x3f000000u;
  VecU finite = bits < 0x38800000u ? subnormal : normal;
  VecU infinite = bits > 0x7f800000u ? VecU{} + 0x7e00u : VecU{} + 0x7c00u;
  VecU result = bits >= 0x47800000u ? infinite : finite;
  return __builtin_convertvector(result | sign, VecH);
#endif
}

AF_INLINE VecF load(const float* p) {
  return load_raw<VecF>(p);
}
AF_INLINE VecF load(const BFloat16* p) {
  return widen(load_raw<VecH>(p), BFloat16{});
}
AF_INLINE VecF load(const Half* p) {
  return widen(load_raw<VecH>(p), Half{});
}
AF_INLINE void store(float* p, VecF x) {
  store_raw(p, x);
}
AF_INLINE void store(BFloat16* p, VecF x) {
  store_raw(p, narrow(x, BFloat16{}));
}
AF_INLINE void store(Half* p, VecF x) {
  store_raw(p, narrow(x, Half{}));
}

// The first n lanes, 0 < n; the rest read as zero and are not touched in memory. Head dims are
// multiples of 8, so a tail is half of a 16-lane vector or nothing; the loop is for completeness.
template <class T>
AF_INLINE VecF load_partial(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T lanes[kLanes] = {};
  if (kLanes == 16 && n == 8) {
    __builtin_memcpy(lanes, p, 8 * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  }
  return load(lanes);
}
template <class T>
AF_INLINE void store_partial(T* p, VecF x, int64_t n) {
  if (n >= kLanes) return store(p, x);
  T lanes[kLanes];
  store(lanes, x);
  if (kLanes == 16 && n == 8) {
    __builtin_memcpy(p, lanes, 8 * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
}

// One of the two vectors that 2 kLanes consecutive elements make in pair order: the order in which
// they are cheapest to widen. bf16 gives the even elements, then the odd ones (a shift and a mask,
// no shuffle); the other types give the order of memory. Sums over elements do not care; unpair()
// restores what was summed element by element.
template <int kHalf, class T>
AF_INLINE VecF load_pair(const T* p) {
  return load(p + kHalf * kLanes);
}
template <int kHalf>
AF_INLINE VecF load_pair(const BFloat16* p) {
  VecU raw = load_raw<VecU>(p);
  return bits_to_float(kHalf == 0 ? raw << 16 : raw & 0xffff0000u);
}
template <class T>
AF_INLINE void unpair(T, VecF&, VecF&) {}
AF_INLINE void unpair(BFloat16, VecF& x, VecF& y) {
  VecI low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  VecF even = x, odd = y;
  x = __builtin_shuffle(even, odd, low);
  y = __builtin_shuffle(even, odd, high);
}

// Four consecutive elements, whatever kLanes is: the unit of the packing transposes.
AF_INLINE Vec4 load4(const float* p) {
  return load_raw<Vec4>(p);
}
template <class T>
AF_INLINE Vec4 load4(const T* p) {
  T lanes[kLanes] = {p[0], p[1], p[2], p[3]};
  VecF wide = load(lanes);
  Vec4 out;
  __builtin_memcpy(&out, &wide, sizeof(out));
  return out;
}
AF_INLINE Vec4 load4(const BFloat16* p) {
  typedef uint16_t Raw4 __attribute__((vector_size(8)));
  typedef uint32_t Wide4 __attribute__((vector_size(16)));
  return __builtin_bit_cast(Vec4, __builtin_convertvector(load_raw<Raw4>(p), Wide4) << 16);
}
#if defined(__F16C__)
AF_INLINE Vec4 load4(const Half* p) {
  return (Vec4)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p));
}
#endif
AF_INLINE void store4(float* p, Vec4 x) {
  store_raw(p, x);
}

AF_INLINE void transpose4(Vec4& a, Vec4& b, Vec4& c, Vec4& d) {
#if defined(__SSE__)
  _MM_TRANSPOSE4_PS(a, b, c, d);
#else
  Vec4 in[4] = {a, b, c, d}, out[4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) out[i][j] = in[j][i];
  a = out[0], b = out[1], c = out[2], d = out[3];
#endif
}

// transpose4 in every four lanes at once: part p of row i of the result is element 4 p + i of each
// of the four.
AF_INLINE void transpose4_parts(VecF& a, VecF& b, VecF& c, VecF& d) {
  VecI low1, high1, low2, high2;
  for (int i = 0; i < kLanes; ++i) {
    low1[i] = i / 4 * 4 + i % 4 / 2 + i % 2 * kLanes;  // unpcklps
    high1[i] = low1[i] + 2;
    low2[i] = i / 4 * 4 + i % 2 + i % 4 / 2 * kLanes;  // unpcklpd
    high2[i] = low2[i] + 2;
  }
  VecF ab = __builtin_shuffle(a, b, low1), ab2 = __builtin_shuffle(a, b, high1);
  VecF cd = __builtin_shuffle(c, d, low1), cd2 = __builtin_shuffle(c, d, high1);
  a = __builtin_shuffle(ab, cd, low2), b = __builtin_shuffle(ab, cd, high2);
  c = __builtin_shuffle(ab2, cd2, low2), d = __builtin_shuffle(ab2, cd2, high2);
}

template <class T>
AF_INLINE float to_float(T x) {
  T lanes[kLanes] = {x};
  return load(lanes)[0];
}
AF_INLINE float to_float(float x) {
  return x;
}

// ---- horizontal reductions: a fixed tree, so that results never depend on anything but the data
// ----

// Halves of a wide vector. Intrinsics where there are registers for it: GCC 12 sends a cast through
// a struct over the stack, and keeps whatever it comes from there too.
typedef float Vec8 __attribute__((vector_size(32)));
template <class V>
struct Halves {
  V lo, hi;
};
#if ATTNFORGE_LANES == 16
AF_INLINE Halves<Vec8> halves16(VecF x) {
#if defined(__AVX512DQ__)
  return {(Vec8)_mm512_castps512_ps256((__m512)x), (Vec8)_mm512_extractf32x8_ps((__m512)x, 1)};
#else
  return __builtin_bit_cast(Halves<Vec8>, x);
#endif
}
#endif
AF_INLINE Halves<Vec4> halves8(Vec8 x) {
#if defined(__AVX__)
  return {(Vec4)_mm256_castps256_ps128((__m256)x), (Vec4)_mm256_extractf128_ps((__m256)x, 1)};
#else
  return __builtin_bit_cast(Halves<Vec4>, x);
#endif
}

// Folds a vector onto four lanes (lane i with i + 4, i + 8, ...). `op` is generic over vector
// width.
template <class Op>
AF_INLINE Vec4 fold4(VecF x, [[maybe_unused]] Op op) {
#if ATTNFORGE_LANES == 4
  return x;
#elif ATTNFORGE_LANES == 8
  auto half = halves8(x);
  return op(half.lo, half.hi);
#else
  auto wide = halves16(x);
  auto half = halves8(op(wide.lo, wide.hi));
  return op(half.lo, half.hi);
#endif
}
template <class Op>
AF_INLINE float reduce(VecF x, Op op) {
  Vec4 four = fold4(x, op);
  Vec4 two = op(four, Vec4{four[2], four[3], four[2], four[3]});
  return op(two, Vec4{two[1], two[1], two[1], two[1]})[0];
}
AF_INLINE float reduce_add(VecF x) {
  return reduce(x, [](auto a, auto b) { return a + b; });
}
AF_INLINE float reduce_max(VecF x) {
  return reduce(x, [](auto a, auto b) { return a > b ? a : b; });
}

// Bit i is set where lane i of a comparison is true.
AF_INLINE uint32_t lane_bits(VecI mask) {
#if ATTNFORGE_LANES == 16 && defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif ATTNFORGE_LANES == 16 && defined(__AVX__)
  struct Pair {
    __m256 lo, hi;
  } half = __builtin_bit_cast(Pair, mask);
  return static_cast<uint32_t>(_mm256_movemask_ps(half.lo)) |
         static_cast<uint32_t>(_mm256_movemask_ps(half.hi)) << 8;
#elif ATTNFORGE_LANES == 8 && defined(__AVX__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif ATTNFORGE_LANES == 4 && defined(__SSE__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (mask[i] & 1u) << i;
  return bits;
#endif
}

// Lane i gets the sum over the lanes of x[i], for kLanes vectors: a transposing tree, 3 kLanes
// instructions where kLanes separate folds take six times as many.
AF_INLINE VecF sum_each(const VecF* x) {
  VecI low1, high1, low2, high2;
  for (int i = 0; i < kLanes; ++i) {
    low1[i] = i / 4 * 4 + i % 4 / 2 + i % 2 * kLanes;  // unpcklps
    high1[i] = low1[i] + 2;
    low2[i] = i / 4 * 4 + i % 2 + i % 4 / 2 * kLanes;  // unpcklpd
    high2[i] = low2[i] + 2;
  }
  auto add1 = [&](VecF a, VecF b) __attribute__((always_inline)) {
    return __builtin_shuffle(a, b, low1) + __builtin_shuffle(a, b, high1);
  };
  auto four = [&](const VecF* v) __attribute__((always_inline)) {  // sums within 128 bits
    VecF a = add1(v[0], v[1]), b = add1(v[2], v[3]);
    return __builtin_shuffle(a, b, low2) + __builtin_shuffle(a, b, high2);
  };
#if ATTNFORGE_LANES == 4
  return four(x);
#elif ATTNFORGE_LANES == 8
  VecF a = four(x), b = four(x + 4);
  return __builtin_shuffle(a, b, VecI{0, 1, 2, 3, 8, 9, 10, 11}) +
         __builtin_shuffle(a, b, VecI{4, 5, 6, 7, 12, 13, 14, 15});
#else
  auto halves = [](VecF a, VecF b) __attribute__((always_inline)) {
    return __builtin_shuffle(a, b, VecI{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
           __builtin_shuffle(a, b,
                             VecI{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
  };
  VecF a = halves(four(x), four(x + 4)), b = halves(four(x + 8), four(x + 12));
  return __builtin_shuffle(a, b, VecI{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}) +
         __builtin_shuffle(a, b, VecI{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
#endif
}

// ---- elementary functions ----

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kInf = __builtin_inff();

// 2^x for x <= 127, relative error below 2 ulp. x < -126.5 gives exactly 0 (so -inf does), NaN
// stays NaN. Adding the magic number leaves round(x) + 127 in the low mantissa bits: the exponent
// of 2^round(x).
AF_INLINE VecF exp2(VecF x) {
  x = vmax(splat(-127.0f), x);
  const VecF magic = splat(0x1.8p23f + 127.0f);
  VecF shifted = x + magic;
  VecF f = x - (shifted - magic);
  VecF power = bits_to_float(float_to_bits(shifted) << 23);
  // Minimax of 2^f on [-1/2, 1/2], degree 6: relative error 1.9e-9 before rounding.
  VecF p = splat(0x1.41d334p-13f);
  p = fma(p, f, splat(0x1.5f456ap-10f));
  p = fma(p, f, splat(0x1.3b2dbcp-7f));
  p = fma(p, f, splat(0x1.c6aed4p-5f));
  p = fma(p, f, splat(0x1.ebfbdap-3f));
  p = fma(p, f, splat(0x1.62e430p-1f));
  p = fma(p, f, splat(1.0f));
  return p * power;
}

// tanh with small relative error everywhere: an odd polynomial near 0, 1 - 2/(e^2x + 1) elsewhere.
AF_INLINE VecF tanh(VecF x) {
  VecF z = x * x;
  VecF p = splat(0.002103404374793172f);
  p = fma(p, z, splat(-0.008131766691803932f));
  p = fma(p, z, splat(0.021680736914277077f));
  p = fma(p, z, splat(-0.05394264683127403f));
  p = fma(p, z, splat(0.13333165645599365f));
  p = fma(p, z, splat(-0.333333283662796f));
  VecF small = fma(p * z, x, x);
  VecF a = vabs(x);
  VecF capped = a > splat(20.0f) ? splat(20.0f) : a;  // a NaN stays
  VecF large = splat(1.0f) - splat(2.0f) / (exp2(capped * splat(2.0f * kLog2E)) + splat(1.0f));
  VecF magnitude = a < splat(0.625f) ? vabs(small) : large;
  VecU sign = float_to_bits(x) & 0x80000000u;
  return bits_to_float(float_to_bits(magnitude) | sign);
}

// log(1 + x) for 0 <= x <= 1, relative error below 4 ulp: 2 atanh(z), z = x / (2 + x) <= 1/3, as a
// series whose first term left out is 1.4e-9 of the sum. NaN stays.
AF_INLINE VecF log1p_unit(VecF x) {
  VecF z = x / (x + splat(2.0f)), w = z * z;
  VecF p = splat(1.0f / 15);
  p = fma(p, w, splat(1.0f / 13));
  p = fma(p, w, splat(1.0f / 11));
  p = fma(p, w, splat(1.0f / 9));
  p = fma(p, w, splat(1.0f / 7));
  p = fma(p, w, splat(1.0f / 5));
  p = fma(p, w, splat(1.0f / 3));
  VecF twice = z + z;
  return fma(twice * w, p, twice);
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
