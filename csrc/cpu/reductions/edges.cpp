// Edges of the attention graph: all (batch, head, query, key) with P > threshold, in that order.
//
// Two passes over the same tiles with the same bits: the first counts per row, a prefix sum turns
// counts into places, the second writes. A row has one owner and a place known beforehand, so the
// list depends on neither threads nor timing. Edges past max_edges are counted and not written; the
// second pass leaves out rows without an edge that has room. Memory: 8 bytes per row.
#include "cpu/reductions/walk.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

// Calls f(c, bits) for the vectors of row r that have edges: bit i stands for column c + i.
template <class F>
AF_INLINE void for_each_edge(const Tile& t, const Block& b, int64_t r, float threshold,
                             const F& f) {
  const Interval seen = t.columns(r, b.key0);
  const float* s = t.s + r * kLds;
  const VecF bar = splat(threshold);
  for (int64_t c = seen.lo / kLanes * kLanes; c < seen.hi; c += kLanes) {
    const uint32_t bits = lane_bits(load(s + c) > bar) & column_bits(c, seen);
    if (bits) f(c, bits);
  }
}

struct CountEdges {
  static constexpr Score kScore = Score::kProbability;
  const EdgesParams& params;
  int64_t* counts;  // [batch, heads_q, seqlen_q]

  AF_INLINE_MEMBER void begin(const Tile& t) {
    for (int64_t r = 0; r < t.rows; ++r) counts[t.row(r)] = 0;
  }
  AF_INLINE_MEMBER void block(const Tile& t, const Block& b) {
    for (int64_t r = 0; r < t.rows; ++r) {
      int64_t found = 0;
      for_each_edge(t, b, r, params.threshold,
                    [&](int64_t, uint32_t bits) { found += __builtin_popcount(bits); });
      counts[t.row(r)] += found;
    }
  }
  AF_INLINE_MEMBER void end(const Tile&) {}
};

struct WriteEdges {
  static constexpr Score kScore = Score::kProbability;
  const EdgesParams& params;
  const int64_t* places;  // [rows + 1]: where the edges of each row begin
  int64_t next[kTileRows];

  AF_INLINE_MEMBER void begin(const Tile& t) {
    for (int64_t r = 0; r < t.rows; ++r) {
      next[r] = places[t.row(r)];
      const bool none = next[r] == places[t.row(r) + 1];
      if (none || next[r] >= params.max_edges) t.keys[r] = {0, 0};
    }
  }
  AF_INLINE_MEMBER void block(const Tile& t, const Block& b) {
    for (int64_t r = 0; r < t.rows; ++r) {
      for_each_edge(t, b, r, params.threshold, [&](int64_t c, uint32_t bits) {
        for (; bits; bits &= bits - 1) write(t, b, r, c + __builtin_ctz(bits));
      });
    }
  }
  AF_INLINE_MEMBER void write(const Tile& t, const Block& b, int64_t r, int64_t c) {
    const int64_t place = next[r]++;
    if (place >= params.max_edges) return;
    int32_t* index = params.index + 4 * place;
    index[0] = static_cast<int32_t>(t.task.seq.batch);
    index[1] = static_cast<int32_t>(t.task.head);
    index[2] = static_cast<int32_t>(t.first + r);
    index[3] = static_cast<int32_t>(b.key0 + c);
    params.prob[place] = t.s[r * kLds + c];
  }
  AF_INLINE_MEMBER void end(const Tile&) {}
};

AF_INLINE int64_t all_rows(const FlashProblem& p) {
  return p.batch * p.heads_q * p.seqlen_q;
}

}  // namespace

int64_t edges_workspace(const EdgesParams& params, int64_t num_threads) {
  return plan_walk(params.scores, kTileRows, 0, num_threads).bytes +
         8 * (all_rows(params.scores.problem) + 1);
}

void edges(const EdgesParams& params, const Workers& workers) {
  const FlashProblem& p = params.scores.problem;
  const WalkPlan plan = plan_walk(params.scores, kTileRows, 0, workers.num_threads);
  auto* places =
      reinterpret_cast<int64_t*>(static_cast<char*>(params.scores.workspace) + plan.bytes);
  dispatch_dtype(p.dtype, [&](auto element) {
    walk<decltype(element)>(params.scores, plan, workers,
                            [&](const Task&) { return CountEdges{params, places}; });
    int64_t total = 0;
    for (int64_t row = 0; row < all_rows(p); ++row) {
      const int64_t count = places[row];
      places[row] = total;
      total += count;
    }
    places[all_rows(p)] = *params.count = total;
    if (total == 0) return;
    walk<decltype(element)>(params.scores, plan, workers,
                            [&](const Task&) { return WriteEdges{params, places, {}}; });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
