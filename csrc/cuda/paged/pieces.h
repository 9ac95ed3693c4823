// Keys in planned pieces (attnforge/pieces.h) in place of splits of one length: a block has one
// piece of whatever sequence the plan says, so that a grid has as many as the plan has room for and
// a captured one follows the plan's numbers. Those are data: a piece of no sequence is left alone,
// and ends are clamped.
//
// Ends inside a key tile move to its start, the same for the piece that ends and the one that
// begins there. Partial states lie by piece. Sinks are added where pieces are, once per row, so
// that a sequence without a piece has them too.
#pragma once

#include "cuda/flash/schedule.h"

#include "attnforge/pieces.h"

namespace attnforge::cuda {

// Where a piece ends among the keys of a sequence.
AF_DEVICE int piece_end(int at, int keys, int block_n) {
  return at >= keys ? keys : at_least(at, 0) / block_n * block_n;
}

// The row tile and head of this block, with the keys of its piece or split.
AF_DEVICE RowWork piece_work(const FlashProblem& p, const RowGrid& grid, const SplitParams& splits,
                             const Pieces& pieces, int block_m, int block_n) {
  const BlockPlace at = BlockPlace::of(grid);
  const bool planned = pieces.first != nullptr;
  const int owner = planned ? pieces.sequence[at.split] : at.batch;
  const bool owned = owner >= 0 && owner < p.batch;
  RowWork w = whole_work(p, grid, at.split, at.tile, at.head, owned ? owner : 0, block_m, block_n);
  w.some = w.some && owned;  // no return before: it would cost registers in the loop
  if (planned) {
    w.keys = w.keys.within(piece_end(pieces.begin[at.split], w.seq.k_len, block_n),
                           piece_end(pieces.end[at.split], w.seq.k_len, block_n));
  } else {
    w.keys = split_range(w, grid, splits, block_n);
  }
  return w;
}

// The states of a sequence that are added up: parts first .. first + count - 1.
struct PartRange {
  int64_t first, count;

  AF_DEVICE static PartRange of(const Pieces& pieces, int batch, int64_t splits) {
    if (pieces.first == nullptr) return {0, splits};
    const int64_t from = at_least<int64_t>(0, at_most<int64_t>(pieces.first[batch], splits));
    const int64_t to = at_most<int64_t>(pieces.first[batch + 1], splits);
    return {from, at_least<int64_t>(0, to - from)};
  }
};

}  // namespace attnforge::cuda
