// setmaxnreg (sm_90a): registers per thread, moved between the warpgroups of a block.
//
// All warps of a warpgroup execute it. The counts over the block must fit what the kernel was
// launched with, and raising waits until another group has lowered.
#pragma once

#include "cuda/ptx/platform.h"

namespace attnforge::ptx {

// setmaxnreg.dec.sync.aligned.u32: kRegisters is a multiple of 8 in 24..256.
template <int kRegisters>
AF_DEVICE void lower_registers(AF_ONLY_SITE) {
  static_assert(kRegisters % 8 == 0 && 24 <= kRegisters && kRegisters <= 256);
#if AF_EMULATE
  emulate::set_registers(kRegisters, false, site);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// setmaxnreg.inc.sync.aligned.u32
template <int kRegisters>
AF_DEVICE void raise_registers(AF_ONLY_SITE) {
  static_assert(kRegisters % 8 == 0 && 24 <= kRegisters && kRegisters <= 256);
#if AF_EMULATE
  emulate::set_registers(kRegisters, true, site);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

}  // namespace attnforge::ptx
