// What every file of csrc/cuda/ptx/ starts from: the two compilers it is read by.
//
// nvcc sees inline PTX. A host compiler with ATTNFORGE_EMULATE=1 sees calls into the emulator
// (csrc/emulate/), which does what the instruction does and checks what the hardware does not.
// Under the emulator each function takes one more argument, the caller's line, so that a report
// names it: AF_SITE stands last in a parameter list, AF_ONLY_SITE where it is the only parameter.
//
// Shared memory is a 32-bit byte address here, never a pointer: every access goes through a
// function of this directory, and nothing escapes the emulator's checks.
#pragma once

#include <cstdint>

#if defined(ATTNFORGE_EMULATE) && ATTNFORGE_EMULATE
#include <attnforge_emulate/device.h>

#define AF_EMULATE 1
#define AF_DEVICE [[gnu::always_inline]] inline
#define AF_SITE , ::attnforge::emulate::Site site = ::attnforge::emulate::Site::current()
#define AF_ONLY_SITE ::attnforge::emulate::Site site = ::attnforge::emulate::Site::current()
#define AF_PASS_SITE , site
#define AF_PASS_ONLY_SITE site
#elif defined(__CUDACC__)
#define AF_EMULATE 0
#define AF_DEVICE __device__ __forceinline__
#define AF_SITE
#define AF_ONLY_SITE
#define AF_PASS_SITE
#define AF_PASS_ONLY_SITE
#else
#error "csrc/cuda/ is compiled by nvcc, or by a host compiler with -DATTNFORGE_EMULATE=1"
#endif

namespace attnforge::ptx {

// 16 bytes, the widest access of one thread.
struct alignas(16) U32x4 {
  uint32_t v[4];
};
struct alignas(8) U32x2 {
  uint32_t v[2];
};

constexpr uint32_t kFullWarp = 0xffffffffu;

}  // namespace attnforge::ptx
