// Which block does which rows, heads and keys: one function for every kernel that owns query rows,
// so that a grid and the blocks in it cannot disagree.
#pragma once

#include "cuda/flash/launch.h"
#include "cuda/tile/scores.h"

namespace attnforge::cuda {

constexpr int64_t kAnyRows = 0x7fffffff;

// Blocks over splits of keys, row tiles, heads (or KV heads, if rows are packed) and sequences.
struct RowGrid {
  int splits, tiles, heads, batch;
  int pack;
  int above, most;  // sequences of so many rows per KV head are served: (above, most]
  ScoreMap map;

  static RowGrid of(const FlashProblem& p, int block_m, int pack, int64_t splits, int64_t above = 0,
                    int64_t most = kAnyRows) {
    const int64_t group = p.heads_q / p.heads_k;
    const int64_t rows = p.seqlen_q * group > most ? most / group : p.seqlen_q;
    const int64_t tiles = (rows * pack + block_m - 1) / block_m;
    return {static_cast<int>(splits),
            static_cast<int>(tiles),
            static_cast<int>(p.heads_q / pack),
            static_cast<int>(p.batch),
            pack,
            static_cast<int>(above),
            static_cast<int>(most),
            ScoreMap::of(p)};
  }
  unsigned blocks() const { return static_cast<unsigned>(int64_t{splits} * tiles * heads * batch); }
};

struct RowWork {
  bool some;  // false: the sequence has no such rows
  int split, kv_head;
  Sequence seq;
  RowTile rows;
  TileRange keys;

  // Where row r of the tile has its LSE: of the call, or of this split.
  AF_DEVICE float* lse(const FlashFwdParams& params, const SplitParams& splits, int r) const {
    const int query = rows.query(r), head = rows.head(r);
    if (splits.lse.data == nullptr) return stat_ptr(params.lse, seq.batch, seq.q_row + query, head);
    return stat_ptr(splits.lse, seq.batch, part_row(splits, r), head) + split * splits.lse_stride;
  }
  // Where row r has its part of the output, if keys are split; null if it does not exist.
  AF_DEVICE float* part(const SplitParams& splits, int r) const {
    if (!rows.exists(r) || nothing()) return nullptr;
    return row_ptr<float>(splits.out, seq.batch, part_row(splits, r), rows.head(r)) +
           split * splits.out_stride;
  }
  AF_DEVICE int64_t part_row(const SplitParams& splits, int r) const {
    return (splits.by_sequence ? 0 : seq.q_row) + rows.query(r);
  }
  // A split behind the end of its sequence: its LSE says so, and nobody reads its output.
  AF_DEVICE bool nothing() const { return split > 0 && keys.lo >= keys.hi; }
};

// One (split, tile, head, sequence) of a grid, with all keys that its rows see.
AF_DEVICE RowWork whole_work(const FlashProblem& p, const RowGrid& grid, int split, int tile,
                             int head, int batch, int block_m, int block_n) {
  RowWork w;
  w.split = split;
  const int group = static_cast<int>(p.heads_q / p.heads_k);
  w.kv_head = head * grid.pack / group;
  w.seq = sequence(p, batch, w.kv_head);
  w.rows = {tile * block_m, w.seq.q_len * grid.pack, grid.pack, head * grid.pack};
  const int64_t served = int64_t{w.seq.q_len} * group;
  w.some = w.rows.first < w.rows.rows && served > grid.above && served <= grid.most;
  w.keys = seen_range(w.rows.first_query(), w.rows.last_query(block_m), w.seq.k_len, w.seq.offset(),
                      grid.map.keys, block_n);
  return w;
}

// The keys of a split among those of a tile.
AF_DEVICE TileRange split_range(const RowWork& w, const RowGrid& grid, const SplitParams& splits,
                                int block_n) {
  if (grid.splits == 1) return w.keys;
  const int equal = ceil_div(ceil_div(w.seq.k_len, grid.splits), block_n) * block_n;
  const int size = splits.keys > 0 ? static_cast<int>(splits.keys) : equal;
  return w.keys.within(w.split * size, w.split * size + size);
}

// One (split, tile, head, sequence) of a grid.
AF_DEVICE RowWork row_work(const FlashProblem& p, const RowGrid& grid, const SplitParams& splits,
                           int split, int tile, int head, int batch, int block_m, int block_n) {
  RowWork w = whole_work(p, grid, split, tile, head, batch, block_m, block_n);
  w.keys = split_range(w, grid, splits, block_n);
  return w;
}

// Which one a block has, where a grid has one for each.
struct BlockPlace {
  int split, tile, head, batch;

  AF_DEVICE static BlockPlace of(const RowGrid& grid) {
    int id = static_cast<int>(blockIdx.x);
    const int split = id % grid.splits;
    id /= grid.splits;
    const int tile = grid.tiles - 1 - id % grid.tiles;
    id /= grid.tiles;
    return {split, tile, id % grid.heads, id / grid.heads};
  }
};

AF_DEVICE RowWork row_work(const FlashProblem& p, const RowGrid& grid, const SplitParams& splits,
                           int block_m, int block_n) {
  const BlockPlace at = BlockPlace::of(grid);
  return row_work(p, grid, splits, at.split, at.tile, at.head, at.batch, block_m, block_n);
}

}  // namespace attnforge::cuda
