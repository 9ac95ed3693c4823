// s - log sum_j counts_j exp(s_j) of finished rows of scores, in place: the log share of a key of
// each cluster (Squeezed Attention; Hooper et al., 2024). A block has a row and passes over it
// three times, from L2. Columns without a key are -inf; a NaN goes on to all.
#include "attnforge/retrieval.h"
#include "cuda/launch.h"
#include "cuda/retrieval/launch.h"
#include "cuda/tile/element.h"
#include "cuda/tile/scan.h"

namespace attnforge::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// group: rows of a KV head, which stand one behind the other.
__global__ void __launch_bounds__(kThreads)
    shares_kernel(float* scores, const int32_t* counts, int64_t columns, int64_t group) {
  const int64_t row = blockIdx.x;
  const Block block = {kWarps, ptx::dynamic_shared_memory()};
  scores += row * columns;
  counts += row / group * columns;
  const auto score = [&](int64_t c) { return counts[c] > 0 ? scores[c] : -kInf; };
  float top = -kInf, total = 0.0f;
  for (int64_t c = threadIdx.x; c < columns; c += kThreads) top = ptx::max(top, score(c));
  top = block.over(top, [](float a, float b) { return ptx::max(a, b); });
  const float base = top == -kInf ? 0.0f : top;
  for (int64_t c = threadIdx.x; c < columns; c += kThreads) {
    if (counts[c] <= 0) continue;
    const float weight = ptx::exp2_approx((scores[c] - base) * kLog2E);
    total = ptx::fma(static_cast<float>(counts[c]), weight, total);
  }
  total = block.over(total, [](float a, float b) { return a + b; });
  const float shift = total == 0.0f ? 0.0f : base + ptx::log2_approx(total) * kLn2;
  for (int64_t c = threadIdx.x; c < columns; c += kThreads) scores[c] = score(c) - shift;
}

}  // namespace

int shares(const KeyScoresParams& params, void* stream) {
  const FlashProblem& p = params.problem;
  const int64_t rows = p.batch * p.heads_q * p.seqlen_q;
  if (rows == 0) return 0;
  return ATTNFORGE_LAUNCH((shares_kernel), dim3(static_cast<unsigned>(rows)), dim3(kThreads),
                          8 * kWarps, stream, params.out, params.counts, params.columns,
                          p.heads_q / p.heads_k * p.seqlen_q);
}

}  // namespace attnforge::cuda
