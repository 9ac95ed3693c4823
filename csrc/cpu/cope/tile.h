// What the forward and the backward of CoPE share: tiles of query rows of one head, packed operands
// of keys and of the table, scores of one (tile, key block).
#pragma once

#include "cpu/cope/positions.h"
#include "cpu/flash/problem.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int64_t kBlockM = 48;  // a multiple of every kMR (4, 6, 12), as in flash
// S and dP 21 KiB each, beside K and V blocks in L2. A multiple of every kMR too: products over
// keys write whole groups of rows, which must not reach into the next block's.
constexpr int64_t kBlockN = 96;
constexpr int64_t kLds = kBlockN + 16;    // off the power of two: rows do not share L1 sets
constexpr int64_t kWaveBytes = 16 << 20;  // packed K and V, and slabs, of a wave

// The table of one head, packed once: E [D][padded] for Q E, and its transpose for dT E^T.
struct PackedTable {
  float* columns;  // [padded / kNR][D][kNR]
  float* rows;     // [D / kNR][padded][kNR]
};

AF_INLINE PackedTable take_table(Arena& a, const FlashProblem& p, const CopeTable& t) {
  PackedTable packed;
  packed.columns = a.take<float>(round_up(t.padded, kNR) * p.head_dim);
  packed.rows = a.take<float>(padded_columns(p.head_dim) * t.padded);
  return packed;
}

AF_INLINE void pack_table(const FlashProblem& p, const CopeTable& t, int64_t head,
                          const PackedTable& packed) {
  const int64_t d = p.head_dim;
  const float* e = t.data + head * d * t.padded;
  pack_column_panels(e, t.padded, d, t.padded, 1.0f, packed.columns, d * kNR);
  for (int64_t d0 = 0; d0 < d; d0 += kNR) {
    pack_key_panel(e + d0 * t.padded, t.padded, d - d0, t.padded, packed.rows + d0 * t.padded);
  }
}

// The packed table of a query head.
AF_INLINE PackedTable table_of(char* tables, const FlashProblem& p, const CopeTable& t,
                               int64_t head) {
  Arena size{nullptr};
  take_table(size, p, t);
  Arena a{tables + (t.heads == 1 ? 0 : head) * size.used};
  return take_table(a, p, t);
}

AF_INLINE int64_t tables_bytes(const FlashProblem& p, const CopeTable& t) {
  Arena size{nullptr};
  take_table(size, p, t);
  return size.used * t.heads;
}

AF_INLINE void pack_tables(const Workers& workers, char* tables, const FlashProblem& p,
                           const CopeTable& t) {
  parallel_tasks(workers, t.heads, [&](int64_t head, int64_t) {
    pack_table(p, t, head, table_of(tables, p, t, head));
  });
}

// Rows of one query head, and what they see.
struct TileRows {
  const FlashProblem& p;
  const Sequence& seq;
  int64_t head, first, rows;

  AF_INLINE_MEMBER int64_t kv_head() const { return head / group_size(p); }
};

// One worker's tile.
struct Tile {
  float* q;       // [kBlockM / kMR][D][kMR], as it is in memory
  float* s;       // [kBlockM][kLds]
  float* tables;  // [kBlockM][value, slope][ld]
  float* carry;   // [kBlockM]: sums of the gates right of a block
  Interval* keys;
  int64_t ld;

  AF_INLINE_MEMBER RowTable table(int64_t r, int64_t positions) const {
    float* value = tables + r * 2 * ld;
    return {value, value + ld, positions - 1};
  }
};

AF_INLINE Tile take_tile(Arena& a, const FlashProblem& p, const CopeTable& t) {
  Tile tile;
  tile.ld = round_up(t.padded, kNR);
  tile.q = a.take<float>(kBlockM * p.head_dim);
  tile.s = a.take<float>(kBlockM * kLds);
  tile.tables = a.take<float>(kBlockM * 2 * tile.ld);
  tile.carry = a.take<float>(kBlockM);
  tile.keys = a.take<Interval>(kBlockM);
  return tile;
}

// Packs Q, finds what rows see, fills their tables: [lo, hi) is what some row sees.
template <class T>
AF_INLINE Interval prepare_rows(const TileRows& t, const TensorRef& q, const CopeTable& table,
                                const PackedTable& packed, const Tile& tile) {
  Interval some = {t.seq.k_len, 0};
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t i = t.first + r;
    pack_row(row_ptr<const T>(q, t.seq.batch, t.seq.q_row + i, t.head), t.p.head_dim, 1.0f, r,
             tile.q);
    tile.keys[r] = visible_keys(t.p, t.seq, t.head, i);
    tile.carry[r] = 0.0f;
    if (tile.keys[r].lo == tile.keys[r].hi) continue;
    some.lo = min64(some.lo, tile.keys[r].lo);
    some.hi = max64(some.hi, tile.keys[r].hi);
  }
  zero_rows(t.rows, round_up(t.rows, kMR), t.p.head_dim, tile.q);
  gemm<1, kMR>(t.rows, vectors_of(table.padded), t.p.head_dim, tile.q, t.p.head_dim, packed.columns,
               t.p.head_dim * kNR, tile.tables, 2 * tile.ld, false);
  for (int64_t r = 0; r < t.rows; ++r) tile.table(r, table.positions).finish(table.padded);
  return some;
}

AF_INLINE float base2_scale(const FlashProblem& p) {
  return p.softmax_scale * kLog2E;
}

// Row r in the block of `keys` keys at key0, columns padded to whole panels.
AF_INLINE RowSpan row_span(const Tile& tile, int64_t r, int64_t key0, int64_t keys) {
  const int64_t lo = max64(0, min64(keys, tile.keys[r].lo - key0));
  return {round_up(keys, kNR), lo, max64(lo, min64(keys, tile.keys[r].hi - key0))};
}

// Whether every row of the tile sees every key of the block.
AF_INLINE bool sees_whole(const TileRows& t, const Tile& tile, int64_t key0, int64_t keys) {
  for (int64_t r = 0; r < t.rows; ++r) {
    if (tile.keys[r].lo > key0 || tile.keys[r].hi < key0 + keys) return false;
  }
  return true;
}

// Raw products of the tile and a block whose packed K^T is `panels`.
AF_INLINE void multiply(const TileRows& t, const Tile& tile, const float* panels, int64_t keys) {
  const int64_t d = t.p.head_dim;
  gemm<1, kMR>(t.rows, vectors_of(round_up(keys, kNR)), d, tile.q, d, panels, d * kNR, tile.s, kLds,
               false);
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
