// Formats and functions of a GPU's arithmetic, by definition rather than by speed.
#include <cmath>
#include <cstring>
#include <limits>

#include "attnforge_emulate/device.h"

namespace attnforge::emulate {
namespace {

uint32_t bits_of(float x) {
  return __builtin_bit_cast(uint32_t, x);
}

// |x| rounded to nearest even in a format whose normal numbers start at 2^least and whose fraction
// has `fraction` bits: the value, not its code. Exact in double.
double rounded(double magnitude, int fraction, int least) {
  if (magnitude == 0) return 0;
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude in [2^(exponent - 1), 2^exponent)
  const double unit = std::ldexp(1.0, std::max(exponent - 1, least) - fraction);
  return std::nearbyint(magnitude / unit) * unit;
}

// Code of a value that the format holds.
uint32_t encoded(double magnitude, int fraction, int least) {
  if (magnitude < std::ldexp(1.0, least)) {
    return static_cast<uint32_t>(std::ldexp(magnitude, fraction - least));
  }
  int exponent;
  const double significand = std::frexp(magnitude, &exponent) * 2 - 1;
  return static_cast<uint32_t>(exponent - least) << fraction |
         static_cast<uint32_t>(std::ldexp(significand, fraction));
}

float flushed(float x) {  // .ftz
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

}  // namespace

uint16_t bf16_bits(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t f16_bits(float x) {
  if (std::isnan(x)) return 0x7fff;
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  if (std::isinf(x)) return sign | 0x7c00;
  const double magnitude = rounded(std::fabs(x), 10, -14);
  if (magnitude > 65504) return sign | 0x7c00;
  return static_cast<uint16_t>(sign | encoded(magnitude, 10, -14));
}

float f16_value(uint16_t bits) {
  const uint32_t code = bits & 0x7fff;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (code > 0x7c00) return std::numeric_limits<float>::quiet_NaN();
  if (code == 0x7c00) return sign * std::numeric_limits<float>::infinity();
  // Called for every operand of every product: a subnormal is a multiple of 2^-24, and of a normal
  // number the exponent is rebiased from 15 to 127.
  if (code < 0x400) return sign * static_cast<float>(code) * 0x1p-24f;
  return sign * __builtin_bit_cast(float, (code << 13) + (112u << 23));
}

uint32_t tf32_bits(float x) {
  if (std::isnan(x)) return 0x7fffe000;
  if (std::isinf(x)) return bits_of(x);
  return (bits_of(x) + 0x1000) & 0xffffe000u;
}

uint32_t e4m3_bits(float x) {
  if (std::isnan(x)) return 0x7f;
  const uint32_t sign = std::signbit(x) ? 0x80 : 0;
  if (std::fabs(x) >= 448) return sign | 0x7e;
  return sign | encoded(rounded(std::fabs(x), 3, -6), 3, -6);
}

float e4m3_value(uint32_t bits) {
  const uint32_t code = bits & 0x7f;
  if (code == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  const float sign = bits & 0x80 ? -1.0f : 1.0f;
  if (code < 8) return sign * static_cast<float>(code) * 0x1p-9f;
  return sign * __builtin_bit_cast(float, (code << 20) + (120u << 23));  // from bias 7 to 127
}

float exp2(float x) {
  return flushed(std::exp2(flushed(x)));
}

float log2(float x) {
  return std::log2(flushed(x));
}

float reciprocal(float x) {
  return flushed(1.0f / flushed(x));
}

float tanh(float x) {
  return std::tanh(x);
}

float fma(float a, float b, float c) {
  return std::fma(a, b, c);
}

float max(float a, float b) {
  return std::fmax(a, b);
}

float sqrt(float x) {
  return std::sqrt(x);
}

}  // namespace attnforge::emulate
