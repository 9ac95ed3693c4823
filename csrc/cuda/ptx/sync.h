// Barriers of a block and of a warp, and memory fences.
#pragma once

#include "cuda/ptx/platform.h"

namespace attnforge::ptx {

// __syncthreads: every thread of the block, from the same line of code.
AF_DEVICE void sync_threads(AF_ONLY_SITE) {
#if AF_EMULATE
  emulate::sync_threads(site);
#else
  __syncthreads();
#endif
}

// bar.sync id, threads: waits until `threads` (a multiple of 32) have synced or arrived at barrier
// `id` in 1..15. 0 is sync_threads. All lanes of a warp come together.
AF_DEVICE void named_barrier_sync(uint32_t id, uint32_t threads AF_SITE) {
#if AF_EMULATE
  emulate::named_barrier(id, threads, /*wait=*/true, site);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// bar.arrive id, threads: counts like named_barrier_sync, and goes on.
AF_DEVICE void named_barrier_arrive(uint32_t id, uint32_t threads AF_SITE) {
#if AF_EMULATE
  emulate::named_barrier(id, threads, /*wait=*/false, site);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// bar.warp.sync: the lanes of `mask` meet, and see each other's memory accesses before it.
AF_DEVICE void sync_warp(uint32_t mask = kFullWarp AF_SITE) {
#if AF_EMULATE
  emulate::sync_warp(mask, site);
#else
  asm volatile("bar.warp.sync %0;" ::"r"(mask) : "memory");
#endif
}

// fence.acq_rel.gpu (__threadfence): orders this thread's accesses for the whole GPU.
AF_DEVICE void fence_gpu() {
#if AF_EMULATE
#else
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

// fence.acq_rel.cta (__threadfence_block)
AF_DEVICE void fence_block() {
#if AF_EMULATE
#else
  asm volatile("fence.acq_rel.cta;" ::: "memory");
#endif
}

}  // namespace attnforge::ptx
