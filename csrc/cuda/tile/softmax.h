// Online softmax in base 2 (Milakov and Gimelshein, 2018) on accumulator fragments.
//
// A row lies in the four lanes of a quad. The maximum is theirs together after each step; the sum
// stays each lane's own until the end.
#pragma once

#include "cuda/tile/product.h"

namespace attnforge::cuda {

AF_DEVICE float quad_max(float x AF_SITE) {
  x = ptx::max(x, ptx::shuffle_xor(x, 1, ptx::kFullWarp AF_PASS_SITE));
  return ptx::max(x, ptx::shuffle_xor(x, 2, ptx::kFullWarp AF_PASS_SITE));
}
AF_DEVICE float quad_sum(float x AF_SITE) {
  x += ptx::shuffle_xor(x, 1, ptx::kFullWarp AF_PASS_SITE);
  return x + ptx::shuffle_xor(x, 2, ptx::kFullWarp AF_PASS_SITE);
}

template <int kM>
struct RowSums {
  float top[kM][2], total[kM][2];

  AF_DEVICE static RowSums none() {
    RowSums r;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      r.top[m][0] = r.top[m][1] = -kInf;
      r.total[m][0] = r.total[m][1] = 0.0f;
    }
    return r;
  }
};

// One step: logits s become weights 2^(s - top), the sums follow, and kept is what outputs under
// the old maximum are worth under the new one. A row that has seen only -inf keeps top = -inf and
// gets zeros; a NaN that the maximum drops stays in the sum and the weights.
template <int kM, int kN>
AF_DEVICE void softmax_step(Accumulators<kM, kN>& s, RowSums<kM>& sums,
                            float (&kept)[kM][2] AF_SITE) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = sums.top[m][h];
#pragma unroll
      for (int n = 0; n < kN; ++n)
        top = ptx::max(top, ptx::max(s[m][n][2 * h], s[m][n][2 * h + 1]));
      top = quad_max(top AF_PASS_SITE);
      const float base = top == -kInf ? 0.0f : top;
      kept[m][h] = ptx::exp2_approx(sums.top[m][h] - base);
      sums.top[m][h] = top;
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          s[m][n][i] = ptx::exp2_approx(s[m][n][i] - base);
          total += s[m][n][i];
        }
      }
      sums.total[m][h] = ptx::fma(sums.total[m][h], kept[m][h], total);
    }
  }
}

template <int kM, int kD>
AF_DEVICE void rescale(Accumulators<kM, kD>& out, const float (&kept)[kM][2]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int d = 0; d < kD; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[m][d][i] *= kept[m][i / 2];
    }
  }
}

// A step and its rescaling.
template <int kM, int kN, int kD>
AF_DEVICE void online_softmax(Accumulators<kM, kN>& s, RowSums<kM>& sums,
                              Accumulators<kM, kD>& out AF_SITE) {
  float kept[kM][2];
  softmax_step<kM, kN>(s, sums, kept AF_PASS_SITE);
  rescale<kM, kD>(out, kept);
}

// The end of a row: what multiplies its accumulated output, and its natural LSE. The sink is a
// virtual key of value 0 with a logit in natural units, -inf for none.
struct RowEnd {
  float scale, lse;
};

AF_DEVICE RowEnd finish_row(float top, float total, float sink) {
  float kept = 1.0f;
  if (sink == kInf) return {0.0f, total == total ? kInf : total};
  if (sink != -kInf) {
    const float sink2 = sink * kLog2E, together = ptx::max(top, sink2);
    kept = ptx::exp2_approx(top - together);
    total = ptx::fma(total, kept, ptx::exp2_approx(sink2 - together));
    top = together;
  }
  return {total == 0.0f ? 0.0f : kept / total, (top + ptx::log2_approx(total)) * kLn2};
}

}  // namespace attnforge::cuda
