// cp.async (sm_80): global to shared memory past the registers.
//
// A copy lands at some time between its issue and the wait_group that covers it: until then no
// thread may touch the bytes, and after it only the issuing thread sees them. A barrier shows them
// to others.
#pragma once

#include "cuda/ptx/platform.h"

namespace attnforge::ptx {

// cp.async.cg.shared.global.L2::128B, 16 bytes past L1. Of the 16, `source_bytes` (0..16) are read
// and the rest are zeros: 0 reads nothing, so `global` need not be valid then.
AF_DEVICE void cp_async_16(uint32_t shared, const void* global,
                           uint32_t source_bytes = 16 AF_SITE) {
#if AF_EMULATE
  emulate::cp_async(shared, global, 16, source_bytes, site);
#else
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(source_bytes)
               : "memory");
#endif
}

// cp.async.ca.shared.global, 8 bytes
AF_DEVICE void cp_async_8(uint32_t shared, const void* global, uint32_t source_bytes = 8 AF_SITE) {
#if AF_EMULATE
  emulate::cp_async(shared, global, 8, source_bytes, site);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global),
               "r"(source_bytes)
               : "memory");
#endif
}

// cp.async.ca.shared.global, 4 bytes
AF_DEVICE void cp_async_4(uint32_t shared, const void* global, uint32_t source_bytes = 4 AF_SITE) {
#if AF_EMULATE
  emulate::cp_async(shared, global, 4, source_bytes, site);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global),
               "r"(source_bytes)
               : "memory");
#endif
}

// cp.async.commit_group: closes a group, which may be empty.
AF_DEVICE void cp_async_commit(AF_ONLY_SITE) {
#if AF_EMULATE
  emulate::cp_async_commit(site);
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// cp.async.wait_group: all but the newest `kPending` groups of this thread have landed.
template <int kPending>
AF_DEVICE void cp_async_wait(AF_ONLY_SITE) {
#if AF_EMULATE
  emulate::cp_async_wait(kPending, site);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace attnforge::ptx
