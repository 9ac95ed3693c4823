// The rows of a tile: which query and head each one is, and what of that a thread keeps.
//
// `pack` heads of a KV head's group share a tile, position by position: row r is query r / pack of
// head first_head + r % pack. One row per query has pack 1. Rows do not meet in any sum, so packing
// changes no bit of a result.
#pragma once

#include "cuda/tile/element.h"
#include "cuda/tile/sequence.h"
#include "cuda/tile/team.h"

namespace attnforge::cuda {

struct RowTile {
  int first;  // row of the tile's first one among the sequence's q_len * pack
  int rows;   // where they end there: q_len * pack, or earlier where the tile does
  int pack, first_head;

  AF_DEVICE int query(int r) const { return (first + r) / pack; }
  AF_DEVICE int head(int r) const { return first_head + (first + r) % pack; }
  AF_DEVICE bool exists(int r) const { return first + r < rows; }
  AF_DEVICE int first_query() const { return first / pack; }
  AF_DEVICE int last_query(int size) const { return (at_most(first + size, rows) - 1) / pack; }
};

// Row of the tile that this thread holds as half h (0: g, 1: g + 8) of fragment m.
AF_DEVICE int fragment_row(int warp_row, int m, int h) {
  return warp_row + 16 * m + 8 * h + static_cast<int>(ptx::lane_id()) / 4;
}
// Column of element i of fragment n.
AF_DEVICE int fragment_column(int n, int i) {
  return 8 * n + 2 * (static_cast<int>(ptx::lane_id()) % 4) + i % 2;
}

// Per row of this thread: its place among the keys, and its ALiBi slope in base 2.
template <int kM>
struct RowPlaces {
  int at[kM][2];
  float slope2[kM][2];

  AF_DEVICE static RowPlaces of(const FlashProblem& p, const Sequence& s, const RowTile& tile,
                                int warp_row) {
    RowPlaces places;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = fragment_row(warp_row, m, h);
        places.at[m][h] = tile.query(r) + s.offset();
        places.slope2[m][h] =
            p.alibi_slopes == nullptr
                ? 0.0f
                : p.alibi_slopes[s.batch * p.alibi_batch_stride + tile.head(r)] * kLog2E;
      }
    }
    return places;
  }
};

}  // namespace attnforge::cuda
