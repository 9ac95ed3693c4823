// The largest probability (or logit) of every block of q_block rows and k_block keys.
//
// The maximum is taken over X = log2 P and exponentiated at the end. A chunk has whole row blocks,
// so every output has one owner; about kStripe rows, that short blocks still fill tiles. A block
// without a visible pair is 0 as a probability and -inf as a logit; a NaN in a block is its
// maximum.
#include "cpu/reductions/walk.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kStripe = 4 * kTileRows;

constexpr auto max_or_nan = [](auto top, auto x) __attribute__((always_inline)) {
  return (x > top) | (x != x) ? x : top;
};

// The maximum over columns [lo, hi) of rows [first, end) of a tile.
AF_INLINE float max_scores(const Tile& t, int64_t first, int64_t end, int64_t lo, int64_t hi) {
  VecF top = splat(-kInf);
  float rest = -kInf;
  for (int64_t r = first; r < end; ++r) {
    const float* s = t.s + r * kLds;
    int64_t c = lo;
    for (; c + kLanes <= hi; c += kLanes) top = max_or_nan(top, load(s + c));
    for (; c < hi; ++c) rest = max_or_nan(rest, s[c]);
  }
  return max_or_nan(rest, reduce(top, max_or_nan));
}

struct BlockMax {
  static constexpr Score kScore = Score::kLogProbability;
  const BlockMaxParams& params;
  int64_t q_blocks, k_blocks;

  // The outputs of the row block that query i belongs to.
  AF_INLINE_MEMBER float* out(const Tile& t, int64_t i) const {
    const int64_t head = t.task.seq.batch * t.problem().heads_q + t.task.head;
    return params.out + (head * q_blocks + i / params.q_block) * k_blocks;
  }

  AF_INLINE_MEMBER void begin(const Tile& t) {
    for (int64_t i = t.first; i < t.first + t.rows; ++i) {
      if (i % params.q_block == 0) fill(out(t, i), 0, k_blocks, -kInf);
    }
  }

  // Hidden pairs are -inf: whole rectangles are searched.
  AF_INLINE_MEMBER void block(const Tile& t, const Block& b) {
    const int64_t keys = min64(b.hi, t.task.seq.k_len - b.key0);
    for (int64_t r = 0, end; r < t.rows; r = end) {
      end = min64(t.rows, ((t.first + r) / params.q_block + 1) * params.q_block - t.first);
      float* tops = out(t, t.first + r);
      for (int64_t lo = b.lo, hi; lo < keys; lo = hi) {
        const int64_t k_block = (b.key0 + lo) / params.k_block;
        hi = min64(keys, (k_block + 1) * params.k_block - b.key0);
        tops[k_block] = max_or_nan(tops[k_block], max_scores(t, r, end, lo, hi));
      }
    }
  }

  AF_INLINE_MEMBER void end(const Tile& t) {
    for (int64_t i = t.first; i < t.first + t.rows; ++i) {
      if ((i + 1) % params.q_block != 0 && i + 1 != t.problem().seqlen_q) continue;
      float* tops = out(t, i);
      for (int64_t j = 0; j < k_blocks; ++j) {
        const float x = tops[j];
        tops[j] = params.scores.lse.data ? exp2(splat(x > 128.0f ? 128.0f : x))[0] : x * kLn2;
      }
    }
  }
};

AF_INLINE WalkPlan make_plan(const BlockMaxParams& params, int64_t threads) {
  const int64_t stripe = round_up(kStripe, params.q_block);
  return plan_walk(params.scores, stripe, 0, threads);
}

}  // namespace

int64_t block_max_workspace(const BlockMaxParams& params, int64_t num_threads) {
  return make_plan(params, num_threads).bytes;
}

void block_max(const BlockMaxParams& params, const Workers& workers) {
  const FlashProblem& p = params.scores.problem;
  const WalkPlan plan = make_plan(params, workers.num_threads);
  dispatch_dtype(p.dtype, [&](auto element) {
    walk<decltype(element)>(params.scores, plan, workers, [&](const Task&) {
      return BlockMax{params, ceil_div(p.seqlen_q, params.q_block),
                      ceil_div(p.seqlen_k, params.k_block)};
    });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
