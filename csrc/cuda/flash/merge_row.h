// One row of a merge of partial states, by a warp whose lanes stride over the channels:
//
//   LSE = log sum exp LSE_n      O = sum exp(LSE_n - LSE) O_n
//
// Parts are added from the first to the last. A part whose LSE is -inf saw no key and is not read.
// A sink is a part before them without a value. NaN propagates.
#pragma once

#include "cuda/launch.h"
#include "cuda/tile/element.h"
#include "cuda/tile/team.h"

namespace attnforge::cuda {

// lse(n): of part n; part(n): its row. Returns the LSE.
template <class T, class Lse, class Part>
AF_DEVICE float merge_row(int64_t states, int64_t dim, const Lse& lse, const Part& part, T* out,
                          float sink = -kInf) {
  float top = sink;  // a NaN it drops stays in the weights
  for (int64_t n = 0; n < states; ++n) top = ptx::max(top, lse(n));
  const float base = top == -kInf ? 0.0f : top;
  const auto weight = [&](float x) {
    return x == base ? 1.0f : ptx::exp2_approx((x - base) * kLog2E);
  };
  float total = sink == -kInf ? 0.0f : weight(sink);
  for (int64_t n = 0; n < states; ++n) total += weight(lse(n));
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t d = ptx::lane_id(); d < dim; d += 32) {
    float sum = 0.0f;
    for (int64_t n = 0; n < states; ++n) {
      const float x = lse(n);
      if (x == -kInf) continue;
      sum = ptx::fma(weight(x), widen(part(n)[d]), sum);
    }
    out[d] = narrow<T>(sum * scale);
  }
  return base + ptx::log2_approx(total) * kLn2;
}

}  // namespace attnforge::cuda
