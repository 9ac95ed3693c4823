// Stages of shared memory between a producer, one thread that fills them by TMA or a few warps, and
// the warps of the consumers: two mbarriers per stage, `full` (its bytes have landed) and `empty`
// (every consumer warp has released it).
//
// Both sides count what passes through: use n is in stage n % kStages, for the n / kStages-th time,
// whose parity is what each waits for. The first uses find their stages empty.
#pragma once

#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/warp.h"

namespace attnforge::cuda {

template <int kStages_>
struct Pipeline {
  static constexpr int kStages = kStages_;
  static constexpr uint32_t kBytes = 16 * kStages;

  uint32_t base;

  AF_DEVICE static int stage(int n) { return n % kStages; }
  AF_DEVICE static uint32_t parity(int n) { return static_cast<uint32_t>(n / kStages) & 1; }
  AF_DEVICE uint32_t full(int n) const { return base + static_cast<uint32_t>(8 * stage(n)); }
  AF_DEVICE uint32_t empty(int n) const { return full(n) + 8 * kStages; }

  // By one thread; then ptx::fence_mbarrier_init and a barrier of the block.
  AF_DEVICE void init(uint32_t consumer_warps, uint32_t producers = 1 AF_SITE) const {
    for (int n = 0; n < kStages; ++n) {
      ptx::mbarrier_init(full(n), producers AF_PASS_SITE);
      ptx::mbarrier_init(empty(n), consumer_warps AF_PASS_SITE);
    }
  }

  // Producer: waits until the stage of use n is free, and announces its bytes. The copies complete
  // on full(n).
  AF_DEVICE void acquire(int n, uint32_t bytes AF_SITE) const {
    claim(n AF_PASS_SITE);
    ptx::mbarrier_arrive_expect(full(n), bytes AF_PASS_SITE);
  }

  // Producer warps that write themselves: wait until the stage of use n is free, and, their writes
  // fenced and a warp-wide operation later, say that they are there.
  AF_DEVICE void claim(int n AF_SITE) const {
    ptx::mbarrier_wait(empty(n), parity(n) ^ 1 AF_PASS_SITE);
  }
  AF_DEVICE void publish(int n AF_SITE) const {
    if (ptx::lane_id() == 0) ptx::mbarrier_arrive(full(n) AF_PASS_SITE);
  }

  // Consumer: the bytes of use n are there. Every thread that touches them waits.
  AF_DEVICE void wait(int n AF_SITE) const { ptx::mbarrier_wait(full(n), parity(n) AF_PASS_SITE); }
  // Consumer: this warp is done with use n. All lanes have passed a warp-wide operation since.
  AF_DEVICE void release(int n AF_SITE) const {
    if (ptx::lane_id() == 0) ptx::mbarrier_arrive(empty(n) AF_PASS_SITE);
  }
};

}  // namespace attnforge::cuda
