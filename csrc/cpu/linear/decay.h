// Decays e^gate, to one rounding and, where they multiply a state, to the digits of e^gate - 1.
#pragma once

#include "cpu/simd/vec.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// Exactly 0 below -88: a reset.
AF_INLINE VecF decay_of(VecF log_gate) {
  VecF x = log_gate * splat(kLog2E);
  return exp2(x > splat(127.0f) ? splat(127.0f) : x);
}

// A decay as whole + part: 0 + d, or near 1 as 1 + (d - 1), whose second term keeps its digits. In
// fp32 1 - 1e-6 is 5% off as far as forgetting goes, and that error would add up over all tokens.
struct Kept {
  VecF whole, part;

  AF_INLINE_MEMBER VecF operator()(VecF s, VecF more) const {
    return fma(part, s, fma(whole, s, more));
  }
};

AF_INLINE Kept kept_of(VecF log_gate) {
  // exp(x) - 1 as a series for |x| < 0.7: what is left out is 1.1e-8 of it.
  const VecF x = log_gate;
  VecF p = splat(1.0f / 362880);
  p = fma(p, x, splat(1.0f / 40320));
  p = fma(p, x, splat(1.0f / 5040));
  p = fma(p, x, splat(1.0f / 720));
  p = fma(p, x, splat(1.0f / 120));
  p = fma(p, x, splat(1.0f / 24));
  p = fma(p, x, splat(1.0f / 6));
  p = fma(p, x, splat(1.0f / 2));
  p = fma(p, x, splat(1.0f));
  const VecI near = vabs(x) < splat(0.7f);
  return {near ? splat(1.0f) : splat(0.0f), near ? p * x : decay_of(x)};
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
