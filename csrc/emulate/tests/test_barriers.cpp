// Barriers of a block and a warp: what they order, and what is reported where they are missing.
#include <set>

#include "cuda/ptx/memory.h"
#include "cuda/ptx/sync.h"
#include "cuda/ptx/warp.h"
#include "testing.h"

namespace attnforge::emulate {
namespace {

using testing::expect_report;

enum class Bug { kNone, kNoBarrier, kNoSecondBarrier, kSomeThreads, kOneLeaves, kTwoLines };

// Each round, every thread reads what its neighbour wrote.
template <Bug kBug>
__global__ void exchange(float* out) {
  const uint32_t base = ptx::dynamic_shared_memory();
  const uint32_t me = threadIdx.x, next = (me + 1) % blockDim.x;
  if (kBug == Bug::kOneLeaves && me == 40) return;
  float value = static_cast<float>(me);
  for (int round = 0; round < 3; ++round) {
    ptx::store_shared(base + 4 * me, value);
    if (kBug == Bug::kTwoLines) {
      if (me < 32) {
        ptx::sync_threads();
      } else {
        ptx::sync_threads();
      }
    } else if (kBug != Bug::kNoBarrier && (kBug != Bug::kSomeThreads || me != 7)) {
      ptx::sync_threads();
    }
    value = ptx::load_shared<float>(base + 4 * next);
    if (kBug != Bug::kNoSecondBarrier) ptx::sync_threads();
  }
  out[blockIdx.x * blockDim.x + me] = value;
}

template <Bug kBug>
void run_exchange() {
  std::vector<float> out(3 * 64);
  ATTNFORGE_LAUNCH((exchange<kBug>), dim3(3), dim3(64), 256, nullptr, out.data());
  for (uint32_t i = 0; i < out.size(); ++i) REQUIRE(out[i] == static_cast<float>((i + 3) % 64));
}

EMULATOR_TEST(sync_threads_orders_a_block) {
  run_exchange<Bug::kNone>();
}

EMULATOR_TEST(dropped_barrier_before_the_read) {
  expect_report(run_exchange<Bug::kNoBarrier>,
                {"shared memory at byte",
                 "test_barriers.cpp:", "seed " + std::to_string(testing::first_seed()), "block ("});
}

EMULATOR_TEST(dropped_barrier_after_the_read) {
  expect_report(run_exchange<Bug::kNoSecondBarrier>,
                {"shared memory at byte", "and no barrier orders the"});
}

EMULATOR_TEST(barrier_that_some_threads_skip) {
  expect_report(run_exchange<Bug::kSomeThreads>, {"thread 7 (warp 0, lane 7)"});
}

EMULATOR_TEST(barrier_that_an_exited_thread_misses) {
  expect_report(run_exchange<Bug::kOneLeaves>, {"barrier divergence", "left the kernel"});
}

EMULATOR_TEST(barrier_from_two_lines) {
  expect_report(run_exchange<Bug::kTwoLines>, {"barrier divergence", "is at another one"});
}

// Warp 0 produces for warp 1 through barriers 1 (full) and 2 (empty).
template <bool kWaitsForEmpty>
__global__ void hand_over(float* out, int rounds) {
  const uint32_t base = ptx::dynamic_shared_memory();
  const uint32_t lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    for (int round = 0; round < rounds; ++round) {
      if (kWaitsForEmpty && round > 0) ptx::named_barrier_sync(2, 64);
      ptx::store_shared(base + 4 * lane, static_cast<float>(round));
      ptx::named_barrier_arrive(1, 64);
    }
    if (kWaitsForEmpty) ptx::named_barrier_sync(2, 64);
  } else {
    float sum = 0;
    for (int round = 0; round < rounds; ++round) {
      ptx::named_barrier_sync(1, 64);
      sum += ptx::load_shared<float>(base + 4 * (31 - lane));
      ptx::named_barrier_arrive(2, 64);
    }
    out[lane] = sum;
  }
}

EMULATOR_TEST(named_barriers_hand_over) {
  std::vector<float> out(32);
  ATTNFORGE_LAUNCH((hand_over<true>), dim3(1), dim3(64), 128, nullptr, out.data(), 4);
  for (float sum : out) REQUIRE(sum == 6);
}

EMULATOR_TEST(named_barrier_not_waited_for) {
  std::vector<float> out(32);
  expect_report(
      [&] { ATTNFORGE_LAUNCH((hand_over<false>), dim3(1), dim3(64), 128, nullptr, out.data(), 4); },
      {"thread "});
}

__global__ void wait_for_nobody(int) {
  if (threadIdx.x < 32) ptx::named_barrier_sync(3, 64);
}

EMULATOR_TEST(deadlock_names_who_waits) {
  expect_report(
      [] { ATTNFORGE_LAUNCH(wait_for_nobody, dim3(1), dim3(64), 0, nullptr, 0); },
      {"deadlock",
       "32 threads of block (0,0,0) waiting for named_barrier_sync at test_barriers.cpp",
       "32 threads of block (0,0,0) left the kernel, the first is thread 32 (warp 1, lane 0)"});
}

// Lanes pass values through shared memory; shuffles do not order it.
template <bool kSyncs>
__global__ void reverse_lanes(float* out) {
  const uint32_t base = ptx::dynamic_shared_memory();
  const uint32_t lane = threadIdx.x;
  ptx::store_shared(base + 4 * lane, static_cast<float>(lane));
  if (kSyncs) {
    ptx::sync_warp();
  } else {
    ptx::shuffle_xor(lane, 1);
  }
  out[lane] = ptx::load_shared<float>(base + 4 * (31 - lane));
}

EMULATOR_TEST(sync_warp_orders_lanes) {
  std::vector<float> out(32);
  ATTNFORGE_LAUNCH((reverse_lanes<true>), dim3(1), dim3(32), 128, nullptr, out.data());
  for (int i = 0; i < 32; ++i) REQUIRE(out[i] == static_cast<float>(31 - i));
}

EMULATOR_TEST(shuffle_does_not_order_memory) {
  std::vector<float> out(32);
  expect_report(
      [&] {
        ATTNFORGE_LAUNCH((reverse_lanes<false>), dim3(1), dim3(32), 128, nullptr, out.data());
      },
      {"no barrier orders the write before the read"});
}

// Blocks take turns by a semaphore in global memory, as an ordered accumulation does.
__global__ void take_turns(uint32_t* turn, float* sum) {
  if (threadIdx.x == 0) {
    while (ptx::load_acquire_global(turn) != blockIdx.x) {
    }
  }
  ptx::sync_threads();
  sum[threadIdx.x] = sum[threadIdx.x] * 2 + static_cast<float>(blockIdx.x);
  ptx::sync_threads();
  if (threadIdx.x == 0) ptx::store_release_global(turn, blockIdx.x + 1);
}

EMULATOR_TEST(semaphore_between_blocks) {
  uint32_t turn = 0;
  std::vector<float> sum(32);
  ATTNFORGE_LAUNCH(take_turns, dim3(5), dim3(32), 0, nullptr, &turn, sum.data());
  for (float s : sum) REQUIRE(s == 26);  // (((0 2 + 1) 2 + 2) 2 + 3) 2 + 4
}

__global__ void wait_forever(uint32_t* turn) {
  while (ptx::load_acquire_global(turn) != 1) {
  }
}

EMULATOR_TEST(livelock_is_reported) {
  Options few = testing::seeded();
  few.steps = 1000;
  set_options(few);
  uint32_t turn = 0;
  expect_report([&] { ATTNFORGE_LAUNCH(wait_forever, dim3(1), dim3(32), 0, nullptr, &turn); },
                {"livelock", "load_acquire_global at test_barriers.cpp"});
}

EMULATOR_TEST(every_seed_gives_the_same_values) {
  std::set<uint64_t> switches;
  for (uint64_t n = 0; n < 5; ++n) {
    set_options(testing::seeded(n, 2));
    run_exchange<Bug::kNone>();
    switches.insert(last_launch().switches);
  }
  REQUIRE(switches.size() > 1);  // the schedules were different ones
}

}  // namespace
}  // namespace attnforge::emulate
