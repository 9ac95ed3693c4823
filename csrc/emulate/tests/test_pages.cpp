// What the paged kernels compute with: codes in both directions, division by the page size.
#include <cmath>
#include <limits>

#include "cuda/paged/encode.h"
#include "cuda/tile/pages.h"
#include "testing.h"

namespace attnforge::emulate {
namespace {

using namespace attnforge::cuda;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

EMULATOR_TEST(e4m3_without_the_instruction) {
  for (uint32_t code = 0; code < 256; ++code) {
    const float value = from_e4m3(code), wanted = e4m3_value(code);
    REQUIRE(value == wanted || (std::isnan(value) && std::isnan(wanted)));
    if (!std::isnan(value)) REQUIRE(to_e4m3(value) == code);
  }
  testing::Random random(3);
  for (int n = 0; n < 20000; ++n) {
    const float x = std::ldexp(random.unit(), static_cast<int>(random.bits() % 24) - 12);
    REQUIRE(to_e4m3(x) == e4m3_bits(x));
  }
  REQUIRE(to_e4m3(1e30f) == 0x7eu && to_e4m3(-kInfinity) == 0xfeu);
  REQUIRE((to_e4m3(std::nanf("")) & 0x7fu) == 0x7fu);
}

EMULATOR_TEST(whole_codes) {
  for (int n = -128; n < 128; ++n) REQUIRE(from_int8(static_cast<uint8_t>(n)) == n);
  for (int n = 0; n < 16; ++n) REQUIRE(from_int4(n) == n - 8);
  const ptx::U32x4 raw = {0x76543210u, 0xfedcba98u, 0u, 0x80000001u};
  for (int n = 0; n < 16; ++n) REQUIRE(code_of<PageType::kInt4>(raw, n) == n - 8);
  REQUIRE(code_of<PageType::kInt8>(raw, 12) == 1 && code_of<PageType::kInt8>(raw, 15) == -128);
  const auto code = [](PageType type, float x, float scale, float zero) {
    return encoded(type, x, scale, zero).code;
  };
  REQUIRE(code(PageType::kInt8, 1.25f, 0.5f, 0.0f) == 2);  // ties to even
  REQUIRE(code(PageType::kInt8, 1.75f, 0.5f, 0.0f) == 4);
  REQUIRE(code(PageType::kInt8, -kInfinity, 1.0f, 0.0f) == 0x80u);
  REQUIRE(code(PageType::kInt4, std::nanf(""), 1.0f, 8.0f) == 8);
  REQUIRE(code(PageType::kInt4, 100.0f, 1.0f, 8.0f) == 15);
  REQUIRE(encoded(PageType::kInt4, 1.0f, 0.5f, 8.0f).value == 1.0f);
}

EMULATOR_TEST(division_by_a_page_size) {
  for (int64_t by : {1, 2, 3, 5, 7, 16, 19, 64, 100, 255, 256, 4097, 1 << 20, (1 << 29) - 1}) {
    const Divider divider = Divider::by(by);
    testing::Random random(static_cast<uint32_t>(by));
    for (int n = 0; n < 2000; ++n) {
      const int x = static_cast<int>(random.bits() >> (1 + n % 28));
      REQUIRE(divider.quotient(x) == x / by);
    }
    for (int64_t x : {int64_t{0}, by - 1, by, 2 * by - 1, int64_t{0x7fffffff}}) {
      REQUIRE(divider.quotient(static_cast<int>(x)) == static_cast<int>(x) / by);
    }
  }
}

}  // namespace
}  // namespace attnforge::emulate
