// Stores of keys: where rows of K and V lie, and what has to happen to a tile of them between its
// landing in shared memory and the products. The loop of tile/attend.h is written over one:
//
//   kStageBytes     of shared memory per key tile in flight
//   kWorkBytes      per team beside the stages: for what landed in another form than it multiplies
//   load            starts the copies of a tile; a thread copies the same chunks in every tile
//   settle          looks at this thread's own part of a tile that has landed for this thread
//   k_tile, v_tile  what multiplies, once the team has met
//   key_at          the key at a place of the range that is walked: the place itself, but for lists
//   columns         the keys of a tile that has landed, as key_of of tile/scores.h takes them
//   add_wild        the cold path of hidden.h for one key
//   RowState        what a store of codes keeps of the rows (tile/pages.h)
//
// TensorKeys is a tensor in one piece; PageKeys (tile/pages.h) a page table; ListedKeys
// (tile/listed.h) the blocks of a list.
#pragma once

#include "cuda/tile/hidden.h"
#include "cuda/tile/scores.h"

namespace attnforge::cuda {

template <class T_, int kBlockN, int kDim, int kValueDim>
struct TensorKeys {
  using T = T_;
  using KTile = SharedTile<T, kBlockN, kDim>;
  using VTile = SharedTile<T, kBlockN, kValueDim>;
  static constexpr bool kPages = false, kCodes = false, kShared = false;
  static constexpr int kStageBytes = KTile::kBytes + VTile::kBytes, kWorkBytes = 0;

  template <int kM>
  struct RowState {};

  const T *k, *v;  // first key of the KV head
  int64_t k_stride, v_stride;
  int k_dim, v_dim;

  AF_DEVICE static KTile k_tile(uint32_t stage, uint32_t) { return {stage}; }
  AF_DEVICE static VTile v_tile(uint32_t stage, uint32_t) { return {stage + KTile::kBytes}; }

  AF_DEVICE static int key_at(int place) { return place; }
  AF_DEVICE static int columns(uint32_t, int first) { return first; }

  // Keys first .. first + rows - 1; the rest of the tile becomes zeros and is not read.
  template <class Team>
  AF_DEVICE void load(uint32_t stage, int first, int rows) const {
    load_rows<Team>(k_tile(stage, 0), k + first * k_stride, k_stride, rows, k_dim);
    load_rows<Team>(v_tile(stage, 0), v + first * v_stride, v_stride, rows, v_dim);
  }
  // Whether V held anything that is not finite; looked for where the tile is not seen whole.
  template <class Team>
  AF_DEVICE bool settle(uint32_t stage, uint32_t, bool whole) const {
    return whole ? false : tame<Team>(v_tile(stage, 0));
  }
  template <int kM, int kD, class Seen>
  AF_DEVICE void add_wild(Accumulators<kM, kD>& out, int key, int first_column,
                          const Seen& seen) const {
    const T* row = v + key * v_stride;
    add_wild_of<kM, kD>(
        out, [&](int c) { return c < v_dim ? widen(row[c]) : 0.0f; }, first_column, seen);
  }
};

}  // namespace attnforge::cuda
