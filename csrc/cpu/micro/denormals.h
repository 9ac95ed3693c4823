// Flushes denormal results to zero while it lives: a decayed state would otherwise spend thousands
// of tokens below 1e-38, at a tenth of the speed on many CPUs. A gate that small is a zero.
// Operands are left alone: without F16C a subnormal half is widened through a denormal float.
#pragma once

#include "cpu/simd/vec.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

struct FlushDenormals {
#if defined(__SSE__)
  unsigned saved = _mm_getcsr();
  AF_INLINE_MEMBER FlushDenormals() { _mm_setcsr(saved | 0x8000u); }  // FTZ
  AF_INLINE_MEMBER ~FlushDenormals() { _mm_setcsr(saved); }
#else
  AF_INLINE_MEMBER FlushDenormals() {}
#endif
};

}  // namespace attnforge::cpu::ATTNFORGE_ISA
