// Packed tiles for sequences between decode and forward: some rows, many keys (shared prefixes,
// drafts, large groups of query heads, latent attention).
//
// A task is one (sequence, kv head) and one split of kSplitKeys keys. It packs kPackKeys keys at a
// time into memory of its own, small enough for L2, and meets them with every tile of rows while
// they are there; state (m, l, O) of all tiles is kept over the split and left as a partial.
// Against forward: K and V are packed where they are used, and few rows still make many tasks.
// Against decode: products run from packed operands, at three times the rate.
//
// Splits are anchored at key 0 and have one length, so a result depends on its own sequence alone.
#pragma once

#include "cpu/flash/fwd_tiles.h"
#include "cpu/flash/partials.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kSplitKeys = 2048;
constexpr int64_t kPackBytes = 640 << 10;  // packed K and V at a time: a part of L2

struct SplitPlan {
  Plan tiles;
  int64_t pack_blocks;  // packed at a time
  int64_t rows, splits, pairs;
};

AF_INLINE SplitPlan make_split_plan(const FlashFwdParams& params) {
  const FlashProblem& p = params.problem;
  const int64_t group = group_size(p),
                queries = max64(1, min64(p.seqlen_q, params.most_rows / group));
  SplitPlan plan;
  plan.tiles = make_plan(params, 1);
  plan.pack_blocks = max64(1, min64(2, kPackBytes / block_bytes(plan.tiles)));
  plan.tiles.blocks = plan.pack_blocks;
  plan.tiles.max_tiles = max_tiles(queries, group, plan.tiles.block_m);
  plan.rows = round_up(queries * group, kLanes);
  const int64_t fixed = max64(1, ceil_div(p.seqlen_k, kSplitKeys));
  plan.splits = params.num_splits > 0 ? params.num_splits : fixed;
  plan.pairs = p.batch * p.heads_k;
  return plan;
}

// One worker's packed keys, and its tiles, which share the scores.
AF_INLINE PackedHead take_worker(Arena& a, const FlashProblem& p, const SplitPlan& plan,
                                 Tile* tiles) {
  const PackedHead head = take_head(a, plan.tiles);
  for (int64_t i = 0; i < plan.tiles.max_tiles; ++i) {
    const Tile tile = take_tile(a, p, plan.tiles);
    if (tiles) tiles[i] = tile;
  }
  return head;
}

AF_INLINE int64_t worker_bytes(const FlashProblem& p, const SplitPlan& plan) {
  Arena a{nullptr};
  a.take<Tile>(plan.tiles.max_tiles);
  take_worker(a, p, plan, nullptr);
  return a.used;
}

AF_INLINE Partials partials_at(const FlashProblem& p, const SplitPlan& plan, char* base) {
  return {base, plan.rows, padded_columns(p.v_head_dim), plan.splits};
}

// Keys that some row of the sequence sees; row bounds of single rows are not asked.
AF_INLINE Interval seen_keys(const FlashProblem& p, const Sequence& seq) {
  const int64_t first = p.window_left < 0 ? 0 : max64(0, seq.offset - p.window_left);
  const int64_t end =
      p.window_right < 0 ? seq.k_len : min64(seq.k_len, seq.offset + seq.q_len + p.window_right);
  return {min64(first, seq.k_len), max64(0, end)};
}

template <class Store>
AF_INLINE void run_split_tiles(const FlashFwdParams& params, const SplitPlan& plan, const Store& kv,
                               const Sequence& seq, int64_t kv_head, Interval split, Arena memory,
                               const Partial& part) {
  const FlashProblem& p = params.problem;
  const RowTiling tiling = row_tiling(seq.q_len, group_size(p), plan.tiles.block_m);
  Tile* tiles = memory.take<Tile>(plan.tiles.max_tiles);
  PackedHead head = take_worker(memory, p, plan, tiles);
  auto rows_of = [&](int64_t i) {
    return TileRows{params, plan.tiles, seq, kv_head, tiling.first_row(i), tiling.rows(i)};
  };
  for (int64_t i = 0; i < tiling.tiles(); ++i) {
    tiles[i].s = tiles[0].s;
    prepare_tile(rows_of(i), tiles[i]);
  }
  const int64_t step = plan.pack_blocks * plan.tiles.block_n;
  const Interval seen = seen_keys(p, seq);
  const int64_t end = min64(split.hi, seen.hi);
  const Operands::Scope scope;
  for (int64_t key0 = max64(split.lo, seen.lo / plan.tiles.block_n * plan.tiles.block_n);
       key0 < end; key0 = (key0 / step + 1) * step) {
    const Interval span = {key0, min64(end, (key0 / step + 1) * step)};
    head.first = key0 / plan.tiles.block_n;
    for (int64_t b = head.first; b * plan.tiles.block_n < span.hi; ++b) {
      pack_block(params, plan.tiles, kv, seq, kv_head, b, head, tiles[0].rotated);
    }
    for (int64_t i = 0; i < tiling.tiles(); ++i) attend_tile(rows_of(i), tiles[i], head, span);
  }
  for (int64_t i = 0; i < tiling.tiles(); ++i) {
    const TileRows t = rows_of(i);
    for (int64_t r = 0; r < t.rows; ++r) {
      part.m[t.first + r] = tiles[i].m[r];
      part.l[t.first + r] = tiles[i].l[r];
      part.z[t.first + r] = 0.0f;
    }
    __builtin_memcpy(part.o + t.first * plan.tiles.ldo, tiles[i].o, t.rows * plan.tiles.ldo * 4);
  }
}

AF_INLINE int64_t split_tiles_workspace(const FlashFwdParams& params, int64_t threads) {
  const FlashProblem& p = params.problem;
  const SplitPlan plan = make_split_plan(params);
  const int64_t partials = partials_at(p, plan, nullptr).bytes() * plan.pairs * plan.splits;
  return partials + worker_bytes(p, plan) * threads;
}

template <class Store>
AF_INLINE void run_split_tiles(const FlashFwdParams& params, const Store& kv,
                               const Workers& workers) {
  const FlashProblem& p = params.problem;
  const SplitPlan plan = make_split_plan(params);
  const Partials partials = partials_at(p, plan, static_cast<char*>(params.workspace));
  char* scratch = partials.base + partials.bytes() * plan.pairs * plan.splits;
  const int64_t bytes = worker_bytes(p, plan);
  // A split begins at a block, wherever num_splits puts it.
  auto length_of = [&](int64_t batch) {
    return round_up(split_length(params, kSplitKeys, batch), plan.tiles.block_n);
  };
  // Heads one after another over the same keys: what one head's rows bring along stays in L3.
  parallel_tasks(workers, plan.pairs * plan.splits, [&](int64_t task, int64_t worker) {
    const int64_t kv_head = task % p.heads_k, split = task / p.heads_k % plan.splits;
    const int64_t batch = task / p.heads_k / plan.splits, pair = batch * p.heads_k + kv_head;
    const Sequence seq = sequence(p, batch, kv_head);
    const int64_t keys = length_of(seq.batch), lo = split * keys;
    if (!served_here(params, seq) || seq.q_len == 0 || (split > 0 && lo >= seq.k_len)) return;
    run_split_tiles(params, plan, kv, seq, kv_head, {lo, min64(seq.k_len, lo + keys)},
                    Arena{scratch + worker * bytes}, partials.at(pair, split));
  });
  parallel_tasks(workers, plan.pairs, [&](int64_t pair, int64_t) {
    const int64_t kv_head = pair % p.heads_k, group = group_size(p);
    const Sequence seq = sequence(p, pair / p.heads_k, kv_head);
    if (!served_here(params, seq) || seq.q_len == 0) return;
    const int64_t splits = max64(1, ceil_div(seq.k_len, length_of(seq.batch)));
    merge_rows(partials, pair, splits, seq.q_len * group,
               [&](int64_t r, float m, float l, float, float* o) {
                 const int64_t head = kv_head * group + r / seq.q_len, i = r % seq.q_len;
                 const RowEnd end = finish_softmax(m, l, p.sinks ? p.sinks[head] : -kInf);
                 *stat_ptr(params.lse, seq, head, i) = end.lse;
                 store_row(params, seq, head, i, o, end.scale);
               });
  });
}

}  // namespace
}  // namespace attnforge::cpu::ATTNFORGE_ISA
