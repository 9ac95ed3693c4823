// Branches mixed by gates: out = sum_n g_n x_n, row by row, sums in fp32.
//
//   bytes    every branch, the gates and the output once
//
// A row is one head of one token; rows follow each other in memory, gates [rows, branches] too.
#include "cpu/flash/problem.h"
#include "cpu/kernels.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kTaskElements = 1 << 16;

template <class T>
AF_INLINE void mix_row(const CombineParams& p, int64_t row, const float* gates) {
  const int64_t at = row * p.dim;
  for (int64_t d = 0; d < p.dim; d += kLanes) {
    const int64_t n = p.dim - d;
    VecF sum{};
    for (int64_t i = 0; i < p.branches; ++i) {
      const T* x = static_cast<const T*>(p.x[i]) + at + d;
      sum = fma(splat(gates[i]), load_partial(x, n), sum);
    }
    store_partial(static_cast<T*>(p.out) + at + d, sum, n);
  }
}

template <class T>
AF_INLINE void run(const CombineParams& p, const Workers& workers) {
  const int64_t step = max64(1, kTaskElements / max64(1, p.dim));
  parallel_tasks(workers, ceil_div(p.rows, step), [&](int64_t task, int64_t) {
    for (int64_t row = task * step; row < min64(p.rows, (task + 1) * step); ++row) {
      mix_row<T>(p, row, p.gates + row * p.branches);
    }
  });
}

}  // namespace

void combine(const CombineParams& params, const Workers& workers) {
  dispatch_dtype(params.dtype, [&](auto element) { run<decltype(element)>(params, workers); });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
