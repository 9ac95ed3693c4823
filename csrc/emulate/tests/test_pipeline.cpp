// The shape of a Hopper kernel in one piece: a producer that loads tiles by TMA, a warpgroup that
// multiplies them, two stages between, and a result that leaves by TMA. With its planted bugs.
#include "cuda/ptx/math.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/ptx/sync.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/warp.h"
#include "cuda/ptx/wgmma.h"
#include "testing.h"

namespace attnforge::emulate {
namespace {

using testing::expect_report;

enum class Bug {
  kNone,
  kEarlyFlip,     // the consumer waits for the other parity
  kOneTileMore,   // the consumer wants a tile that nobody loads
  kReleaseEarly,  // the stage goes back before the products are done
  kNoEmptyWait,   // the producer loads into a stage in use
  kShortExpect,   // the phase expects half of its bytes
  kWrongTile,     // the producer is off by one
  kNoStoreFence,  // st.shared, then the store by TMA
  kNoStoreSync,   // the store does not wait for the other warps
};

constexpr uint32_t kTileBytes = 64 * 128;  // [64, 64] bf16
constexpr uint32_t kStageBytes = 2 * kTileBytes;
constexpr uint32_t kResultBytes = 64 * 64 * 4;
constexpr uint32_t kShared = 1024 + 2 * kStageBytes + kResultBytes;

// result[64, 64] = a[64, 64 tiles] b[64, 64 tiles]^T
template <Bug kBug>
__global__ void __launch_bounds__(256, 1)
    matmul(const __grid_constant__ cuda::TensorMap a, const __grid_constant__ cuda::TensorMap b,
           const __grid_constant__ cuda::TensorMap result, int tiles) {
  const uint32_t shared = ptx::dynamic_shared_memory();
  const auto full = [&](int stage) { return shared + 8 * stage; };
  const auto empty = [&](int stage) { return shared + 16 + 8 * stage; };
  const auto tile_of = [&](int stage) { return shared + 1024 + kStageBytes * stage; };
  const uint32_t out = shared + 1024 + 2 * kStageBytes;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      ptx::mbarrier_init(full(stage), 1);
      ptx::mbarrier_init(empty(stage), 128);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::sync_threads();
  if (threadIdx.x < 128) {
    ptx::lower_registers<24>();
    if (threadIdx.x / 32 == 0 && ptx::elect_one()) {
      for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % 2, parity = tile / 2 % 2;
        if (kBug != Bug::kNoEmptyWait) ptx::mbarrier_wait(empty(stage), parity ^ 1);
        ptx::mbarrier_arrive_expect(full(stage),
                                    kBug == Bug::kShortExpect ? kTileBytes : kStageBytes);
        const int column = 64 * (tile + (kBug == Bug::kWrongTile ? 1 : 0));
        ptx::tma_load_2d(tile_of(stage), &a, full(stage), column, 0);
        ptx::tma_load_2d(tile_of(stage) + kTileBytes, &b, full(stage), column, 0);
      }
    }
    return;
  }
  ptx::raise_registers<240>();
  const uint32_t me = threadIdx.x - 128;
  float d[32];
  for (float& x : d) x = 0;
  for (int tile = 0; tile < tiles + (kBug == Bug::kOneTileMore ? 1 : 0); ++tile) {
    const int stage = tile % 2, parity = tile / 2 % 2;
    ptx::mbarrier_wait(full(stage), kBug == Bug::kEarlyFlip ? parity ^ 1 : parity);
    ptx::wgmma_fence();
    for (uint32_t k = 0; k < 4; ++k) {
      const uint32_t start = tile_of(stage) + 32 * k;
      ptx::wgmma_bf16<64>(
          d, ptx::wgmma_descriptor(start, 16, 1024, ptx::MatrixSwizzle::k128),
          ptx::wgmma_descriptor(start + kTileBytes, 16, 1024, ptx::MatrixSwizzle::k128), true);
    }
    ptx::wgmma_commit();
    if (kBug == Bug::kReleaseEarly) ptx::mbarrier_arrive(empty(stage));
    ptx::wgmma_wait<0>();
    if (kBug != Bug::kReleaseEarly) ptx::mbarrier_arrive(empty(stage));
  }
  for (int i = 0; i < 32; i += 2) {
    const uint32_t row = me / 32 * 16 + me % 32 / 4 + (i % 4 < 2 ? 0 : 8);
    const uint32_t column = i / 4 * 8 + me % 4 * 2;
    ptx::store_shared(out + row * 256 + column * 4,
                      ptx::U32x2{{ptx::bits_of_float(d[i]), ptx::bits_of_float(d[i + 1])}});
  }
  if (kBug != Bug::kNoStoreFence) ptx::fence_proxy_async();
  if (kBug != Bug::kNoStoreSync) ptx::named_barrier_sync(1, 128);
  if (me == 0) {
    ptx::tma_store_2d(&result, out, 0, 0);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}

template <Bug kBug>
void run_matmul(int tiles = 5) {
  testing::Random random(5);
  alignas(16) static uint16_t a[64][64 * 5], b[64][64 * 5];
  alignas(16) static float result[64][64];
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 64 * 5; ++k) {
      a[row][k] = ptx::bf16_from_float(std::round(random.unit() * 4) / 4);
      b[row][k] = ptx::bf16_from_float(std::round(random.unit() * 4) / 4);
    }
    for (float& x : result[row]) x = std::nanf("");
  }
  const auto width = static_cast<uint64_t>(64 * tiles);
  cuda::TensorMap map_a, map_b, map_result;
  make_tensor_map(
      &map_a,
      {a, 2, {width, 64}, {2, 640}, {64, 64}, cuda::TensorType::kBf16, cuda::TensorSwizzle::k128});
  make_tensor_map(
      &map_b,
      {b, 2, {width, 64}, {2, 640}, {64, 64}, cuda::TensorType::kBf16, cuda::TensorSwizzle::k128});
  make_tensor_map(&map_result, {result,
                                2,
                                {64, 64},
                                {4, 256},
                                {64, 64},
                                cuda::TensorType::kF32,
                                cuda::TensorSwizzle::kNone});
  ATTNFORGE_LAUNCH((matmul<kBug>), dim3(1), dim3(256), kShared, nullptr, map_a, map_b, map_result,
                   tiles);
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; ++column) {
      double sum = 0;
      for (int k = 0; k < 64 * tiles; ++k) {
        sum += double{ptx::float_from_bf16(a[row][k])} * ptx::float_from_bf16(b[column][k]);
      }
      testing::require_equal(result[row][column], sum, 0, "an element of the product");
    }
  }
}

EMULATOR_TEST(hopper_pipeline) {
  for (uint64_t n = 0; n < 4; ++n) {
    set_options(testing::seeded(n, 7));
    run_matmul<Bug::kNone>();
  }
  run_matmul<Bug::kNone>(1);
}

EMULATOR_TEST(pipeline_early_phase_flip) {
  expect_report([] { run_matmul<Bug::kEarlyFlip>(); }, {"test_pipeline.cpp:"});
}

EMULATOR_TEST(pipeline_one_tile_more) {
  expect_report([] { run_matmul<Bug::kOneTileMore>(); },
                {"deadlock", "128 threads of block (0,0,0) waiting for mbarrier_wait"});
}

EMULATOR_TEST(pipeline_releases_early) {
  expect_report([] { run_matmul<Bug::kReleaseEarly>(); }, {"shared memory at byte"});
}

EMULATOR_TEST(pipeline_loads_into_a_stage_in_use) {
  // By a copy over what is being read, or by a second arrival in one phase: the schedule chooses.
  expect_report([] { run_matmul<Bug::kNoEmptyWait>(); }, {"test_pipeline.cpp:"});
}

EMULATOR_TEST(pipeline_expects_too_few_bytes) {
  expect_report([] { run_matmul<Bug::kShortExpect>(); }, {"test_pipeline.cpp:"});
}

EMULATOR_TEST(pipeline_off_by_one_tile) {
  bool wrong = false;
  try {
    run_matmul<Bug::kWrongTile>();
  } catch (const std::runtime_error&) {
    wrong = true;
  }
  REQUIRE(wrong);
}

EMULATOR_TEST(pipeline_stores_without_the_proxy_fence) {
  expect_report([] { run_matmul<Bug::kNoStoreFence>(); },
                {"no fence.proxy.async stands between", "test_pipeline.cpp"});
}

EMULATOR_TEST(pipeline_stores_before_all_have_written) {
  expect_report([] { run_matmul<Bug::kNoStoreSync>(); }, {"shared memory at byte"});
}

}  // namespace
}  // namespace attnforge::emulate
