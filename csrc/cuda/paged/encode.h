// Numbers to what pages hold, and back: the definitions of reference/paged.py, bit for bit.
#pragma once

#include "cuda/tile/codes.h"

namespace attnforge::cuda {

AF_DEVICE float clamped(float x, float low, float high) {  // NaN stays
  x = x < low ? low : x;
  return x > high ? high : x;
}
// To the nearest whole number, ties to even; |x| < 2^22.
AF_DEVICE float rounded(float x) {
  return (x + 0x1.8p23f) - 0x1.8p23f;
}

AF_DEVICE uint32_t to_e4m3(float x) {
  const uint32_t bits = ptx::bits_of_float(clamped(x, -448.0f, 448.0f));
  const uint32_t sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return sign | 0x7fu;
  // Below 2^-6 codes are multiples of 2^-9; above, the mantissa keeps three bits.
  if (size < 0x3c800000u) {
    return sign | static_cast<uint32_t>(rounded(ptx::float_from_bits(size) * 512.0f));
  }
  return sign | (((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3));
}
AF_DEVICE float to_whole(float x, float zero, float low, float high) {
  return rounded(clamped((x == x ? x : 0.0f) + zero, low, high));
}

// A stored number and what attention reads for it.
struct Encoded {
  uint32_t code;
  float value;
};

AF_DEVICE Encoded encoded(PageType type, float x, float scale, float zero) {
  const float y = x / scale;
  if (type == PageType::kFp8) {
    const uint32_t code = to_e4m3(y);
    return {code, from_e4m3(code) * scale};
  }
  const bool wide = type == PageType::kInt8;
  const float whole = to_whole(y, zero, wide ? -128.0f : 0.0f, wide ? 127.0f : 15.0f);
  return {static_cast<uint32_t>(static_cast<int>(whole)) & 0xffu, (whole - zero) * scale};
}

}  // namespace attnforge::cuda
