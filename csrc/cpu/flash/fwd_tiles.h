// Flash attention, forward, for sequences with many query rows.
//
// Algorithm (FlashAttention-2 order, Dao 2023, on CPU tiles): K and V of each (batch, kv head) are
// packed once into panels, shared by all query tiles of all heads of the group. A task is one tile
// of up to kBlockM query rows: for each block of kBlockN keys, S = Q K^T (packed Q times packed K),
// online softmax in base 2, O += P V. What is multiplied is the level's Operands (operands.h): fp32
// throughout, or bf16 with S, O and the sums in fp32. All of it is resident in L1/L2.
//
//   tile       48 rows x 256 keys: S 51 KiB + Q 12 KiB + O 12 KiB at D 64 beside a K and V block of
//              128 KiB, inside a 512 KiB L2. Long rows pay for the maximum, the sum and the
//              rescaling once per 256 keys: 3% over 96 x 128 on Zen 4. 48 is a multiple of every
//              kMR (4, 6, 12). In bf16 128 x 256, for CPUs with 2 MiB of L2
//   tuning     FlashTiles may choose other tiles: query rows up to kMaxBlockM, keys up to kBlockN
//   heads      short sequences put the rows of several heads of a group into one tile
//   masks      what a row may see is one interval of keys, of which segments and a mask may hide
//              single ones. Blocks that all rows see whole take the unmasked path; others, and the
//              last kMaxSpan keys of a tile at once, go kRowGroup rows at a time, over the columns
//              those rows see
//   flops      4 D per visible (query, key) pair (2 D + 2 Dv when they differ)
//   bytes      Q, O once; K, V read once, then packed copies once per query tile, from cache
//   order      (batch, kv head) in waves whose packed copies stay inside kWaveBytes; heavy tiles
//              first, those of all heads in turn, or with matrix tiles head after head
//
// A row's result depends on its own Q and its own keys only: not on the tile it shares, the batch,
// or the number of threads. NaN or infinity in a key that a row does not see never reaches the row.
//
// Where K and V lie is the business of a store (keys.h); codes are decoded as they are packed.
#pragma once

#include "cpu/flash/keys.h"
#include "cpu/flash/operands.h"
#include "cpu/flash/output.h"
#include "cpu/flash/score_row.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

using Element = Operands::Element;
constexpr int64_t kMaxBlockM = 192;
constexpr int64_t kRowGroup = Operands::kRowGroup;

// The packed K and V of one (batch, kv head), block after block.
struct PackedHead {
  int64_t first;    // block that stands at the beginning
  Element* k;       // [blocks][block_n / kNR][depth][kNR], a panel as Operands has it
  Element* v;       // [blocks][Dv / kNR][block_n][kNR]
  uint8_t* finite;  // [blocks]: every V element of the block is finite
};

// One worker's tile.
struct Tile {
  Element* q;    // [block_m][depth] as Operands has it
  float* scale;  // with tiles: of the scores of each row
  float* s;      // [block_m][kLds]
  float* o;      // [block_m][ldo]
  float* m;
  float* l;
  Interval* keys;  // what each row sees
  float* drop;     // [kLds] dropout of one row
  float* rotated;  // [kNR][D rounded up to a vector], with rotary positions
};

struct Plan {
  int64_t block_m, block_n;
  int64_t blocks;     // key blocks of the longest sequence
  int64_t max_tiles;  // query tiles of the longest sequence, per (batch, kv head)
  int64_t slots;      // (batch, kv head) pairs per wave
  int64_t depth;      // channels of packed Q and K
  int64_t ldo;
  int64_t k_size, v_size;  // packed elements per key block
};

AF_INLINE int64_t block_bytes(const Plan& plan) {
  return (plan.k_size + plan.v_size) * static_cast<int64_t>(sizeof(Element));
}

AF_INLINE Plan make_plan(const FlashFwdParams& params, int64_t threads) {
  const FlashProblem& p = params.problem;
  const FlashTiles& tiles = params.tiles;
  Plan plan;
  plan.block_m = chosen(tiles.block_m, Operands::kBlockM, Operands::kRowStep, kMaxBlockM);
  plan.block_n = chosen(tiles.block_n, kBlockN, kNR, kBlockN);
  const int64_t wave_bytes = tiles.wave_bytes > 0 ? tiles.wave_bytes : Operands::kWaveBytes;
  plan.blocks = max64(1, ceil_div(p.seqlen_k, plan.block_n));
  int64_t group = group_size(p);
  plan.max_tiles = max_tiles(p.seqlen_q, group, plan.block_m);
  plan.ldo = padded_columns(p.v_head_dim);
  plan.depth = Operands::depth(p.head_dim);
  plan.k_size = plan.block_n * plan.depth;
  plan.v_size = plan.block_n * plan.ldo;
  int64_t pairs = p.batch * p.heads_k;
  int64_t bytes = plan.blocks * block_bytes(plan);
  int64_t enough = ceil_div(4 * threads, max64(1, plan.max_tiles));
  plan.slots = max64(1, min64(pairs, max64(enough, wave_bytes / bytes)));
  return plan;
}

AF_INLINE PackedHead take_head(Arena& arena, const Plan& plan) {
  PackedHead head;
  head.first = 0;
  head.k = arena.take<Element>(plan.blocks * plan.k_size);
  head.v = arena.take<Element>(plan.blocks * plan.v_size);
  head.finite = arena.take<uint8_t>(plan.blocks);
  return head;
}

AF_INLINE Tile take_tile(Arena& arena, const FlashProblem& p, const Plan& plan) {
  Tile tile;
  tile.q = arena.take<Element>(plan.block_m * plan.depth);
  tile.scale = arena.take<float>(Operands::kTiles ? plan.block_m : 0);
  tile.s = arena.take<float>(plan.block_m * kLds);
  tile.o = arena.take<float>(plan.block_m * plan.ldo);
  tile.m = arena.take<float>(plan.block_m);
  tile.l = arena.take<float>(plan.block_m);
  tile.keys = arena.take<Interval>(plan.block_m);
  tile.drop = arena.take<float>(p.mods.dropout ? kLds : 0);
  tile.rotated = arena.take<float>(p.mods.rope_cos ? kNR * round_up(p.head_dim, kLanes) : 0);
  return tile;
}

template <class Store>
AF_INLINE void pack_block(const FlashFwdParams& params, const Plan& plan, const Store& kv,
                          const Sequence& seq, int64_t kv_head, int64_t block,
                          const PackedHead& head, float* rotated) {
  const FlashProblem& p = params.problem;
  int64_t key0 = block * plan.block_n;
  int64_t n = min64(plan.block_n, seq.k_len - key0);
  const int64_t place = block - head.first;
  Element* k_block = head.k + place * plan.k_size;
  Element* v_block = head.v + place * plan.v_size;
  if constexpr (Store::Keys::kPages) {
    // A panel ahead of itself: its rows lie wherever their page does, each a token apart.
    typename Store::Places places[2];
    bool finite = true;
    auto rows_at = [&](int64_t c) { return max64(0, min64(kNR, n - c)); };
    kv.locate(seq, key0, rows_at(0), places[0]);
    for (int64_t c = 0; c < n; c += kNR) {
      const int64_t rows = rows_at(c), ahead = rows_at(c + kNR);
      auto &here = places[c / kNR % 2], &there = places[(c / kNR + 1) % 2];
      kv.locate(seq, key0 + c + kNR, ahead, there);
      const auto keys = kv.keys(seq, key0 + c, kv_head, here);
      const auto next = kv.keys(seq, key0 + c + kNR, kv_head, there);
      for (int64_t j = 0; j < ahead; ++j) prefetch_row(next.k_row(j), p.head_dim);
      Element* panel = k_block + c * plan.depth;
      Operands::pack_keys([&](int64_t j) { return keys.k_row(j); }, rows, p.head_dim, panel);
      if constexpr (Store::Keys::kCodes) keys.decode_panel(rows, p.head_dim, panel);
      for (int64_t j = 0; j < ahead; ++j) prefetch_row(next.v_row(j), p.v_head_dim);
      finite &= Operands::pack_values([&](int64_t j) { return keys.v_row(j); },
                                      [&](int64_t j, VecF x) { return keys.decode_value(j, x); },
                                      rows, p.v_head_dim, v_block + c * kNR, plan.block_n * kNR);
    }
    head.finite[place] = finite;
  } else {
    const auto keys = kv.keys(seq, key0, kv_head, {});
    for (int64_t c = 0; c < n; c += kNR) {
      auto pack = [&](auto* rows, int64_t stride) {
        Operands::pack_keys([=](int64_t j) { return rows + j * stride; }, n - c, p.head_dim,
                            k_block + c * plan.depth);
      };
      if constexpr (Operands::kTiles) {
        pack(keys.k_row(c), keys.k_stride);
      } else {
        with_keys(p, seq, kv_head, {key0 + c, min64(key0 + n, key0 + c + kNR)}, keys.k_row(c),
                  keys.k_stride, rotated, pack);
      }
    }
    head.finite[place] = Operands::pack_values([&](int64_t j) { return keys.v_row(j); },
                                               [](int64_t, VecF x) { return x; }, n, p.v_head_dim,
                                               v_block, plan.block_n * kNR);
  }
}

// What a tile of rows [row0, row0 + rows) of one band needs to know about itself.
struct TileRows {
  const FlashFwdParams& params;
  const Plan& plan;
  const Sequence& seq;
  int64_t kv_head, first, rows;

  AF_INLINE_MEMBER int64_t head(int64_t r) const {
    return kv_head * group_size(params.problem) + (first + r) / seq.q_len;
  }
  AF_INLINE_MEMBER int64_t query(int64_t r) const { return (first + r) % seq.q_len; }
};

// Scores of row r, columns [c0, c0 + n) of the span at key0, to probabilities; O is rescaled. A
// call of its own: inlined twice, its loops run out of registers at the baseline level.
[[gnu::noinline]] static void update_row(const TileRows& t, const Tile& tile, const ScoreMap& map,
                                         int64_t key0, int64_t r, int64_t c0, int64_t n,
                                         bool masked) {
  const FlashProblem& p = t.params.problem;
  float* row = tile.s + r * kLds;
  float* s = row + c0;
  float scale = 1.0f;
#ifdef ATTNFORGE_BELOW
  scale = tile.scale[r];
  // A positive scale is part of softmax; where there is more to do, it is done first.
  if (map.cap2 > 0.0f || p.alibi_slopes || p.mods.any || !(scale > 0.0f)) {
    scale_row(s, n, scale);
    scale = 1.0f;
  }
#endif
  if (map.cap2 > 0.0f) apply_softcap(s, n, map.cap2);
  if (p.alibi_slopes) {
    add_alibi(s, n, alibi_slope2(p, t.seq.batch, t.head(r)),
              t.query(r) + t.seq.offset - (key0 + c0));
  }
  Interval seen = {0, n};
  if (masked) {
    seen.lo = max64(0, min64(n, tile.keys[r].lo - key0 - c0));
    seen.hi = max64(seen.lo, min64(n, tile.keys[r].hi - key0 - c0));
    if (seen.lo == seen.hi) {
      fill(s, 0, n, 0.0f);
      Operands::round_weights(row, c0, n);
      return;
    }
  }
  float alpha;
  if (p.mods.any) {
    const ScoreRow scores = {s, n, key0 + c0, seen, tile.drop};
    alpha = weigh_score_row(p, t.seq, t.head(r), t.query(r), scores, tile.m[r], tile.l[r]);
    Operands::round_weights(row, c0, n);
  } else {
    if (masked) mask_row(s, n, seen.lo, seen.hi, -kInf);
    alpha = Operands::softmax(row, c0, n, scale, tile.m[r], tile.l[r]);
  }
  if (alpha != 1.0f) scale_row(tile.o + r * t.plan.ldo, t.plan.ldo, alpha);
}

// Calls f(v, c0, n) for each run of keys [key0 + c0, key0 + c0 + n) of a span that lies in one
// block; v is the first key's place in the block's first column panel.
template <class F>
AF_INLINE void for_blocks(const Plan& plan, const PackedHead& head, int64_t key0, Interval span,
                          const F& f) {
  for (int64_t c = span.lo; c < span.hi;) {
    const int64_t block = (key0 + c) / plan.block_n, first = (key0 + c) % plan.block_n;
    const int64_t n = min64(span.hi - c, plan.block_n - first);
    f(head.v + (block - head.first) * plan.v_size + first * kNR, c, n);
    c += n;
  }
}

// O += P V of one row over exactly the keys it sees: for spans whose V is not finite everywhere.
AF_INLINE void accumulate_row(const TileRows& t, const Tile& tile, const PackedHead& head,
                              int64_t key0, int64_t width, int64_t r) {
  const Interval own = {tile.keys[r].lo - key0, tile.keys[r].hi - key0};
  const Interval span = {max64(0, own.lo) / kNR * kNR, min64(width, own.hi)};
  const FlashProblem& p = t.params.problem;
  const RowMods mods = row_mods(p, t.seq, t.head(r), t.query(r));
  auto seen = [&](int64_t c) { return c >= own.lo && sees(mods, key0 + c); };
  for_blocks(t.plan, head, key0, span, [&](const Element* panel, int64_t c, int64_t n) {
    Operands::add_seen_values(seen, tile.s + r * kLds, c, n, panel, t.plan.block_n * kNR,
                              vectors_of(p.v_head_dim), tile.o + r * t.plan.ldo);
  });
}

// Columns [lo, hi) of a span that some row of a group sees; lo is the start of a panel.
AF_INLINE Interval seen_columns(const TileRows& t, const Tile& tile, int64_t key0, int64_t width,
                                int64_t r0) {
  int64_t lo = width, hi = 0;
  for (int64_t r = r0; r < min64(r0 + kRowGroup, t.rows); ++r) {
    if (tile.keys[r].lo == tile.keys[r].hi) continue;
    lo = min64(lo, tile.keys[r].lo - key0);
    hi = max64(hi, tile.keys[r].hi - key0);
  }
  lo = max64(0, lo) / kNR * kNR;
  return {lo, max64(lo, min64(width, hi))};
}

// A span of at most kMaxSpan keys that some row sees in part: each group of rows computes the
// columns that it sees. Panels are the outer loop, as in gemm(): one is read from L2 once and
// serves all row groups from L1. key0 is the start of a panel.
AF_INLINE void partial_span(const TileRows& t, const Tile& tile, const ScoreMap& map,
                            const PackedHead& head, int64_t key0, int64_t width) {
  const FlashProblem& p = t.params.problem;
  // Panels of all blocks follow each other.
  const Element* k_panels = head.k + (key0 - head.first * t.plan.block_n) * t.plan.depth;
  bool finite = true;
  for (int64_t b = key0 / t.plan.block_n; b <= (key0 + width - 1) / t.plan.block_n; ++b)
    finite &= head.finite[b - head.first];
  Interval columns[kMaxBlockM / kRowGroup];
  int64_t first = width, last = 0;
  for (int64_t r0 = 0; r0 < t.rows; r0 += kRowGroup) {
    const Interval seen = columns[r0 / kRowGroup] = seen_columns(t, tile, key0, width, r0);
    if (seen.lo == seen.hi) continue;
    first = min64(first, seen.lo);
    last = max64(last, seen.hi);
  }
  for (int64_t c = first; c < last; c += kNR) {
    for (int64_t r0 = 0; r0 < t.rows; r0 += kRowGroup) {
      if (c < columns[r0 / kRowGroup].lo || c >= columns[r0 / kRowGroup].hi) continue;
      Operands::scores(min64(kRowGroup, t.rows - r0), 2, t.plan.depth, tile.q + r0 * t.plan.depth,
                       k_panels + c * t.plan.depth, tile.s + r0 * kLds + c);
    }
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    const Interval seen = columns[r / kRowGroup];
    const int64_t n = round_up(seen.hi - seen.lo, kNR);
    if (n > 0) update_row(t, tile, map, key0, r, seen.lo, n, true);
    if (n > 0 && !finite) accumulate_row(t, tile, head, key0, width, r);
  }
  for (int64_t d = 0; d < p.v_head_dim && finite; d += kNR) {
    for (int64_t r0 = 0; r0 < t.rows; r0 += kRowGroup) {
      const Interval seen = columns[r0 / kRowGroup];
      for_blocks(t.plan, head, key0, seen, [&](const Element* v, int64_t c, int64_t n) {
        Operands::add_values(min64(kRowGroup, t.rows - r0), min64(2, vectors_of(p.v_head_dim - d)),
                             tile.s + r0 * kLds, c, n, v + d * t.plan.block_n, 0,
                             tile.o + r0 * t.plan.ldo + d, t.plan.ldo);
      });
    }
  }
}

// Divides by the sum, adds the sink, rounds and stores O, its rounding residue and the LSE.
AF_INLINE void finish_tile_row(const TileRows& t, const Tile& tile, int64_t r) {
  const FlashProblem& p = t.params.problem;
  const int64_t head = t.head(r);
  RowEnd end = finish_softmax(tile.m[r], tile.l[r], p.sinks ? p.sinks[head] : -kInf);
  *stat_ptr(t.params.lse, t.seq, head, t.query(r)) = end.lse;
  store_row(t.params, t.seq, head, t.query(r), tile.o + r * t.plan.ldo,
            end.scale * value_scale(p, t.seq, t.kv_head));
}

AF_INLINE float query_scale(const TileRows& t, int64_t r, float q_scale) {
  return q_scale * row_scale(t.params.problem, t.seq, t.head(r), t.query(r));
}
template <class T>
AF_INLINE const T* query_row(const TileRows& t, int64_t r) {
  return row_ptr<const T>(t.params.q, t.seq.batch, t.seq.q_row + t.query(r), t.head(r));
}

#ifdef ATTNFORGE_BELOW
// Copies the rows of Q, and keeps their scales.
AF_INLINE void load_queries(const TileRows& t, const Tile& tile, float q_scale) {
  const int64_t dim = t.params.problem.head_dim, depth = t.plan.depth;
  __builtin_memset(tile.q, 0, round_up(t.rows, Operands::kRowStep) * depth * sizeof(Element));
  for (int64_t r = 0; r < t.rows; ++r) {
    if (r + kRowsAhead < t.rows) prefetch_row(query_row<Element>(t, r + kRowsAhead), dim);
    __builtin_memcpy(tile.q + r * depth, query_row<Element>(t, r), dim * sizeof(Element));
    tile.scale[r] = query_scale(t, r, q_scale);
  }
}
#else
// Packs the rows of Q, scaled.
template <class T>
[[gnu::noinline]] static void pack_queries(const TileRows& t, const Tile& tile, float q_scale) {
  const FlashProblem& p = t.params.problem;
  for (int64_t r = 0; r < t.rows; ++r) {
    if (r + kRowsAhead < t.rows) prefetch_row(query_row<T>(t, r + kRowsAhead), p.head_dim);
    const float scale = query_scale(t, r, q_scale);
    with_query(p, t.seq, t.head(r), t.query(r), query_row<T>(t, r), tile.rotated,
               [&](auto* row) { pack_row(row, p.head_dim, scale, r, tile.q); });
  }
}
AF_INLINE void load_queries(const TileRows& t, const Tile& tile, float q_scale) {
  const FlashProblem& p = t.params.problem;
  dispatch_input(p.q_dtype,
                 [&](auto element) { pack_queries<decltype(element)>(t, tile, q_scale); });
  zero_rows(t.rows, round_up(t.rows, kMR), p.head_dim, tile.q);
}
#endif

// Q, what each row sees, and nothing seen yet.
AF_INLINE void prepare_tile(const TileRows& t, const Tile& tile) {
  const FlashProblem& p = t.params.problem;
  load_queries(t, tile, score_map(p).q_scale);
  for (int64_t r = 0; r < t.rows; ++r) {
    tile.keys[r] = visible_keys(p, t.seq, t.head(r), t.query(r));
    tile.m[r] = -kInf;
    tile.l[r] = 0.0f;
  }
  fill(tile.o, 0, round_up(t.rows, Operands::kRowStep) * t.plan.ldo, 0.0f);
}

// The tile over keys `span`, whose blocks are packed; it begins at a block.
AF_INLINE void attend_tile(const TileRows& t, const Tile& tile, const PackedHead& head,
                           Interval span) {
  const FlashProblem& p = t.params.problem;
  const ScoreMap map = score_map(p);
  // Bounds over the rows: [any_lo, any_hi) is seen by some row, [all_lo, all_hi) by every row.
  int64_t any_lo = span.hi, any_hi = 0, all_lo = 0, all_hi = span.hi;
  for (int64_t r = 0; r < t.rows; ++r) {
    const Interval keys = {max64(tile.keys[r].lo, span.lo), min64(tile.keys[r].hi, span.hi)};
    if (keys.lo < keys.hi) {
      any_lo = min64(any_lo, keys.lo);
      any_hi = max64(any_hi, keys.hi);
    }
    all_lo = max64(all_lo, keys.lo);
    all_hi = min64(all_hi, keys.hi);
  }
  for (int64_t key0 = any_lo / kNR * kNR; key0 < any_hi;) {
    const int64_t block = key0 / t.plan.block_n;
    const int64_t block_end = (block + 1) * t.plan.block_n;
    const bool whole =
        key0 % t.plan.block_n == 0 && key0 >= all_lo && block_end <= all_hi && !hides(p.mods);
    // What is left in one go, if it fits: one softmax and one rescaling where blocks take two.
    const bool rest = any_hi != block_end && any_hi - key0 <= kMaxSpan;
    if (!whole || rest) {
      const int64_t end = rest ? any_hi : min64(any_hi, block_end);
      partial_span(t, tile, map, head, key0, end - key0);
      key0 = end;
      continue;
    }
    const int64_t place = block - head.first;
    for (int64_t r0 = 0; r0 < t.rows; r0 += Operands::kRowsAtOnce) {
      const int64_t rows = min64(Operands::kRowsAtOnce, t.rows - r0);
      Tile part = tile;
      part.s -= r0 * kLds;  // the same memory for all of them
      Operands::scores(rows, vectors_of(t.plan.block_n), t.plan.depth, tile.q + r0 * t.plan.depth,
                       head.k + place * t.plan.k_size, tile.s);
      for (int64_t r = r0; r < r0 + rows; ++r) {
        update_row(t, part, map, key0, r, 0, t.plan.block_n, false);
      }
      Operands::add_values(rows, vectors_of(p.v_head_dim), tile.s, 0, t.plan.block_n,
                           head.v + place * t.plan.v_size, t.plan.block_n * kNR,
                           tile.o + r0 * t.plan.ldo, t.plan.ldo);
    }
    key0 = block_end;
  }
}

AF_INLINE void run_tile(const TileRows& t, const Tile& tile, const PackedHead& head) {
  const Operands::Scope scope;
  prepare_tile(t, tile);
  attend_tile(t, tile, head, {0, t.seq.k_len});
  for (int64_t r = 0; r < t.rows; ++r) finish_tile_row(t, tile, r);
}

template <class Store>
AF_INLINE void run_fwd(const FlashFwdParams& params, const Store& kv, const Workers& workers) {
  const FlashProblem& p = params.problem;
  const Plan plan = make_plan(params, workers.num_threads);
  Arena arena{static_cast<char*>(params.workspace)};
  char* tiles = arena.base;
  int64_t tile_bytes;
  {
    take_tile(arena, p, plan);
    tile_bytes = arena.used;
    arena.used *= workers.num_threads;
  }
  char* heads = arena.base + arena.used;
  int64_t head_start = arena.used;
  take_head(arena, plan);
  const int64_t head_bytes = arena.used - head_start;
  auto head_at = [&](int64_t slot) {
    Arena a{heads + slot * head_bytes};
    return take_head(a, plan);
  };

  const int64_t pairs = p.batch * p.heads_k;
  for (int64_t pair0 = 0; pair0 < pairs; pair0 += plan.slots) {
    const int64_t slots = min64(plan.slots, pairs - pair0);
    parallel_tasks(workers, slots * plan.blocks, [&](int64_t task, int64_t worker) {
      int64_t slot = task / plan.blocks, block = task % plan.blocks, pair = pair0 + slot;
      Sequence seq = sequence(p, pair / p.heads_k, pair % p.heads_k);
      if (!served_here(params, seq) || seq.q_len == 0 || block * plan.block_n >= seq.k_len) return;
      Arena a{tiles + worker * tile_bytes};
      pack_block(params, plan, kv, seq, pair % p.heads_k, block, head_at(slot),
                 take_tile(a, p, plan).rotated);
    });
    parallel_tasks(workers, slots * plan.max_tiles, [&](int64_t task, int64_t worker) {
      // Late tiles see the most keys under a causal mask: they go first.
      int64_t slot = task % slots, index = plan.max_tiles - 1 - task / slots;
      if constexpr (Operands::kTiles) {  // a head after another: its K and V stay in L2
        slot = task / plan.max_tiles, index = plan.max_tiles - 1 - task % plan.max_tiles;
      }
      const int64_t pair = pair0 + slot;
      Sequence seq = sequence(p, pair / p.heads_k, pair % p.heads_k);
      RowTiling tiling = row_tiling(seq.q_len, group_size(p), plan.block_m);
      if (!served_here(params, seq) || seq.q_len == 0 || index >= tiling.tiles()) return;
      Arena a{tiles + worker * tile_bytes};
      TileRows t{params, plan, seq, pair % p.heads_k, tiling.first_row(index), tiling.rows(index)};
      run_tile(t, take_tile(a, p, plan), head_at(slot));
    });
  }
}

AF_INLINE int64_t fwd_workspace(const FlashFwdParams& params, int64_t num_threads) {
  const Plan plan = make_plan(params, num_threads);
  Arena tile{nullptr}, head{nullptr};
  take_tile(tile, params.problem, plan);
  take_head(head, plan);
  return tile.used * num_threads + head.used * plan.slots;
}

}  // namespace
}  // namespace attnforge::cpu::ATTNFORGE_ISA
