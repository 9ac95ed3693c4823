// mbarrier (sm_90 forms): a barrier in 8 bytes of shared memory, 8-byte aligned, that also counts
// bytes.
//
// A phase is complete when `count` arrivals have come and the bytes that were expected have landed.
// The next phase begins at once. Phases have parity 0, 1, 0, ... from the first; waiting for parity
// p returns when the newest complete phase has parity p. So of a fresh barrier, waiting for parity
// 1 returns at once, and for parity 0 when its first phase is complete. What was done before an
// arrival, and the bytes, are visible after the wait.
#pragma once

#include "cuda/ptx/platform.h"

namespace attnforge::ptx {

// mbarrier.init: by one thread; then fence_mbarrier_init by the same, then a barrier of the block.
AF_DEVICE void mbarrier_init(uint32_t barrier, uint32_t count AF_SITE) {
#if AF_EMULATE
  emulate::mbarrier_init(barrier, count, site);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
#endif
}

// fence.mbarrier_init.release.cluster: bulk copies see the barriers that this thread initialised.
AF_DEVICE void fence_mbarrier_init(AF_ONLY_SITE) {
#if AF_EMULATE
  emulate::fence_mbarrier_init(site);
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// mbarrier.inval: the bytes are free for other use.
AF_DEVICE void mbarrier_invalidate(uint32_t barrier AF_SITE) {
#if AF_EMULATE
  emulate::mbarrier_invalidate(barrier, site);
#else
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

// mbarrier.arrive
AF_DEVICE void mbarrier_arrive(uint32_t barrier AF_SITE) {
#if AF_EMULATE
  emulate::mbarrier_arrive(barrier, 0, site);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// mbarrier.arrive.expect_tx: this phase waits for `bytes` more, and one arrival less.
AF_DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes AF_SITE) {
#if AF_EMULATE
  emulate::mbarrier_arrive(barrier, bytes, site);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}

// mbarrier.try_wait.parity: may return false before its time is up; see mbarrier_wait.
AF_DEVICE bool mbarrier_try_wait(uint32_t barrier, uint32_t parity AF_SITE) {
#if AF_EMULATE
  return emulate::mbarrier_try_wait(barrier, parity, site);
#else
  uint32_t complete;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(complete)
      : "r"(barrier), "r"(parity)
      : "memory");
  return complete != 0;
#endif
}

// Waits for the phase of this parity. The caller must not lag two phases: parity cannot tell them.
AF_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity AF_SITE) {
  while (!mbarrier_try_wait(barrier, parity AF_PASS_SITE)) {
  }
}

// cp.async.mbarrier.arrive.noinc: arrives once all cp.async that this thread has issued have
// landed. Whoever waits for the phase sees them; no wait_group is needed.
AF_DEVICE void cp_async_mbarrier_arrive(uint32_t barrier AF_SITE) {
#if AF_EMULATE
  emulate::cp_async_mbarrier_arrive(barrier, site);
#else
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

}  // namespace attnforge::ptx
