// Column sums of attention: out[j] = sum_i w_i P_ij per head, the accumulated mass of each key.
//
// The rows of a head are dealt to a fixed number of chunks, each with a slab [Sk] of its own; slabs
// are added in their order at the end. A tile sums its rows in registers before they meet the slab:
// the error grows with rows per tile plus tiles, not with rows. Memory: chunks * Hq * Sk floats,
// where chunks * Hq is about max(16, Hq). A row of weight 0 is left out, whatever it holds.
#include "cpu/reductions/walk.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

struct ColumnSums {
  static constexpr Score kScore = Score::kProbability;
  const RowStatRef& weights;
  float* slab;  // [seqlen_k]
  float weight[kTileRows];

  AF_INLINE_MEMBER void begin(const Tile& t) {
    for (int64_t r = 0; r < t.rows; ++r) {
      weight[r] = 1.0f;
      if (weights.data) weight[r] = *stat_ptr(weights, t.task.seq, t.task.head, t.first + r);
      if (weight[r] == 0.0f) t.keys[r] = {0, 0};
    }
  }

  AF_INLINE_MEMBER void block(const Tile& t, const Block& b) {
    const int64_t end = min64(b.hi, t.task.seq.k_len - b.key0);
    for (int64_t c = b.lo; c < b.hi; c += kLanes) {
      VecF sum{};
      for (int64_t r = 0; r < t.rows; ++r) {
        if (t.keys[r].lo == t.keys[r].hi) continue;
        sum = fma(splat(weight[r]), load(t.s + r * kLds + c), sum);
      }
      if (c + kLanes <= end) {
        store(slab + b.key0 + c, load(slab + b.key0 + c) + sum);
      } else {
        float lanes[kLanes];
        store(lanes, sum);
        for (int64_t i = 0; c + i < end; ++i) slab[b.key0 + c + i] += lanes[i];
      }
    }
  }

  AF_INLINE_MEMBER void end(const Tile&) {}
};

AF_INLINE WalkPlan make_plan(const ColumnSumsParams& params, int64_t threads) {
  return plan_walk(params.scores, kTileRows, sum_chunks(params.scores.problem), threads);
}

}  // namespace

int64_t column_sums_workspace(const ColumnSumsParams& params, int64_t num_threads) {
  const FlashProblem& p = params.scores.problem;
  const WalkPlan plan = make_plan(params, num_threads);
  return plan.bytes + p.batch * p.heads_q * plan.chunks * p.seqlen_k * 4;
}

void column_sums(const ColumnSumsParams& params, const Workers& workers) {
  const FlashProblem& p = params.scores.problem;
  const WalkPlan plan = make_plan(params, workers.num_threads);
  float* slabs = reinterpret_cast<float*>(static_cast<char*>(params.scores.workspace) + plan.bytes);
  dispatch_dtype(p.dtype, [&](auto element) {
    walk<decltype(element)>(params.scores, plan, workers, [&](const Task& task) {
      const int64_t head = task.seq.batch * p.heads_q + task.head;
      float* slab = slabs + (head * plan.chunks + task.chunk) * p.seqlen_k;
      fill(slab, 0, p.seqlen_k, 0.0f);
      return ColumnSums{params.row_weights, slab, {}};
    });
  });
  parallel_tasks(workers, p.batch * p.heads_q, [&](int64_t head, int64_t) {
    const float* slab = slabs + head * plan.chunks * p.seqlen_k;
    float* out = params.out + head * p.seqlen_k;
    for (int64_t j = 0; j < p.seqlen_k; ++j) {
      float sum = 0.0f;
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) sum += slab[chunk * p.seqlen_k + j];
      out[j] = sum;
    }
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
