// Transposition of e4m3 tiles and their second product (csrc/cuda/tile/transpose.h), each alone.
#include "cuda/ptx/memory.h"
#include "cuda/ptx/sync.h"
#include "cuda/tile/transpose.h"
#include "testing.h"

namespace attnforge::cuda {
namespace {

using emulate::testing::Random;
using emulate::testing::require_equal;

// Byte by byte into a tile, three warps transpose it, byte by byte out of the other.
template <int kKeys, int kDim>
__global__ void transpose(const uint8_t* from, uint8_t* to) {
  using From = PanelTile<Float8, kKeys, kDim>;
  using To = PanelTile<Float8, kDim, kKeys>;
  const From v = {ptx::dynamic_shared_memory()};
  const To t = {v.base + From::kBytes};
  for (int n = static_cast<int>(threadIdx.x); n < kKeys * kDim / 4; n += 96) {
    uint32_t word;
    __builtin_memcpy(&word, from + 4 * n, 4);
    const int key = 4 * n / kDim, channel = 4 * n % kDim;
    ptx::store_shared(v.chunk(key, channel / 16) + channel % 16, word);
  }
  ptx::sync_threads();
  transpose_bytes(v, t, static_cast<int>(threadIdx.x) / 32, 3);
  ptx::sync_threads();
  for (int n = static_cast<int>(threadIdx.x); n < kKeys * kDim / 4; n += 96) {
    const int row = 4 * n / kKeys, position = 4 * n % kKeys;
    const uint32_t word = ptx::load_shared<uint32_t>(t.chunk(row, position / 16) + position % 16);
    __builtin_memcpy(to + 4 * n, &word, 4);
  }
}

template <int kKeys, int kDim>
void check_transpose() {
  std::vector<uint8_t> from(kKeys * kDim), to(from.size());
  Random random(5);
  for (uint8_t& x : from) x = static_cast<uint8_t>(random.bits());
  ATTNFORGE_LAUNCH((transpose<kKeys, kDim>), dim3(1), dim3(96), 256 * 1024 - 32 * 1024, nullptr,
                   from.data(), to.data());
  for (int row = 0; row < kDim; ++row) {
    for (int position = 0; position < kKeys; ++position) {
      const int t = position % 16 / 4, i = position % 4;
      const int key = position / 16 * 16 + 2 * t + i % 2 + 8 * (i / 2);
      REQUIRE(to[row * kKeys + position] == from[key * kDim + e4m3_channel(row)]);
    }
  }
}

EMULATOR_TEST(transposed_bytes) {
  check_transpose<128, 64>();
  check_transpose<128, 128>();
  check_transpose<64, 256>();
}

// A lane's weights of 32 keys as e4m3 numbers, each with the score that it comes from.
__global__ void pack(const float* scores, float* sums) {
  Accumulators<1, 4> s;
  for (int n = 0; n < 16; ++n) s[0][n / 4][n % 4] = scores[threadIdx.x * 16 + n];
  WeightsE4m3<32> p;
  pack_weights_e4m3<32>(p, s);
  for (int r = 0; r < 4; ++r) {
    for (int i = 0; i < 4; ++i) {
      const auto byte = [&](const uint32_t (&x)[4]) {
        return widen(Float8{static_cast<uint8_t>(x[r] >> 8 * i & 0xff)});
      };
      // key 2 t + i % 2 + 8 (i / 2) of 16: an element of fragment r / 2 * 2 + i / 2
      const int place = (r / 2 * 2 + i / 2) * 4 + r % 2 * 2 + i % 2;
      sums[threadIdx.x * 16 + place] = byte(p.high[0]) + byte(p.low[0]);
    }
  }
}

EMULATOR_TEST(weights_of_two_terms) {
  std::vector<float> weights(32 * 16), sums(weights.size());
  Random random(7);
  for (float& x : weights) x = std::exp2(-20 * std::fabs(random.unit()));
  weights[0] = 1.0f, weights[1] = 0.0f, weights[2] = std::exp2(-18.0f);
  ATTNFORGE_LAUNCH((pack), dim3(1), dim3(32), 0, nullptr, weights.data(), sums.data());
  for (size_t n = 0; n < weights.size(); ++n) {
    const double bound = std::max(std::exp2(-8.0) * weights[n], std::exp2(-18.0));
    require_equal(sums[n] / kE4m3Scale, weights[n], 1.01 * bound, "a weight");
  }
}

}  // namespace
}  // namespace attnforge::cuda
