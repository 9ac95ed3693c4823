// Where a finished row goes: forward and decode.
#pragma once

#include "cpu/flash/problem.h"
#include "cpu/micro/softmax.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// Row i of a head, accumulated in o [v_head_dim rounded up to a vector], times scale.
[[gnu::noinline, maybe_unused]] static void store_row(const FlashFwdParams& params,
                                                      const Sequence& seq, int64_t head, int64_t i,
                                                      const float* o, float scale) {
  const FlashProblem& p = params.problem;
  dispatch_dtype(p.out_dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t row = seq.q_row + i;
    T* lo = params.out_lo.data ? row_ptr<T>(params.out_lo, seq.batch, row, head) : nullptr;
    store_output(o, scale, p.v_head_dim, row_ptr<T>(params.out, seq.batch, row, head), lo);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
