// mma.sync, ldmatrix and stmatrix against plain loops, element positions as the PTX manual states
// them.
#include <array>

#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/math.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/sync.h"
#include "cuda/ptx/warp.h"
#include "testing.h"

namespace attnforge::emulate {
namespace {

using testing::expect_report;
using testing::Random;
using testing::require_equal;

enum class Kind { kBf16, kF16, kTf32, kE4m3 };

struct Shape {
  int k;      // depth of one product
  int bytes;  // of an element
};

constexpr Shape shape_of(Kind kind) {
  return kind == Kind::kTf32 ? Shape{8, 4} : kind == Kind::kE4m3 ? Shape{32, 1} : Shape{16, 2};
}

uint32_t code_of(Kind kind, float x) {
  switch (kind) {
    case Kind::kBf16:
      return ptx::bf16_from_float(x);
    case Kind::kF16:
      return ptx::f16_from_float(x);
    case Kind::kTf32:
      return ptx::tf32_from_float(x);
    case Kind::kE4m3:
      return ptx::pack_e4m3x2(x, 0) & 0xff;
  }
  return 0;
}

// The manual numbers A's elements of a lane a0, a1, ...; these are its formulas for rows and
// columns. m16n8k16 (16 bit): 8 elements; m16n8k8 (tf32): 4; m16n8k32 (8 bit): 16.
struct Position {
  int row, column;
};

Position place_a(Kind kind, int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  switch (kind) {
    case Kind::kTf32:
      return {i % 2 == 0 ? group : group + 8, i < 2 ? in_group : in_group + 4};
    case Kind::kE4m3:
      return {i < 4 || (8 <= i && i < 12) ? group : group + 8,
              in_group * 4 + (i & 3) + (i < 8 ? 0 : 16)};
    default:
      return {i < 2 || (4 <= i && i < 6) ? group : group + 8,
              in_group * 2 + (i & 1) + (i < 4 ? 0 : 8)};
  }
}

Position place_b(Kind kind, int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  switch (kind) {
    case Kind::kTf32:
      return {in_group + 4 * i, group};
    case Kind::kE4m3:
      return {in_group * 4 + (i & 3) + (i < 4 ? 0 : 16), group};
    default:
      return {in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), group};
  }
}

struct Fragments {
  std::array<std::array<uint32_t, 4>, 32> a{};
  std::array<std::array<uint32_t, 2>, 32> b{};
  std::array<std::array<float, 4>, 32> d{};
};

template <Kind kKind>
__global__ void multiply(Fragments* fragments) {
  const uint32_t lane = ptx::lane_id();
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = fragments->a[lane][i];
  for (int i = 0; i < 2; ++i) b[i] = fragments->b[lane][i];
  for (int i = 0; i < 4; ++i) d[i] = fragments->d[lane][i];
  if constexpr (kKind == Kind::kBf16) ptx::mma_m16n8k16_bf16(d, a, b);
  if constexpr (kKind == Kind::kF16) ptx::mma_m16n8k16_f16(d, a, b);
  if constexpr (kKind == Kind::kTf32) ptx::mma_m16n8k8_tf32(d, a, b);
  if constexpr (kKind == Kind::kE4m3) ptx::mma_m16n8k32_e4m3(d, a, b);
  for (int i = 0; i < 4; ++i) fragments->d[lane][i] = d[i];
}

template <Kind kKind>
void check_multiply() {
  constexpr Shape shape = shape_of(kKind);
  constexpr int per = 4 / shape.bytes;
  Random random(7);
  // Eighths up to 1: exact in every format, and so are the sums.
  const auto number = [&] { return std::round(random.unit() * 8) / 8; };
  float a[16][32], b[32][8], d[16][8];
  Fragments fragments;
  for (auto& row : a) {
    for (float& x : row) x = number();
  }
  for (auto& row : b) {
    for (float& x : row) x = number();
  }
  for (auto& row : d) {
    for (float& x : row) x = number();
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4 * per; ++i) {
      const auto [row, column] = place_a(kKind, lane, i);
      fragments.a[lane][i / per] |= code_of(kKind, a[row][column]) << i % per * 8 * shape.bytes;
    }
    for (int i = 0; i < 2 * per; ++i) {
      const auto [row, column] = place_b(kKind, lane, i);
      fragments.b[lane][i / per] |= code_of(kKind, b[row][column]) << i % per * 8 * shape.bytes;
    }
    for (int i = 0; i < 4; ++i) {  // c0..c3 of every shape
      fragments.d[lane][i] = d[i < 2 ? lane >> 2 : (lane >> 2) + 8][lane % 4 * 2 + (i & 1)];
    }
  }
  ATTNFORGE_LAUNCH((multiply<kKind>), dim3(1), dim3(32), 0, nullptr, &fragments);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = lane % 4 * 2 + (i & 1);
      double sum = d[row][column];
      for (int k = 0; k < shape.k; ++k) sum += double{a[row][k]} * b[k][column];
      require_equal(fragments.d[lane][i], sum, 0, "an element of the product");
    }
  }
}

EMULATOR_TEST(mma_bf16) {
  check_multiply<Kind::kBf16>();
}
EMULATOR_TEST(mma_f16) {
  check_multiply<Kind::kF16>();
}
EMULATOR_TEST(mma_tf32) {
  check_multiply<Kind::kTf32>();
}
EMULATOR_TEST(mma_e4m3) {
  check_multiply<Kind::kE4m3>();
}

__global__ void truncate(float* out) {
  const uint32_t one_and_a_bit = ptx::bits_of_float(1.0f) + 0x1fff;  // below the ten bits of tf32
  const uint32_t a[4] = {one_and_a_bit, one_and_a_bit, one_and_a_bit, one_and_a_bit};
  const uint32_t b[2] = {ptx::bits_of_float(1.0f), ptx::bits_of_float(1.0f)};
  float d[4] = {};
  ptx::mma_m16n8k8_tf32(d, a, b);
  if (threadIdx.x == 0) *out = d[0];
}

EMULATOR_TEST(mma_tf32_ignores_low_bits) {
  float out = 0;
  ATTNFORGE_LAUNCH(truncate, dim3(1), dim3(32), 0, nullptr, &out);
  REQUIRE(out == 8);
}

// Element (row, column) of matrix m is 64 m + 8 row + column.
template <int kMatrices, bool kTransposed>
__global__ void load_matrices(uint32_t* out) {
  const uint32_t base = ptx::dynamic_shared_memory();
  const uint32_t lane = ptx::lane_id();
  for (uint32_t i = lane; i < 64 * kMatrices; i += 32) {
    ptx::store_shared(base + 2 * i, static_cast<uint16_t>(i));
  }
  ptx::sync_warp();
  uint32_t d[kMatrices];
  const uint32_t row = base + 16 * (lane % (8 * kMatrices));
  if constexpr (kMatrices == 1) ptx::ldmatrix_x1(d, row);
  if constexpr (kMatrices == 2 && !kTransposed) ptx::ldmatrix_x2(d, row);
  if constexpr (kMatrices == 2 && kTransposed) ptx::ldmatrix_x2_trans(d, row);
  if constexpr (kMatrices == 4 && !kTransposed) ptx::ldmatrix_x4(d, row);
  if constexpr (kMatrices == 4 && kTransposed) ptx::ldmatrix_x4_trans(d, row);
  for (int m = 0; m < kMatrices; ++m) out[lane * kMatrices + m] = d[m];
}

template <int kMatrices, bool kTransposed>
void check_load_matrices() {
  std::vector<uint32_t> out(32 * kMatrices);
  ATTNFORGE_LAUNCH((load_matrices<kMatrices, kTransposed>), dim3(1), dim3(32), 128 * kMatrices,
                   nullptr, out.data());
  for (uint32_t lane = 0; lane < 32; ++lane) {
    for (uint32_t m = 0; m < kMatrices; ++m) {
      for (uint32_t half = 0; half < 2; ++half) {
        uint32_t row = lane / 4, column = lane % 4 * 2 + half;
        if (kTransposed) std::swap(row, column);
        REQUIRE((out[lane * kMatrices + m] >> 16 * half & 0xffff) == 64 * m + 8 * row + column);
      }
    }
  }
}

EMULATOR_TEST(ldmatrix_plain) {
  check_load_matrices<1, false>();
  check_load_matrices<2, false>();
  check_load_matrices<4, false>();
}

EMULATOR_TEST(ldmatrix_transposed) {
  check_load_matrices<2, true>();
  check_load_matrices<4, true>();
}

// What stmatrix stores, plain loads find where ldmatrix would.
template <bool kTransposed>
__global__ void store_matrices(uint16_t* out) {
  const uint32_t base = ptx::dynamic_shared_memory();
  const uint32_t lane = ptx::lane_id();
  uint32_t s[4];
  for (uint32_t m = 0; m < 4; ++m) {
    s[m] = (64 * m + 2 * lane) | (64 * m + 2 * lane + 1) << 16;
  }
  if (kTransposed) {
    ptx::stmatrix_x4_trans(base + 16 * lane, s);
  } else {
    ptx::stmatrix_x4(base + 16 * lane, s);
  }
  ptx::sync_warp();
  for (uint32_t i = lane; i < 256; i += 32) out[i] = ptx::load_shared<uint16_t>(base + 2 * i);
}

EMULATOR_TEST(stmatrix_is_the_inverse) {
  std::vector<uint16_t> out(256);
  ATTNFORGE_LAUNCH((store_matrices<false>), dim3(1), dim3(32), 512, nullptr, out.data());
  for (uint32_t i = 0; i < 256; ++i) REQUIRE(out[i] == i);
  ATTNFORGE_LAUNCH((store_matrices<true>), dim3(1), dim3(32), 512, nullptr, out.data());
  for (uint32_t i = 0; i < 256; ++i) {
    REQUIRE(out[i] == i / 64 * 64 + i % 8 * 8 + i / 8 % 8);
  }
}

__global__ void store_two_matrices(uint32_t* out) {
  const uint32_t base = ptx::dynamic_shared_memory();
  const uint32_t lane = ptx::lane_id();
  const uint32_t s[2] = {lane, 100 + lane};
  ptx::stmatrix_x2(base + 16 * (lane % 16), s);
  ptx::sync_warp();
  uint32_t d[2];
  ptx::ldmatrix_x2(d, base + 16 * (lane % 16));
  out[lane] = d[0];
  out[32 + lane] = d[1];
}

EMULATOR_TEST(stmatrix_x2) {
  std::vector<uint32_t> out(64);
  ATTNFORGE_LAUNCH(store_two_matrices, dim3(1), dim3(32), 256, nullptr, out.data());
  for (uint32_t i = 0; i < 64; ++i) REQUIRE(out[i] == i % 32 + i / 32 * 100);
}

template <bool kSyncs>
__global__ void load_without_sync(uint32_t* out) {
  const uint32_t base = ptx::dynamic_shared_memory();
  const uint32_t lane = ptx::lane_id();
  ptx::store_shared(base + 4 * lane, lane);
  if (kSyncs) ptx::sync_warp();
  uint32_t d[1];
  ptx::ldmatrix_x1(d, base + 16 * (lane % 8));
  out[lane] = d[0];
}

EMULATOR_TEST(ldmatrix_needs_the_lanes_to_sync) {
  std::vector<uint32_t> out(32);
  ATTNFORGE_LAUNCH((load_without_sync<true>), dim3(1), dim3(32), 128, nullptr, out.data());
  expect_report(
      [&] {
        ATTNFORGE_LAUNCH((load_without_sync<false>), dim3(1), dim3(32), 128, nullptr, out.data());
      },
      {"reads shared memory at byte", "no barrier orders the write before the read"});
}

__global__ void misaligned_row(uint32_t offset) {
  const uint32_t base = ptx::dynamic_shared_memory();
  const ptx::U32x4 zero{};
  ptx::store_shared(base + 16 * ptx::lane_id(), zero);
  ptx::sync_warp();
  uint32_t d[4];
  ptx::ldmatrix_x4(d, base + 16 * ptx::lane_id() + offset);
}

EMULATOR_TEST(ldmatrix_checks_addresses) {
  expect_report([] { ATTNFORGE_LAUNCH(misaligned_row, dim3(1), dim3(32), 512, nullptr, 8u); },
                {"is not aligned to 16"});
  expect_report([] { ATTNFORGE_LAUNCH(misaligned_row, dim3(1), dim3(32), 512, nullptr, 16u); },
                {"out of bounds: the launch has 512"});
}

__global__ void diverging_mma(float* out) {
  const uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  if (threadIdx.x < 16) {
    ptx::mma_m16n8k16_bf16(d, a, b);
  } else {
    ptx::mma_m16n8k16_bf16(d, a, b);
  }
  out[threadIdx.x] = d[0];
}

EMULATOR_TEST(mma_from_two_lines) {
  std::vector<float> out(32);
  expect_report([&] { ATTNFORGE_LAUNCH(diverging_mma, dim3(1), dim3(32), 0, nullptr, out.data()); },
                {"warp divergence", "mma at test_matrices.cpp"});
}

}  // namespace
}  // namespace attnforge::emulate
