// Probability mass of each row on spans of keys: out[i, t] = sum over keys j of span t of P_ij.
//
// Spans are cut by rising boundaries; keys outside all of them count nowhere. A row has one owner,
// which adds block sums in the order of the keys.
#include "cpu/reductions/spans.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

struct SpanMass {
  static constexpr Score kScore = Score::kProbability;
  const SpanMassParams& params;

  AF_INLINE_MEMBER void begin(const Tile& t) {
    fill(params.out + t.row(0) * params.spans, 0, t.rows * params.spans, 0.0f);
  }

  AF_INLINE_MEMBER void block(const Tile& t, const Block& b) {
    for (int64_t r = 0; r < t.rows; ++r) {
      const Interval seen = t.columns(r, b.key0);
      if (seen.lo == seen.hi) continue;
      const float* s = t.s + r * kLds;
      float* out = params.out + t.row(r) * params.spans;
      for_each_span(
          params.boundaries, params.spans, b.key0, seen,
          [&](int64_t span, int64_t lo, int64_t hi) { out[span] += sum_columns(s, lo, hi); });
    }
  }

  AF_INLINE_MEMBER void end(const Tile&) {}
};

}  // namespace

int64_t span_mass_workspace(const SpanMassParams& params, int64_t num_threads) {
  return plan_walk(params.scores, kTileRows, 0, num_threads).bytes;
}

void span_mass(const SpanMassParams& params, const Workers& workers) {
  const WalkPlan plan = plan_walk(params.scores, kTileRows, 0, workers.num_threads);
  dispatch_dtype(params.scores.problem.dtype, [&](auto element) {
    walk<decltype(element)>(params.scores, plan, workers,
                            [&](const Task&) { return SpanMass{params}; });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
