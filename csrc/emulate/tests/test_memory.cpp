// Shared memory, atomics and cp.async: poison, bounds, and copies that land late.
#include <cstring>

#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/sync.h"
#include "testing.h"

namespace attnforge::emulate {
namespace {

using testing::expect_report;

template <typename T>
__global__ void round_trip(unsigned char* out) {
  const uint32_t base = ptx::dynamic_shared_memory();
  T value;
  for (uint32_t i = 0; i < sizeof(T); ++i) {
    reinterpret_cast<unsigned char*>(&value)[i] = static_cast<unsigned char>(threadIdx.x + i);
  }
  ptx::store_shared(base + static_cast<uint32_t>(sizeof(T)) * threadIdx.x, value);
  const T again = ptx::load_shared<T>(base + static_cast<uint32_t>(sizeof(T)) * threadIdx.x);
  std::memcpy(out + sizeof(T) * threadIdx.x, &again, sizeof(T));
}

template <typename T>
void check_round_trip() {
  std::vector<unsigned char> out(32 * sizeof(T));
  ATTNFORGE_LAUNCH((round_trip<T>), dim3(1), dim3(32), 32 * sizeof(T), nullptr, out.data());
  for (size_t i = 0; i < out.size(); ++i) REQUIRE(out[i] == i / sizeof(T) + i % sizeof(T));
}

EMULATOR_TEST(shared_memory_keeps_values) {
  check_round_trip<uint16_t>();
  check_round_trip<float>();
  check_round_trip<ptx::U32x2>();
  check_round_trip<ptx::U32x4>();
}

__global__ void load_at(uint32_t offset, uint32_t written) {
  const uint32_t base = ptx::dynamic_shared_memory();
  for (uint32_t i = 0; i < written; i += 4) ptx::store_shared(base + i, 1.0f);
  ptx::load_shared<ptx::U32x2>(base + offset);
}

EMULATOR_TEST(bad_addresses_are_reported) {
  const auto report = [](uint32_t offset, const char* part) {
    expect_report([=] { ATTNFORGE_LAUNCH(load_at, dim3(1), dim3(1), 64, nullptr, offset, 24u); },
                  {part, "test_memory.cpp"});
  };
  ATTNFORGE_LAUNCH(load_at, dim3(1), dim3(1), 64, nullptr, 16u, 24u);
  report(24, "reads shared memory at byte 24, which nobody has written");
  report(64, "out of bounds: the launch has 64");
  report(0u - 8, "out of bounds");
  report(4, "is not aligned to 8");
}

// Two threads write neighbouring halves of a word: no race. Without the sync, the read is one.
template <bool kSyncs>
__global__ void halves(uint32_t* out) {
  const uint32_t base = ptx::dynamic_shared_memory();
  ptx::store_shared(base + 2 * threadIdx.x, static_cast<uint16_t>(threadIdx.x));
  if (kSyncs) ptx::sync_threads();
  if (threadIdx.x == 0) *out = ptx::load_shared<uint32_t>(base);
}

EMULATOR_TEST(races_are_found_per_byte) {
  uint32_t out = 0;
  ATTNFORGE_LAUNCH((halves<true>), dim3(1), dim3(64), 128, nullptr, &out);
  REQUIRE(out == 0x10000);
  expect_report([&] { ATTNFORGE_LAUNCH((halves<false>), dim3(1), dim3(64), 128, nullptr, &out); },
                {"reads shared memory at byte 2"});
}

__global__ void write_twice(int) {
  ptx::store_shared(ptx::dynamic_shared_memory(), threadIdx.x);
}

EMULATOR_TEST(unordered_writes_are_reported) {
  expect_report([] { ATTNFORGE_LAUNCH(write_twice, dim3(1), dim3(2), 4, nullptr, 0); },
                {"no barrier orders the two writes"});
}

template <bool kInitialised, bool kSyncs>
__global__ void accumulate(float* out, float* global) {
  const uint32_t base = ptx::dynamic_shared_memory();
  if (kInitialised && threadIdx.x == 0) ptx::store_shared(base, 1.0f);
  ptx::sync_threads();
  ptx::add_shared(base, 2.0f);
  ptx::add_global(global, 1.0f);
  if (kSyncs) ptx::sync_threads();
  if (threadIdx.x == 0) *out = ptx::load_shared<float>(base);
}

EMULATOR_TEST(atomics) {
  float out = 0, global = 0;
  ATTNFORGE_LAUNCH((accumulate<true, true>), dim3(2), dim3(64), 4, nullptr, &out, &global);
  REQUIRE(out == 129);
  REQUIRE(global == 128);
  expect_report(
      [&] {
        ATTNFORGE_LAUNCH((accumulate<false, true>), dim3(1), dim3(64), 4, nullptr, &out, &global);
      },
      {"which nobody has written"});
  expect_report(
      [&] {
        ATTNFORGE_LAUNCH((accumulate<true, false>), dim3(1), dim3(64), 4, nullptr, &out, &global);
      },
      {"no barrier orders the"});
}

__global__ void tickets_of_a_block(uint32_t* taken, uint32_t* bits) {
  const uint32_t base = ptx::dynamic_shared_memory();
  if (threadIdx.x < 2) ptx::store_shared(base + 4 * threadIdx.x, uint32_t{0});
  ptx::sync_threads();
  taken[ptx::fetch_add_shared(base, 1)] += 1;
  const uint32_t bit = 1u << threadIdx.x % 32;
  if (ptx::fetch_or_shared(base + 4, bit) & bit) *bits += 1;  // of two that set it, the second one
  ptx::sync_threads();
  if (threadIdx.x == 0) taken[64] = ptx::load_shared<uint32_t>(base + 4);
}

EMULATOR_TEST(integer_atomics_of_shared_memory) {
  std::vector<uint32_t> taken(65);
  uint32_t bits = 0;
  ATTNFORGE_LAUNCH(tickets_of_a_block, dim3(1), dim3(64), 8, nullptr, taken.data(), &bits);
  for (int i = 0; i < 64; ++i) REQUIRE(taken[i] == 1);
  REQUIRE(taken[64] == 0xffffffffu && bits == 32);
}

__global__ void tickets(uint32_t* counter, uint32_t* taken) {
  taken[ptx::fetch_add_global(counter, 1)] += 1;
}

EMULATOR_TEST(fetch_add_gives_everyone_a_ticket) {
  uint32_t counter = 0;
  std::vector<uint32_t> taken(96);
  ATTNFORGE_LAUNCH(tickets, dim3(3), dim3(32), 0, nullptr, &counter, taken.data());
  REQUIRE(counter == 96);
  for (uint32_t times : taken) REQUIRE(times == 1);
}

__global__ void copy_16(const void* from, unsigned char* to) {
  const auto* rows = static_cast<const unsigned char*>(from);
  const uint32_t i = threadIdx.x;
  ptx::store_global_16(to + 16 * i, ptx::load_global_16_constant(rows + 16 * i));
  ptx::prefetch_l2(rows);
  ptx::store_global_16_streaming(to + 512 + 16 * i, ptx::load_global_16_streaming(rows + 16 * i));
}

EMULATOR_TEST(global_16_bytes) {
  alignas(16) unsigned char from[512], to[1024];
  for (int i = 0; i < 512; ++i) from[i] = static_cast<unsigned char>(i * 7);
  ATTNFORGE_LAUNCH(copy_16, dim3(1), dim3(32), 0, nullptr, from, to);
  REQUIRE(std::memcmp(from, to, 512) == 0 && std::memcmp(from, to + 512, 512) == 0);
}

// A two-stage pipeline over tiles of 32 x 16 bytes. Tile i + 1 is in flight while tile i is summed.
enum class Bug {
  kNone,
  kNoWait,       // reads what is still in flight
  kWaitTooFew,   // waits for one group less than it should
  kNoBarrier,    // sees its own copy only
  kNoRelease,    // overwrites a stage that others still read
  kOneTileMore,  // off by one
};

template <Bug kBug>
__global__ void pipeline(const float* tiles, int count, float* out) {
  const uint32_t base = ptx::dynamic_shared_memory();
  const uint32_t me = threadIdx.x;
  const auto fetch = [&](int tile) {
    if (tile < count) {
      ptx::cp_async_16(base + 512 * (tile % 2) + 16 * me, tiles + 128 * tile + 4 * me);
    }
    ptx::cp_async_commit();
  };
  float sum = 0;
  fetch(0);
  for (int tile = 0; tile < count + (kBug == Bug::kOneTileMore); ++tile) {
    fetch(tile + 1);
    if (kBug != Bug::kNoWait) ptx::cp_async_wait<kBug == Bug::kWaitTooFew ? 2 : 1>();
    if (kBug != Bug::kNoBarrier) ptx::sync_threads();
    for (int i = 0; i < 4; ++i) {
      sum += ptx::load_shared<float>(base + 512 * (tile % 2) + 16 * (31 - me) + 4 * i);
    }
    if (kBug != Bug::kNoRelease) ptx::sync_threads();
  }
  out[me] = sum;
}

template <Bug kBug>
void run_pipeline() {
  constexpr int kTiles = 5;
  std::vector<float> tiles(128 * kTiles), out(32);
  for (size_t i = 0; i < tiles.size(); ++i) tiles[i] = static_cast<float>(i % 37);
  ATTNFORGE_LAUNCH((pipeline<kBug>), dim3(1), dim3(32), 1024, nullptr, tiles.data(), kTiles,
                   out.data());
  for (int me = 0; me < 32; ++me) {
    float sum = 0;
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int i = 0; i < 4; ++i) sum += tiles[128 * tile + 4 * (31 - me) + i];
    }
    REQUIRE(out[me] == sum);
  }
}

EMULATOR_TEST(cp_async_pipeline) {
  run_pipeline<Bug::kNone>();
}

EMULATOR_TEST(cp_async_not_waited_for) {
  expect_report(run_pipeline<Bug::kNoWait>, {"cp.async", "no wait_group covers it"});
}

EMULATOR_TEST(cp_async_waits_for_a_group_too_few) {
  expect_report(run_pipeline<Bug::kWaitTooFew>, {"cp.async", "no wait_group covers it"});
}

EMULATOR_TEST(cp_async_without_a_barrier) {
  expect_report(run_pipeline<Bug::kNoBarrier>, {"shared memory at byte"});
}

EMULATOR_TEST(cp_async_into_a_stage_in_use) {
  expect_report(run_pipeline<Bug::kNoRelease>, {"shared memory at byte", "test_memory.cpp:"});
}

EMULATOR_TEST(one_tile_too_many) {
  // The stage of tile `count` holds an older tile: the values are wrong, and nothing else is.
  bool noticed = false;
  try {
    run_pipeline<Bug::kOneTileMore>();
  } catch (const std::runtime_error&) {
    noticed = true;
  }
  REQUIRE(noticed);
}

__global__ void zero_fill(const float* from, float* out, uint32_t valid) {
  const uint32_t base = ptx::dynamic_shared_memory();
  ptx::cp_async_16(base, from, valid * 4);
  ptx::cp_async_8(base + 16, from, valid >= 2 ? 8 : valid * 4);
  ptx::cp_async_4(base + 24, from, valid ? 4 : 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (uint32_t i = 0; i < 7; ++i) out[i] = ptx::load_shared<float>(base + 4 * i);
}

EMULATOR_TEST(cp_async_fills_with_zeros) {
  alignas(16) const float from[4] = {1, 2, 3, 4};
  for (uint32_t valid = 0; valid <= 4; ++valid) {
    std::vector<float> out(7);
    ATTNFORGE_LAUNCH(zero_fill, dim3(1), dim3(1), 32, nullptr, valid ? from : nullptr, out.data(),
                     valid);
    for (uint32_t i = 0; i < 7; ++i) {
      const uint32_t j = i < 4 ? i : i < 6 ? i - 4 : 0;
      REQUIRE(out[i] == (j < valid ? from[j] : 0.0f));
    }
  }
}

__global__ void copy_misaligned(const float* from) {
  ptx::cp_async_16(ptx::dynamic_shared_memory(), from + 1);
}

EMULATOR_TEST(cp_async_checks_alignment) {
  alignas(16) const float from[8] = {};
  expect_report([&] { ATTNFORGE_LAUNCH(copy_misaligned, dim3(1), dim3(1), 16, nullptr, from); },
                {"the global address is not aligned to 16"});
}

__global__ void sum_of(const float* values, int count, float* out) {
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += values[i];
  out[threadIdx.x] = sum;
}

__global__ void copy_of(const float* values, float* out) {
  ptx::cp_async_16(ptx::dynamic_shared_memory(), values);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  *out = ptx::load_shared<float>(ptx::dynamic_shared_memory());
}

EMULATOR_CRASH(global_read_out_of_bounds) {
  std::vector<float> values(64), out(32);
  ATTNFORGE_LAUNCH(sum_of, dim3(1), dim3(32), 0, nullptr, values.data(), 65, out.data());
}

EMULATOR_CRASH(cp_async_out_of_bounds) {
  std::vector<float> values(64), out(1);
  ATTNFORGE_LAUNCH(copy_of, dim3(1), dim3(1), 16, nullptr, values.data() + 64, out.data());
}

EMULATOR_TEST(impossible_launches_are_refused) {
  const auto report = [](dim3 grid, uint32_t threads, uint32_t bytes, const char* part) {
    expect_report([=] { ATTNFORGE_LAUNCH(write_twice, grid, dim3(threads), bytes, nullptr, 0); },
                  {part});
  };
  report(dim3(1), 1025, 4, "a block of 1025 threads");
  report(dim3(1), 32, 227 * 1024 + 1, "bytes of dynamic shared memory");
  report(dim3(1, 65536), 32, 4, "a grid of");
}

}  // namespace
}  // namespace attnforge::emulate
