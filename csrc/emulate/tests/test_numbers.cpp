// Number formats, against exhaustive or hand-computed values.
#include <cstring>
#include <limits>

#include "cuda/ptx/math.h"
#include "testing.h"

namespace attnforge::emulate {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// value(code) is strictly rising over the positive codes, and encode(value) is the code; a value
// just above a midpoint goes up, just below goes down, and the midpoint itself to the even code.
template <typename Value, typename Encode>
void check_format(uint32_t last, Value value, Encode encode) {
  for (uint32_t code = 0; code < last; ++code) {
    const double low = value(code), high = value(code + 1), middle = (low + high) / 2;
    REQUIRE(low < high);
    REQUIRE(encode(static_cast<float>(low)) == code);
    const auto exact = static_cast<float>(middle);
    if (exact != middle) continue;  // finer than a float
    REQUIRE(encode(exact) == code + code % 2);
    REQUIRE(encode(std::nextafter(exact, kInfinity)) == code + 1);
    REQUIRE(encode(std::nextafter(exact, 0.0f)) == code);
  }
}

EMULATOR_TEST(f16_rounds_to_nearest_even) {
  check_format(
      0x7bff, [](uint32_t c) { return ptx::float_from_f16(static_cast<uint16_t>(c)); },
      [](float x) { return ptx::f16_from_float(x); });
  REQUIRE(ptx::float_from_f16(0x3c00) == 1.0f && ptx::float_from_f16(0x0001) == 0x1p-24f);
  REQUIRE(ptx::float_from_f16(0xfbff) == -65504.0f);
  REQUIRE(ptx::f16_from_float(65519.0f) == 0x7bff && ptx::f16_from_float(65520.0f) == 0x7c00);
  REQUIRE(ptx::f16_from_float(-kInfinity) == 0xfc00);
  REQUIRE(std::isnan(ptx::float_from_f16(ptx::f16_from_float(std::nanf("")))));
}

EMULATOR_TEST(bf16_rounds_to_nearest_even) {
  check_format(
      0x7f7f, [](uint32_t c) { return ptx::float_from_bf16(static_cast<uint16_t>(c)); },
      [](float x) { return ptx::bf16_from_float(x); });
  REQUIRE(ptx::float_from_bf16(0xbf80) == -1.0f);
  REQUIRE(ptx::bf16_from_float(3.4e38f) == 0x7f80 && ptx::bf16_from_float(kInfinity) == 0x7f80);
  REQUIRE(std::isnan(ptx::float_from_bf16(ptx::bf16_from_float(std::nanf("")))));
}

EMULATOR_TEST(e4m3_rounds_and_saturates) {
  const auto value = [](uint32_t c) {
    return ptx::float_from_f16(
        static_cast<uint16_t>(ptx::f16x2_from_e4m3x2(static_cast<uint16_t>(c))));
  };
  const auto encode = [](float x) { return ptx::pack_e4m3x2(x, 0) & 0xffu; };
  check_format(0x7e, value, encode);
  REQUIRE(value(0x38) == 1.0f && value(0x01) == 0x1p-9f && value(0xfe) == -448.0f);
  REQUIRE(encode(1000.0f) == 0x7e && encode(-kInfinity) == 0xfe && std::isnan(value(0x7f)));
}

EMULATOR_TEST(tf32_rounds_ties_away) {
  const auto rounded = [](float x) { return ptx::float_from_bits(ptx::tf32_from_float(x)); };
  REQUIRE(rounded(1.0f) == 1.0f);
  REQUIRE(rounded(1.0f + 0x1p-11f) == 1.0f + 0x1p-10f);
  REQUIRE(rounded(-1.0f - 0x1p-11f) == -1.0f - 0x1p-10f);
  REQUIRE(rounded(1.0f + 0x1p-12f) == 1.0f);
  REQUIRE(rounded(kInfinity) == kInfinity && std::isnan(rounded(std::nanf(""))));
}

EMULATOR_TEST(packs_put_the_first_low) {
  REQUIRE(ptx::pack_bf16x2(1.0f, -2.0f) == 0xc0003f80u);
  REQUIRE(ptx::pack_f16x2(1.0f, -2.0f) == 0xc0003c00u);
  REQUIRE(ptx::pack_e4m3x2(1.0f, -2.0f) == 0xc038u);
  REQUIRE(ptx::f16x2_from_e4m3x2(0xc038) == 0xc0003c00u);
}

EMULATOR_TEST(approximations_at_their_edges) {
  REQUIRE(ptx::exp2_approx(-kInfinity) == 0.0f && ptx::exp2_approx(3.0f) == 8.0f);
  REQUIRE(ptx::exp2_approx(-140.0f) == 0.0f);  // a subnormal result is flushed
  REQUIRE(ptx::log2_approx(0.0f) == -kInfinity && ptx::log2_approx(8.0f) == 3.0f);
  REQUIRE(ptx::log2_approx(1e-40f) == -kInfinity);  // and so is a subnormal argument
  REQUIRE(ptx::rcp_approx(0.0f) == kInfinity && ptx::rcp_approx(4.0f) == 0.25f);
  REQUIRE(ptx::tanh_approx(0.0f) == 0.0f && ptx::tanh_approx(100.0f) == 1.0f);
  REQUIRE(ptx::fma(3.0f, 4.0f, 5.0f) == 17.0f);
  REQUIRE(ptx::max(std::nanf(""), 2.0f) == 2.0f && ptx::max(-1.0f, -kInfinity) == -1.0f);
}

}  // namespace
}  // namespace attnforge::emulate
