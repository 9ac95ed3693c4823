// Tiles, chunks and memory of the backward: how a problem is cut (see bwd.cpp) and where everything
// of a wave of (batch, kv head) pairs lies in the workspace.
#pragma once

#include "cpu/flash/problem.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int64_t kBlockM = 96;
constexpr int64_t kMaxBlockM = 384;
constexpr int64_t kRowStep = 12;  // a multiple of every kMR (4, 6, 12)
constexpr int64_t kMaxBlockN = 96;
constexpr int64_t kLds = kMaxBlockN + 16;
constexpr int64_t kChunksWanted = 16;
constexpr int64_t kMaxChunks = 256;
constexpr int64_t kWaveBytes = 32 << 20;

struct Plan {
  int64_t group, block_m, block_n;
  int64_t max_tiles, max_blocks;
  int64_t chunks_wanted, chunks, slots;
  int64_t ldd, ldv;  // padded D and Dv
};

// Whether pairs add to the same elements of dbias.
AF_INLINE bool shares_bias(const FlashBwdParams& params) {
  const FlashProblem& p = params.problem;
  return params.dbias &&
         ((params.dbias_batch == 0 && p.batch > 1) || (params.dbias_head == 0 && p.heads_k > 1));
}

// All threads work on one pair where pairs must go one by one.
AF_INLINE int64_t chunks_of(const FlashBwdParams& params, const Plan& plan, int64_t blocks) {
  const int64_t heads = shares_bias(params) ? 1 : params.problem.heads_k;
  const int64_t wanted = min64(ceil_div(plan.chunks_wanted, heads), params.max_chunks);
  return max64(1, min64(wanted, blocks));
}

// A packed query tile: everything phase 2 reads of it.
struct QueryTile {
  float* q_groups;  // scaled for the base-2 logits
  float* q_panels;  // scaled for dK
  float* do_groups;
  float* do_panels;
  float* lse2;     // [block_m]
  float* delta;    // [block_m]
  Interval* keys;  // [block_m]
  bool* finite;    // one flag: Q and dO of the tile hold no NaN or infinity
};

struct Head {
  Arena tiles;
  float* slabs;  // [chunks][max_tiles * block_m][ldd]
};

struct Scratch {
  float *k_panels, *k_columns, *v_panels;  // K^T, K and V^T operands of one key block
  float *s, *dp, *s_cap;                   // [block_m][kLds]; s_cap: slopes under a softcap
  float *dk, *dv;                          // [kMaxBlockN + kMR][ldd], [..][ldv]
  float* drop;                             // [kLds] dropout of one row
  float* rotated;                          // [kMaxBlockN][ldd] with rotary positions
};

AF_INLINE QueryTile take_query_tile(Arena& a, const FlashProblem& p, const Plan& plan) {
  QueryTile t;
  t.q_groups = a.take<float>(plan.block_m * p.head_dim);
  t.q_panels = a.take<float>(plan.block_m * plan.ldd);
  t.do_groups = a.take<float>(plan.block_m * p.v_head_dim);
  t.do_panels = a.take<float>(plan.block_m * plan.ldv);
  t.lse2 = a.take<float>(plan.block_m);
  t.delta = a.take<float>(plan.block_m);
  t.keys = a.take<Interval>(plan.block_m);
  t.finite = a.take<bool>(1);
  return t;
}

AF_INLINE Scratch take_scratch(Arena& a, const FlashProblem& p, const Plan& plan) {
  Scratch s;
  int64_t keys = round_up(kMaxBlockN, kNR);
  s.k_panels = a.take<float>(keys * p.head_dim);
  s.k_columns = a.take<float>(kMaxBlockN * plan.ldd);
  s.v_panels = a.take<float>(keys * p.v_head_dim);
  s.s = a.take<float>(plan.block_m * kLds + kMR);
  s.dp = a.take<float>(plan.block_m * kLds + kMR);
  s.s_cap = a.take<float>(p.softcap > 0.0f ? plan.block_m * kLds : 0);
  s.dk = a.take<float>((kMaxBlockN + kMR) * plan.ldd);
  s.dv = a.take<float>((kMaxBlockN + kMR) * plan.ldv);
  s.drop = a.take<float>(p.mods.dropout ? kLds : 0);
  s.rotated = a.take<float>(p.mods.rope_cos ? kMaxBlockN * plan.ldd : 0);
  return s;
}

struct Layout {
  Plan plan;
  int64_t tile_bytes, scratch_bytes, slab_floats, head_bytes, total;
};

AF_INLINE Layout make_layout(const FlashBwdParams& params, int64_t threads) {
  const FlashProblem& p = params.problem;
  const FlashTiles& tiles = params.tiles;
  Layout l;
  Plan& plan = l.plan;
  plan.group = group_size(p);
  plan.block_m = chosen(tiles.block_m, kBlockM, kRowStep, kMaxBlockM);
  plan.block_n = chosen(tiles.block_n, p.head_dim > 96 ? 64 : kMaxBlockN, 8, kMaxBlockN);
  plan.chunks_wanted = chosen(tiles.chunks, kChunksWanted, 1, kMaxChunks);
  plan.max_tiles = max_tiles(p.seqlen_q, plan.group, plan.block_m);
  plan.max_blocks = max64(1, ceil_div(p.seqlen_k, plan.block_n));
  plan.chunks = chunks_of(params, plan, plan.max_blocks);
  plan.ldd = padded_columns(p.head_dim);
  plan.ldv = padded_columns(p.v_head_dim);
  Arena tile{nullptr}, scratch{nullptr};
  take_query_tile(tile, p, plan);
  take_scratch(scratch, p, plan);
  l.tile_bytes = tile.used;
  l.scratch_bytes = scratch.used;
  l.slab_floats = plan.max_tiles * plan.block_m * plan.ldd;
  l.head_bytes = plan.max_tiles * l.tile_bytes + plan.chunks * l.slab_floats * 4;
  int64_t pairs = p.batch * p.heads_k;
  int64_t enough = ceil_div(2 * threads, plan.chunks);
  plan.slots = max64(1, min64(pairs, max64(enough, kWaveBytes / max64(1, l.head_bytes))));
  if (shares_bias(params)) plan.slots = 1;
  l.total = threads * l.scratch_bytes + plan.slots * l.head_bytes;
  return l;
}

// One (batch, kv head) of the current wave.
struct Pair {
  const FlashBwdParams& params;
  const Layout& layout;
  Sequence seq;
  RowTiling tiling;
  int64_t kv_head;
  char* memory;

  AF_INLINE_MEMBER const FlashProblem& problem() const { return params.problem; }
  AF_INLINE_MEMBER QueryTile tile(int64_t index) const {
    Arena a{memory + index * layout.tile_bytes};
    return take_query_tile(a, problem(), layout.plan);
  }
  AF_INLINE_MEMBER float* slab(int64_t chunk, int64_t tile_index) const {
    char* slabs = memory + layout.plan.max_tiles * layout.tile_bytes;
    return reinterpret_cast<float*>(slabs) + chunk * layout.slab_floats +
           tile_index * layout.plan.block_m * layout.plan.ldd;
  }
  AF_INLINE_MEMBER int64_t chunks() const {
    return chunks_of(params, layout.plan, ceil_div(seq.k_len, layout.plan.block_n));
  }
  AF_INLINE_MEMBER int64_t head(int64_t row) const {
    return kv_head * layout.plan.group + row / seq.q_len;
  }
  AF_INLINE_MEMBER int64_t query(int64_t row) const { return row % seq.q_len; }
};

}  // namespace attnforge::cpu::ATTNFORGE_ISA
