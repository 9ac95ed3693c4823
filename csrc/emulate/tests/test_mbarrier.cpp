// mbarriers: phases, parity, byte counts, and what is reported of their misuse.
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/sync.h"
#include "cuda/ptx/tma.h"
#include "testing.h"

namespace attnforge::emulate {
namespace {

using testing::expect_report;

__global__ void phases(int* seen) {
  const uint32_t barrier = ptx::dynamic_shared_memory();
  ptx::mbarrier_init(barrier, 2);
  const auto passes = [&](uint32_t parity) {  // of a complete phase, in a few attempts
    for (int i = 0; i < 40; ++i) {
      if (ptx::mbarrier_try_wait(barrier, parity)) return 1;
    }
    return 0;
  };
  seen[0] = passes(1);  // the phase before the first counts as complete
  ptx::mbarrier_arrive(barrier);
  seen[1] = passes(1);  // one of two arrivals
  ptx::mbarrier_arrive(barrier);
  seen[2] = passes(0);
  ptx::mbarrier_arrive(barrier);
  ptx::mbarrier_arrive(barrier);
  seen[3] = passes(1);
  ptx::mbarrier_invalidate(barrier);
  ptx::store_shared(barrier, 1.0f);
}

EMULATOR_TEST(mbarrier_phases_alternate) {
  int seen[4] = {};
  ATTNFORGE_LAUNCH(phases, dim3(1), dim3(1), 8, nullptr, seen);
  for (int passed : seen) REQUIRE(passed == 1);
}

__global__ void wait_for_incomplete(int) {
  const uint32_t barrier = ptx::dynamic_shared_memory();
  ptx::mbarrier_init(barrier, 2);
  ptx::mbarrier_arrive(barrier);
  ptx::mbarrier_wait(barrier, 0);
}

EMULATOR_TEST(mbarrier_deadlock) {
  expect_report(
      [] { ATTNFORGE_LAUNCH(wait_for_incomplete, dim3(1), dim3(1), 8, nullptr, 0); },
      {"deadlock",
       "1 thread of block (0,0,0) waiting for mbarrier_wait (parity 0) at test_mbarrier.cpp"});
}

// A ring of two stages between a producer warp and a consumer warp, with full and empty mbarriers.
enum class Bug {
  kNone,
  kEarlyFlip,    // the consumer's parity is the other one
  kNoRelease,    // the consumer never arrives at empty
  kNoEmptyWait,  // the producer does not wait for it
  kIgnoresWait,  // one try, result not looked at
  kNoInitSync,   // no barrier of the block after the init
  kTooMany,      // all lanes arrive where one is expected
};

template <Bug kBug>
__global__ void ring(float* out, int rounds) {
  const uint32_t base = ptx::dynamic_shared_memory();
  const auto full = [&](int stage) { return base + 8 * stage; };
  const auto empty = [&](int stage) { return base + 16 + 8 * stage; };
  const uint32_t lane = threadIdx.x % 32;
  const auto slot = [&](int stage, uint32_t i) { return base + 32 + 128 * stage + 4 * i; };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      ptx::mbarrier_init(full(stage), kBug == Bug::kTooMany ? 1 : 32);
      ptx::mbarrier_init(empty(stage), 32);
    }
    ptx::fence_mbarrier_init();
  }
  if (kBug != Bug::kNoInitSync) ptx::sync_threads();
  if (threadIdx.x < 32) {
    for (int round = 0; round < rounds; ++round) {
      const int stage = round % 2, parity = round / 2 % 2;
      if (kBug != Bug::kNoEmptyWait) ptx::mbarrier_wait(empty(stage), parity ^ 1);
      ptx::store_shared(slot(stage, lane), static_cast<float>(round * 100) + lane);
      ptx::mbarrier_arrive(full(stage));
    }
  } else {
    float sum = 0;
    for (int round = 0; round < rounds; ++round) {
      const int stage = round % 2, parity = round / 2 % 2;
      if (kBug == Bug::kIgnoresWait) {
        ptx::mbarrier_try_wait(full(stage), parity);
      } else {
        ptx::mbarrier_wait(full(stage), kBug == Bug::kEarlyFlip ? parity ^ 1 : parity);
      }
      sum += ptx::load_shared<float>(slot(stage, 31 - lane));
      if (kBug != Bug::kNoRelease) ptx::mbarrier_arrive(empty(stage));
    }
    out[lane] = sum;
  }
}

template <Bug kBug>
void run_ring() {
  std::vector<float> out(32);
  ATTNFORGE_LAUNCH((ring<kBug>), dim3(1), dim3(64), 32 + 256, nullptr, out.data(), 5);
  for (int lane = 0; lane < 32; ++lane) {
    REQUIRE(out[lane] == static_cast<float>(1000 + 5 * (31 - lane)));
  }
}

EMULATOR_TEST(mbarrier_ring) {
  for (uint64_t n = 0; n < 4; ++n) {
    set_options(testing::seeded(n, 3));
    run_ring<Bug::kNone>();
  }
}

EMULATOR_TEST(early_phase_flip) {
  expect_report(run_ring<Bug::kEarlyFlip>, {"shared memory at byte"});
}

EMULATOR_TEST(stage_never_released) {
  expect_report(run_ring<Bug::kNoRelease>, {"deadlock", "mbarrier_wait"});
}

EMULATOR_TEST(stage_overwritten_without_waiting) {
  expect_report(run_ring<Bug::kNoEmptyWait>, {"shared memory at byte"});
}

EMULATOR_TEST(wait_whose_result_is_ignored) {
  expect_report(run_ring<Bug::kIgnoresWait>, {"shared memory at byte"});
}

EMULATOR_TEST(mbarrier_used_before_its_init) {
  expect_report(run_ring<Bug::kNoInitSync>, {"mbarrier"});
}

EMULATOR_TEST(more_arrivals_than_expected) {
  // 32 arrivals per round are 32 phases: the consumer sees stages that are not written.
  expect_report(run_ring<Bug::kTooMany>, {"test_mbarrier.cpp:"});
}

// Copies of one thread complete on an mbarrier; other threads read them.
template <bool kWaits>
__global__ void copy_through(const float* in, float* out) {
  const uint32_t barrier = ptx::dynamic_shared_memory(), data = barrier + 16;
  if (threadIdx.x == 0) ptx::mbarrier_init(barrier, 32);
  ptx::sync_threads();
  if (threadIdx.x < 32) {
    ptx::cp_async_16(data + 16 * threadIdx.x, in + 4 * threadIdx.x);
    ptx::cp_async_mbarrier_arrive(barrier);
  } else {
    if (kWaits) ptx::mbarrier_wait(barrier, 0);
    for (uint32_t i = threadIdx.x - 32; i < 128; i += 32) {
      out[i] = ptx::load_shared<float>(data + 4 * i);
    }
  }
  ptx::mbarrier_wait(barrier, 0);
}

EMULATOR_TEST(cp_async_completes_on_an_mbarrier) {
  alignas(16) float in[128], out[128];
  for (int i = 0; i < 128; ++i) in[i] = static_cast<float>(i);
  ATTNFORGE_LAUNCH((copy_through<true>), dim3(1), dim3(64), 16 + 512, nullptr, in, out);
  for (int i = 0; i < 128; ++i) REQUIRE(out[i] == in[i]);
  expect_report(
      [&] {
        ATTNFORGE_LAUNCH((copy_through<false>), dim3(1), dim3(64), 16 + 512, nullptr, in, out);
      },
      {"reads shared memory at byte"});
}

__global__ void touch_barrier(int) {
  const uint32_t barrier = ptx::dynamic_shared_memory();
  ptx::mbarrier_init(barrier, 1);
  ptx::store_shared(barrier, 0.0f);
}

__global__ void arrive_nowhere(int) {
  ptx::mbarrier_arrive(ptx::dynamic_shared_memory());
}

EMULATOR_TEST(mbarrier_memory_is_no_data) {
  expect_report([] { ATTNFORGE_LAUNCH(touch_barrier, dim3(1), dim3(1), 8, nullptr, 0); },
                {"where an mbarrier lives"});
  expect_report([] { ATTNFORGE_LAUNCH(arrive_nowhere, dim3(1), dim3(1), 8, nullptr, 0); },
                {"there is no mbarrier at byte 0"});
}

// bulk_load: the phase is complete when the expected bytes have landed, not before.
template <int kExpected, bool kFence>
__global__ void load_bulk(const float* in, float* out) {
  const uint32_t barrier = ptx::dynamic_shared_memory(), data = barrier + 128;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    if (kFence) ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(barrier, kExpected);
    ptx::bulk_load(data, in, 256, barrier);
    ptx::bulk_load(data + 256, in + 64, 256, barrier);
  }
  ptx::sync_threads();
  ptx::mbarrier_wait(barrier, 0);
  for (uint32_t i = threadIdx.x; i < 128; i += 32) out[i] = ptx::load_shared<float>(data + 4 * i);
}

EMULATOR_TEST(bulk_load_counts_bytes) {
  alignas(16) float in[128], out[128];
  for (int i = 0; i < 128; ++i) in[i] = static_cast<float>(i);
  const auto launch = [&](void (*kernel)(const float*, float*)) {
    ATTNFORGE_LAUNCH(kernel, dim3(1), dim3(32), 640, nullptr, in, out);
  };
  launch(load_bulk<512, true>);
  for (int i = 0; i < 128; ++i) REQUIRE(out[i] == in[i]);
  expect_report([&] { launch(load_bulk<256, true>); }, {"reads shared memory at byte"});
  expect_report([&] { launch(load_bulk<528, true>); }, {"deadlock", "mbarrier_wait (parity 0)"});
  expect_report([&] { launch(load_bulk<512, false>); }, {"no fence_mbarrier_init"});
}

__global__ void leave_early(const float* in) {
  const uint32_t barrier = ptx::dynamic_shared_memory();
  ptx::mbarrier_init(barrier, 1);
  ptx::fence_mbarrier_init();
  ptx::mbarrier_arrive_expect(barrier, 256);
  ptx::bulk_load(barrier + 128, in, 256, barrier);
}

EMULATOR_TEST(block_ends_with_a_copy_in_flight) {
  alignas(16) const float in[64] = {};
  expect_report([&] { ATTNFORGE_LAUNCH(leave_early, dim3(1), dim3(1), 384, nullptr, in); },
                {"the block has ended, and this copy is still in flight"});
}

}  // namespace
}  // namespace attnforge::emulate
