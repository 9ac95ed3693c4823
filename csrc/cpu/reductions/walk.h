// The tile walker of the reductions: scores of one tile of query rows after the other, shown to a
// reducer and forgotten. No buffer grows with Sq * Sk.
//
// K of a (batch, kv head) is widened and packed once, shared by the query rows of all heads of the
// group. A task is one chunk of the rows of one query head; it goes through its rows in tiles and
// through the keys of a tile in blocks:
//
//   S = Q K^T, softcap, ALiBi (base 2)      logit
//   X = S - LSE                             log2 of the probability
//   P = 2^X                                 probability
//
//   tile     48 rows x 256 keys, as in flash/fwd.cpp and for its reasons
//   flops    2 D per visible (query, key) pair, and what the reducer does
//   bytes    Q once; K once, then its packed fp32 copy once per tile, from cache
//   order    (batch, kv head) in waves whose packed copies stay inside kWaveBytes; a chunk's rows
//            and its share of every sum are the same for any number of threads and any batch
//
// A reducer is made for each task and may have state of its own. It has `kScore`, which of the
// three it wants, and
//
//   begin(tile)        rows are known; may empty tile.keys[r] of rows that do not count
//   block(tile, b)     scores of columns [b.lo, b.hi) of every row, whole panels. A pair that is
//                      hidden holds kHidden (0 as a probability, else -inf)
//   end(tile)
#pragma once

#include "cpu/flash/problem.h"
#include "cpu/kernels.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/parallel.h"
#include "cpu/micro/softmax.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int64_t kTileRows = 48;
constexpr int64_t kTileKeys = 256;
constexpr int64_t kLds = kTileKeys + 16;  // off the power of two: rows do not share L1 sets
constexpr int64_t kWaveBytes = 8 << 20;
constexpr int64_t kSumChunks = 16;  // of sums over rows: work for many threads where heads are few

enum class Score { kLogit, kLogProbability, kProbability };

template <Score kScore>
constexpr float kHidden = kScore == Score::kProbability ? 0.0f : -kInf;

struct WalkPlan {
  int64_t stripe;  // rows that stay in one chunk
  int64_t chunks;  // per query head; chunk c has stripes c, c + chunks, ...
  int64_t group, blocks, slots;
  int64_t k_floats;  // packed floats of a key block
  bool slopes;       // tiles keep the derivative of the softcap
  int64_t tile_bytes, bytes;
};

struct Task {
  const ScoreParams& params;
  Sequence seq;
  int64_t kv_head, head, chunk, worker;
};

// Queries [first, first + rows) of one head.
struct Tile {
  const Task& task;
  int64_t first, rows;
  float* q;        // row groups, scaled
  float* s;        // [kTileRows][kLds]
  float* slope;    // [kTileRows][kLds], or null: d capped / d raw of each score
  float* lse2;     // [kTileRows], base 2; 0 without an LSE
  Interval* keys;  // [kTileRows]: what each row sees

  AF_INLINE_MEMBER const FlashProblem& problem() const { return task.params.problem; }
  // Columns of the block at key0 that row r sees.
  AF_INLINE_MEMBER Interval columns(int64_t r, int64_t key0) const {
    int64_t lo = max64(0, min64(kTileKeys, keys[r].lo - key0));
    return {lo, max64(lo, min64(kTileKeys, keys[r].hi - key0))};
  }
  // Row r's place in a contiguous [batch, heads_q, seqlen_q].
  AF_INLINE_MEMBER int64_t row(int64_t r) const {
    const FlashProblem& p = problem();
    return (task.seq.batch * p.heads_q + task.head) * p.seqlen_q + first + r;
  }
};

struct Block {
  int64_t key0;
  int64_t lo, hi;       // columns
  const float* panels;  // packed keys
};

AF_INLINE Tile take_tile(Arena& a, const Task& task, const WalkPlan& plan) {
  Tile tile{task, 0, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  tile.q = a.take<float>(kTileRows * task.params.problem.head_dim);
  tile.s = a.take<float>(kTileRows * kLds);
  if (plan.slopes) tile.slope = a.take<float>(kTileRows * kLds);
  tile.lse2 = a.take<float>(kTileRows);
  tile.keys = a.take<Interval>(kTileRows);
  return tile;
}

// chunks: how many are wanted; 0 is one per stripe.
AF_INLINE WalkPlan plan_walk(const ScoreParams& params, int64_t stripe, int64_t chunks,
                             int64_t threads, bool slopes = false) {
  const FlashProblem& p = params.problem;
  WalkPlan plan;
  plan.stripe = stripe;
  const int64_t stripes = max64(1, ceil_div(p.seqlen_q, stripe));
  plan.chunks = chunks == 0 ? stripes : min64(chunks, stripes);
  plan.group = group_size(p);
  plan.blocks = max64(1, ceil_div(p.seqlen_k, kTileKeys));
  plan.k_floats = kTileKeys * p.head_dim;
  plan.slopes = slopes;
  Arena tile{nullptr};
  take_tile(tile, Task{params, {}, 0, 0, 0, 0}, plan);
  plan.tile_bytes = tile.used;
  const int64_t pairs = p.batch * p.heads_k;
  const int64_t enough = ceil_div(4 * threads, plan.group * plan.chunks);
  const int64_t in_cache = kWaveBytes / (plan.blocks * plan.k_floats * 4);
  plan.slots = max64(1, min64(pairs, max64(enough, in_cache)));
  plan.bytes = threads * plan.tile_bytes + plan.slots * plan.blocks * plan.k_floats * 4;
  return plan;
}

// Chunks of a sum over rows: their number must not depend on the threads or on the batch.
AF_INLINE int64_t sum_chunks(const FlashProblem& p) {
  return max64(1, ceil_div(kSumChunks, p.heads_q));
}

// Bit i is set where column c + i is in `seen`.
AF_INLINE uint32_t column_bits(int64_t c, Interval seen) {
  const int64_t lo = max64(0, seen.lo - c), hi = min64(kLanes, seen.hi - c);
  return lo < hi ? ((1u << (hi - lo)) - 1u) << lo : 0u;
}

template <class T>
AF_INLINE void pack_keys(const ScoreParams& params, const Sequence& seq, int64_t kv_head,
                         int64_t key0, float* panels) {
  const int64_t n = min64(kTileKeys, seq.k_len - key0);
  const T* k = row_ptr<const T>(params.k, seq.batch, key0, kv_head);
  for (int64_t c = 0; c < n; c += kNR) {
    pack_key_panel(k + c * params.k.seq_stride, params.k.seq_stride, n - c, params.problem.head_dim,
                   panels + c * params.problem.head_dim);
  }
}

template <class T>
AF_INLINE void load_rows(const Tile& t, const ScoreMap& map) {
  const ScoreParams& params = t.task.params;
  const Sequence& seq = t.task.seq;
  const int64_t dim = params.problem.head_dim;
  for (int64_t r = 0; r < t.rows; ++r) {
    pack_row(row_ptr<const T>(params.q, seq.batch, t.first + r, t.task.head), dim, map.q_scale, r,
             t.q);
    t.keys[r] = visible_keys(params.problem, seq, t.task.head, t.first + r);
    t.lse2[r] = 0.0f;
    if (params.lse.data) {
      float lse = *stat_ptr(params.lse, seq, t.task.head, t.first + r);
      if (lse == -kInf) t.keys[r] = {0, 0};  // nothing to attend to: no probabilities
      t.lse2[r] = lse * kLog2E;
    }
  }
  zero_rows(t.rows, round_up(t.rows, kMR), dim, t.q);
}

// Raw products of row r, columns [lo, hi), to the score that is wanted.
template <Score kScore>
AF_INLINE void map_row(const Tile& t, const ScoreMap& map, int64_t r, int64_t key0, int64_t lo,
                       int64_t hi) {
  const FlashProblem& p = t.problem();
  float* s = t.s + r * kLds + lo;
  const int64_t n = hi - lo;
  if (map.cap2 > 0.0f) {
    apply_softcap(s, n, map.cap2);
    for (int64_t c = 0; t.slope && c < n; c += kLanes) {
      VecF tanh_x = load(s + c) * splat(1.0f / map.cap2);
      store(t.slope + r * kLds + lo + c, splat(1.0f) - tanh_x * tanh_x);
    }
  }
  if (p.alibi_slopes) {
    add_alibi(s, n, alibi_slope2(p, t.task.seq.batch, t.task.head),
              t.first + r + t.task.seq.offset - (key0 + lo));
  }
  if constexpr (kScore == Score::kLogit) return;
  const VecF lse2 = splat(t.lse2[r]);
  for (int64_t c = 0; c < n; c += kLanes) {
    VecF x = load(s + c) - lse2;
    if constexpr (kScore == Score::kProbability) {
      // An LSE of fewer keys gives P above 1, up to infinity at 2^128.
      x = exp2(x > splat(128.0f) ? splat(128.0f) : x);
    }
    store(s + c, x);
  }
}

// Scores of the block at key0. full: every row sees all of it.
template <Score kScore>
AF_INLINE Block score_block(const Tile& t, const ScoreMap& map, const float* panels, int64_t key0,
                            bool full) {
  const int64_t dim = t.problem().head_dim;
  if (full) {
    gemm<1, kMR>(t.rows, vectors_of(kTileKeys), dim, t.q, dim, panels, dim * kNR, t.s, kLds, false);
    for (int64_t r = 0; r < t.rows; ++r) map_row<kScore>(t, map, r, key0, 0, kTileKeys);
    return {key0, 0, kTileKeys, panels};
  }
  Interval seen[kTileRows / kMR];  // columns that some row of a kMR group sees, whole panels
  Block block = {key0, kTileKeys, 0, panels};
  for (int64_t r0 = 0; r0 < t.rows; r0 += kMR) {
    int64_t lo = kTileKeys, hi = 0;
    for (int64_t r = r0; r < min64(r0 + kMR, t.rows); ++r) {
      const Interval own = t.columns(r, key0);
      if (own.lo == own.hi) continue;
      lo = min64(lo, own.lo);
      hi = max64(hi, own.hi);
    }
    Interval& group = seen[r0 / kMR];
    group = lo < hi ? Interval{lo / kNR * kNR, round_up(hi, kNR)} : Interval{0, 0};
    if (group.lo == group.hi) continue;
    gemm<1, kMR>(min64(kMR, t.rows - r0), vectors_of(group.hi - group.lo), dim, t.q + r0 * dim, dim,
                 panels + group.lo * dim, dim * kNR, t.s + r0 * kLds + group.lo, kLds, false);
    block.lo = min64(block.lo, group.lo);
    block.hi = max64(block.hi, group.hi);
  }
  for (int64_t r = 0; r < t.rows && block.lo < block.hi; ++r) {
    const Interval group = seen[r / kMR], own = t.columns(r, key0);
    map_row<kScore>(t, map, r, key0, group.lo, group.hi);
    // A row that sees nothing here hides all columns: 0 to 0 are seen.
    const int64_t lo = own.lo < own.hi ? own.lo - block.lo : 0;
    const int64_t hi = own.lo < own.hi ? own.hi - block.lo : 0;
    mask_row(t.s + r * kLds + block.lo, block.hi - block.lo, lo, hi, kHidden<kScore>);
  }
  return block;
}

template <class T, class Reducer>
AF_INLINE void walk_tile(const Tile& t, const ScoreMap& map, const float* packed,
                         const WalkPlan& plan, Reducer& reducer) {
  load_rows<T>(t, map);
  reducer.begin(t);
  int64_t any_lo = t.task.seq.k_len, any_hi = 0, all_lo = 0, all_hi = t.task.seq.k_len;
  for (int64_t r = 0; r < t.rows; ++r) {
    const Interval own = t.keys[r];
    if (own.lo < own.hi) {
      any_lo = min64(any_lo, own.lo);
      any_hi = max64(any_hi, own.hi);
    }
    all_lo = max64(all_lo, own.lo);
    all_hi = min64(all_hi, own.hi);
  }
  for (int64_t key0 = any_lo / kTileKeys * kTileKeys; key0 < any_hi; key0 += kTileKeys) {
    const bool full = key0 >= all_lo && key0 + kTileKeys <= all_hi;
    const float* panels = packed + key0 / kTileKeys * plan.k_floats;
    const Block block = score_block<Reducer::kScore>(t, map, panels, key0, full);
    if (block.lo < block.hi) reducer.block(t, block);
  }
  reducer.end(t);
}

// Shows every tile of the problem to reducers; make(task) gives the one of a task.
template <class T, class Make>
AF_INLINE void walk(const ScoreParams& params, const WalkPlan& plan, const Workers& workers,
                    const Make& make) {
  const FlashProblem& p = params.problem;
  const ScoreMap map = score_map(p);
  char* tiles = static_cast<char*>(params.workspace);
  float* packed = reinterpret_cast<float*>(tiles + workers.num_threads * plan.tile_bytes);
  const int64_t pairs = p.batch * p.heads_k, slot_floats = plan.blocks * plan.k_floats;
  for (int64_t pair0 = 0; pair0 < pairs; pair0 += plan.slots) {
    const int64_t slots = min64(plan.slots, pairs - pair0);
    parallel_tasks(workers, slots * plan.blocks, [&](int64_t task, int64_t) {
      const int64_t slot = task / plan.blocks, block = task % plan.blocks;
      const Sequence seq = sequence(p, (pair0 + slot) / p.heads_k);
      if (block * kTileKeys >= seq.k_len) return;
      pack_keys<T>(params, seq, (pair0 + slot) % p.heads_k, block * kTileKeys,
                   packed + slot * slot_floats + block * plan.k_floats);
    });
    parallel_tasks(workers, slots * plan.group * plan.chunks, [&](int64_t index, int64_t worker) {
      // Late rows see the most keys under a causal mask: they go first.
      const int64_t chunk = plan.chunks - 1 - index / (slots * plan.group);
      const int64_t slot = index / plan.group % slots, pair = pair0 + slot;
      const int64_t kv_head = pair % p.heads_k;
      const Task task{params,  sequence(p, pair / p.heads_k),
                      kv_head, kv_head * plan.group + index % plan.group,
                      chunk,   worker};
      auto reducer = make(task);
      Arena arena{tiles + worker * plan.tile_bytes};
      Tile tile = take_tile(arena, task, plan);
      for (int64_t row0 = chunk * plan.stripe; row0 < p.seqlen_q;
           row0 += plan.chunks * plan.stripe) {
        const int64_t end = min64(row0 + plan.stripe, p.seqlen_q);
        for (tile.first = row0; tile.first < end; tile.first += kTileRows) {
          tile.rows = min64(kTileRows, end - tile.first);
          walk_tile<T>(tile, map, packed + slot * slot_floats, plan, reducer);
        }
      }
    });
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
