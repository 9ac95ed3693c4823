// <dO, O> of every row and its sum over the rows of a head: the importance of a head is the
// derivative of the loss by a factor on its output.
//
// Rows in parallel, each one chain of vector sums in fp32; the sum of a head has one owner and is
// taken in double. Bytes: dO and O once, so it runs at memory speed.
#include "cpu/flash/problem.h"
#include "cpu/kernels.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kRowsPerTask = 64;  // some tens of microseconds

template <class T>
AF_INLINE float dot_row(const T* a, const T* b, int64_t dim) {
  VecF sum{};
  for (int64_t d = 0; d < dim; d += kLanes) {
    sum = fma(load_partial(a + d, dim - d), load_partial(b + d, dim - d), sum);
  }
  return reduce_add(sum);
}

}  // namespace

void head_gradient(const HeadGradientParams& params, const Workers& workers) {
  const int64_t heads = params.batch * params.heads, rows = heads * params.seqlen;
  dispatch_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_tasks(workers, ceil_div(rows, kRowsPerTask), [&](int64_t task, int64_t) {
      for (int64_t i = task * kRowsPerTask; i < min64(rows, (task + 1) * kRowsPerTask); ++i) {
        const int64_t row = i % params.seqlen, head = i / params.seqlen % params.heads;
        const int64_t batch = i / params.seqlen / params.heads;
        params.rows[i] = dot_row(row_ptr<const T>(params.dout, batch, row, head),
                                 row_ptr<const T>(params.out, batch, row, head), params.dim);
      }
    });
  });
  parallel_tasks(workers, heads, [&](int64_t head, int64_t) {
    double sum = 0.0;
    for (int64_t i = 0; i < params.seqlen; ++i) sum += params.rows[head * params.seqlen + i];
    params.sums[head] = static_cast<float>(sum);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
