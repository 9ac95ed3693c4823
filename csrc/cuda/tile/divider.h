// Division by a number that is known before a launch.
#pragma once

#include "cuda/ptx/platform.h"

namespace attnforge::cuda {

// n / d for 0 <= n < 2^31 by a product (Granlund and Montgomery, 1994).
struct Divider {
  uint32_t factor;
  int shift, divisor;

  static Divider by(int64_t divisor) {
    int log = 0;
    while ((int64_t{1} << log) < divisor) ++log;
    const uint64_t factor = (uint64_t{1} << (31 + log)) / static_cast<uint64_t>(divisor) + 1;
    return {static_cast<uint32_t>(factor), 31 + log, static_cast<int>(divisor)};
  }
  AF_DEVICE int quotient(int n) const {
    return static_cast<int>(uint64_t{static_cast<uint32_t>(n)} * factor >> shift);
  }
};

}  // namespace attnforge::cuda
