// Entropy of each row of attention in nats: H_i = -sum_j P_ij ln P_ij, with 0 ln 0 = 0.
//
// From X = log2 P, which is at hand before P is: no logarithm is taken.
#include "cpu/reductions/walk.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

struct RowEntropy {
  static constexpr Score kScore = Score::kLogProbability;
  const RowEntropyParams& params;
  float sum[kTileRows];  // of P X

  AF_INLINE_MEMBER void begin(const Tile& t) { fill(sum, 0, t.rows, 0.0f); }

  AF_INLINE_MEMBER void block(const Tile& t, const Block& b) {
    for (int64_t r = 0; r < t.rows; ++r) {
      if (t.keys[r].lo == t.keys[r].hi) continue;
      VecF part{};
      for (int64_t c = b.lo; c < b.hi; c += kLanes) {
        const VecF x = load(t.s + r * kLds + c);
        const VecF prob = exp2(x > splat(128.0f) ? splat(128.0f) : x);
        part += prob == splat(0.0f) ? VecF{} : prob * x;
      }
      sum[r] += reduce_add(part);
    }
  }

  AF_INLINE_MEMBER void end(const Tile& t) {
    for (int64_t r = 0; r < t.rows; ++r) params.out[t.row(r)] = 0.0f - kLn2 * sum[r];
  }
};

}  // namespace

int64_t row_entropy_workspace(const RowEntropyParams& params, int64_t num_threads) {
  return plan_walk(params.scores, kTileRows, 0, num_threads).bytes;
}

void row_entropy(const RowEntropyParams& params, const Workers& workers) {
  const WalkPlan plan = plan_walk(params.scores, kTileRows, 0, workers.num_threads);
  dispatch_dtype(params.scores.problem.dtype, [&](auto element) {
    walk<decltype(element)>(params.scores, plan, workers,
                            [&](const Task&) { return RowEntropy{params, {}}; });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
