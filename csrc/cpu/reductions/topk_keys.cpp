// The n keys with the largest logits of each row, best first, ties to the smaller key.
//
// Each row keeps its best candidates in its own output, sorted. A vector of scores meets the worst
// of them first, and late in a long row hardly one passes; a score that does is put in its place by
// a count over the list and a move of its tail, both in vectors: for n below a thousand that is
// cheaper than a heap, whose branches nobody can foresee. A NaN ranks above everything, as in
// torch.topk. Order is that of the logits: P rises with them, but two logits may round to one P.
// Values are P = 2^(S - LSE), or the logits without an LSE.
#include "cpu/reductions/walk.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

// The best candidates of a row, best first. Keys come in rising order: of equals the older one
// stays in front.
struct Best {
  float* values;
  int32_t* keys;
  int64_t size, room;

  // Whether x belongs into the full list.
  AF_INLINE_MEMBER bool beats_the_worst(float x) const {
    const float worst = values[room - 1];
    return x > worst || (x != x && worst == worst);
  }
  AF_INLINE_MEMBER int64_t place_of(float x) const {
    const bool nan = x != x;
    int64_t count = 0, i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      const VecF v = load(values + i);
      count += __builtin_popcount(lane_bits(nan ? v != v : ~(v < splat(x))));
    }
    for (; i < size; ++i) count += nan ? values[i] != values[i] : !(values[i] < x);
    return count;
  }
  AF_INLINE_MEMBER void insert(float x, int32_t key) {
    const int64_t at = place_of(x), tail = min64(size, room - 1) - at;
    __builtin_memmove(values + at + 1, values + at, tail * sizeof(float));
    __builtin_memmove(keys + at + 1, keys + at, tail * sizeof(int32_t));
    values[at] = x;
    keys[at] = key;
    size = min64(size + 1, room);
  }
};

struct TopK {
  static constexpr Score kScore = Score::kLogit;
  const TopKParams& params;
  int64_t sizes[kTileRows];

  AF_INLINE_MEMBER Best best(const Tile& t, int64_t r) const {
    const int64_t at = t.row(r) * params.n;
    return {params.values + at, params.indices + at, sizes[r], params.n};
  }

  AF_INLINE_MEMBER void begin(const Tile& t) {
    for (int64_t r = 0; r < t.rows; ++r) sizes[r] = 0;
  }

  AF_INLINE_MEMBER void block(const Tile& t, const Block& b) {
    for (int64_t r = 0; r < t.rows; ++r) {
      const Interval seen = t.columns(r, b.key0);
      const float* s = t.s + r * kLds;
      Best top = best(t, r);
      for (int64_t c = seen.lo / kLanes * kLanes; c < seen.hi; c += kLanes) {
        uint32_t bits = column_bits(c, seen);
        if (top.size == top.room)
          bits &= lane_bits(~(load(s + c) <= splat(top.values[top.room - 1])));
        for (; bits; bits &= bits - 1) {
          const int64_t i = c + __builtin_ctz(bits);
          if (top.size < top.room || top.beats_the_worst(s[i])) {
            top.insert(s[i], static_cast<int32_t>(b.key0 + i));
          }
        }
      }
      sizes[r] = top.size;
    }
  }

  AF_INLINE_MEMBER void end(const Tile& t) {
    const bool probabilities = params.scores.lse.data != nullptr;
    for (int64_t r = 0; r < t.rows; ++r) {
      const Best top = best(t, r);
      for (int64_t n = 0; n < top.size; ++n) {
        float x = top.values[n] - t.lse2[r];
        x = x > 128.0f ? 128.0f : x;
        top.values[n] = probabilities ? exp2(splat(x))[0] : top.values[n] * kLn2;
      }
      fill(top.values, top.size, params.n, probabilities ? 0.0f : -kInf);
      for (int64_t n = top.size; n < params.n; ++n) top.keys[n] = -1;
    }
  }
};

}  // namespace

int64_t topk_keys_workspace(const TopKParams& params, int64_t num_threads) {
  return plan_walk(params.scores, kTileRows, 0, num_threads).bytes;
}

void topk_keys(const TopKParams& params, const Workers& workers) {
  const WalkPlan plan = plan_walk(params.scores, kTileRows, 0, workers.num_threads);
  dispatch_dtype(params.scores.problem.dtype, [&](auto element) {
    walk<decltype(element)>(params.scores, plan, workers,
                            [&](const Task&) { return TopK{params, {}}; });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
