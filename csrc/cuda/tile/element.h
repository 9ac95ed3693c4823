// Element types of the CUDA kernels: storage types, conversion in pairs, and their tensor-core
// products with fp32 accumulators.
//
// fp32 operands go through tf32 three times: x = hi + lo with 11 significant bits each, and
// a b = hi hi + hi lo + lo hi up to 2^-22 |a b|, which keeps fp32 results inside the fp32 bound.
#pragma once

#include "attnforge/params.h"
#include "cuda/ptx/math.h"
#include "cuda/ptx/mma.h"

namespace attnforge::cuda {

// Whether two types are one; NVRTC has no <type_traits>.
template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
struct Float8 {  // e4m3
  uint8_t bits;
};

template <DType kDType>
struct ElementOf;
template <>
struct ElementOf<DType::kFloat32> {
  using Type = float;
};
template <>
struct ElementOf<DType::kFloat16> {
  using Type = Half;
};
template <>
struct ElementOf<DType::kBFloat16> {
  using Type = BFloat16;
};
template <>
struct ElementOf<DType::kFloat8> {
  using Type = Float8;
};

constexpr float kInf = __builtin_bit_cast(float, 0x7f800000u);
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

AF_DEVICE float widen(float x) {
  return x;
}
AF_DEVICE float widen(Half x) {
  return ptx::float_from_f16(x.bits);
}
AF_DEVICE float widen(BFloat16 x) {
  return ptx::float_from_bf16(x.bits);
}

AF_DEVICE float widen(Float8 x) {  // sm_89
  return ptx::float_from_f16(static_cast<uint16_t>(ptx::f16x2_from_e4m3x2(x.bits)));
}

template <class T>
AF_DEVICE T narrow(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (kSame<T, Half>) {
    return {ptx::f16_from_float(x)};
  } else {
    return {ptx::bf16_from_float(x)};
  }
}

// Two 16-bit elements in a register, the first lowest.
template <class T>
AF_DEVICE uint32_t pack(float first, float second) {
  static_assert(sizeof(T) == 2);
  if constexpr (kSame<T, Half>) return ptx::pack_f16x2(first, second);
  return ptx::pack_bf16x2(first, second);
}

template <class T>
AF_DEVICE float unpack(uint32_t pair, int which) {
  return widen(T{static_cast<uint16_t>(pair >> (16 * which))});
}

// A finite number: not NaN, not an infinity.
AF_DEVICE bool finite(float x) {
  return (ptx::bits_of_float(x) & 0x7f800000u) != 0x7f800000u;
}

// Fragments of one tensor-core product, ready to multiply: `Words` registers of each operand as
// ldmatrix gives them, for fp32 their tf32 parts.
template <class T>
struct Product {
  struct Left {
    uint32_t x[4];
  };
  struct Right {
    uint32_t x[2];
  };
  AF_DEVICE static Left left(const uint32_t (&r)[4]) { return {{r[0], r[1], r[2], r[3]}}; }
  AF_DEVICE static Right right(uint32_t r0, uint32_t r1) { return {{r0, r1}}; }
  AF_DEVICE static void add(float (&d)[4], const Left& a, const Right& b) {
    if constexpr (kSame<T, Half>) {
      ptx::mma_m16n8k16_f16(d, a.x, b.x);
    } else {
      ptx::mma_m16n8k16_bf16(d, a.x, b.x);
    }
  }
};

template <>
struct Product<float> {
  struct Left {
    uint32_t hi[4], lo[4];
  };
  struct Right {
    uint32_t hi[2], lo[2];
  };
  // What is not finite goes into lo alone: beside an infinite hi, the zero of another lo is NaN.
  AF_DEVICE static void split(uint32_t x, uint32_t& hi, uint32_t& lo) {
    const float value = ptx::float_from_bits(x);
    hi = ptx::tf32_from_float(value);
    lo = ptx::tf32_from_float(value - ptx::float_from_bits(hi));
    if (!finite(ptx::float_from_bits(hi))) hi = 0u, lo = x;
  }
  AF_DEVICE static Left left(const uint32_t (&r)[4]) {
    Left a;
#pragma unroll
    for (int i = 0; i < 4; ++i) split(r[i], a.hi[i], a.lo[i]);
    return a;
  }
  AF_DEVICE static Right right(uint32_t r0, uint32_t r1) {
    Right b;
    split(r0, b.hi[0], b.lo[0]);
    split(r1, b.hi[1], b.lo[1]);
    return b;
  }
  AF_DEVICE static void add(float (&d)[4], const Left& a, const Right& b) {
    ptx::mma_m16n8k8_tf32(d, a.lo, b.hi);
    ptx::mma_m16n8k8_tf32(d, a.hi, b.lo);
    ptx::mma_m16n8k8_tf32(d, a.hi, b.hi);
  }
};

}  // namespace attnforge::cuda
