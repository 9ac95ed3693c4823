// Merging of partial attention states: outs [n, B, S, H, D] with lses [n, B, H, S] of the same
// queries over disjoint keys become one state.
//
//   LSE = log sum exp LSE_n      O = sum exp(LSE_n - LSE) O_n
//
// A part whose LSE is -inf saw no key, one whose LSE is +inf is treated as such: neither is read.
// No part at all: O = 0, LSE = -inf. NaN propagates. One pass; bytes: (n + 1) rows of D, so it runs
// at memory speed; fp32 arithmetic for every dtype, weights from one maximum.
#include "cpu/flash/problem.h"
#include "cpu/kernels.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/parallel.h"
#include "cpu/micro/softmax.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

AF_INLINE bool empty_state(float lse) {
  return lse == -kInf || lse == kInf;
}

// Parts are merged from the first to the last, so that the order of the caller is the order of
// sums.
template <class T>
AF_INLINE void merge_row(const MergeParams& p, int64_t batch, int64_t row, int64_t head) {
  const int64_t stat_step = p.batch * p.heads * p.seqlen;
  const int64_t out_step = p.batch * p.seqlen * p.heads * p.dim;
  const float* lses = p.lses + (batch * p.heads + head) * p.seqlen + row;
  const int64_t offset = ((batch * p.seqlen + row) * p.heads + head) * p.dim;
  const T* outs = static_cast<const T*>(p.outs) + offset;
  T* out = static_cast<T*>(p.out) + offset;

  float top = -kInf;
  for (int64_t n = 0; n < p.states; ++n) {
    float lse = lses[n * stat_step];
    if (!empty_state(lse) && !(lse <= top)) top = lse;  // a NaN takes over
  }
  double sum = 0.0;
  for (int64_t n = 0; n < p.states; ++n) {
    float lse = lses[n * stat_step];
    if (!empty_state(lse)) sum += __builtin_exp(static_cast<double>(lse) - top);
  }
  const bool nothing = sum == 0.0;
  const float lse = nothing ? -kInf : static_cast<float>(top + __builtin_log(sum));
  p.lse[(batch * p.heads + head) * p.seqlen + row] = lse;
  for (int64_t d = 0; d < p.dim; d += kLanes) {
    VecF acc{};
    for (int64_t n = 0; n < p.states; ++n) {
      float part = lses[n * stat_step];
      if (empty_state(part)) continue;
      float weight = static_cast<float>(__builtin_exp(static_cast<double>(part) - top) / sum);
      acc = fma(splat(weight), load_partial(outs + n * out_step + d, p.dim - d), acc);
    }
    store_partial(out + d, acc, p.dim - d);
  }
}

constexpr int64_t kRowsPerTask = 64;  // some tens of microseconds

}  // namespace

void merge_states(const MergeParams& params, const Workers& workers) {
  const int64_t rows = params.batch * params.seqlen * params.heads;
  dispatch_dtype(params.dtype, [&](auto element) {
    parallel_tasks(workers, ceil_div(rows, kRowsPerTask), [&](int64_t task, int64_t) {
      for (int64_t i = task * kRowsPerTask; i < min64(rows, (task + 1) * kRowsPerTask); ++i) {
        merge_row<decltype(element)>(params, i / params.heads / params.seqlen,
                                     i / params.heads % params.seqlen, i % params.heads);
      }
    });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
