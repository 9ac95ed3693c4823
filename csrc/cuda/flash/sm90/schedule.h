// The order of work of persistent blocks: longest first, in sections that share the L2 cache.
//
// Work is a tile of rows of one head (or of a KV head's group, where rows are packed) of one
// sequence. A tile has whole queries of its heads: where their number does not divide it, its last
// rows stay empty. (head, sequence) pairs form sections whose K and V fit L2 together; inside a
// section late tiles, which see most keys under a causal mask, come first over all its pairs.
// Blocks take turns along this order, back and forth, so that none always gets the longest: no
// counter in memory, the same assignment every time.
#pragma once

#include <algorithm>

#include "cuda/flash/schedule.h"

namespace attnforge::cuda {

struct Sm90Schedule {
  RowGrid grid;
  int rows;            // of a tile
  int pairs, section;  // heads * batch, and how many of them make a section
  int work;            // pieces

  static Sm90Schedule of(const FlashProblem& p, int block_m, int pack) {
    // Half of an H100's 50 MiB of L2: the other half is for Q and O, and for who comes next.
    constexpr int64_t kL2Bytes = int64_t{25} << 20;
    const int rows = block_m / pack * pack;
    const RowGrid grid = RowGrid::of(p, rows, pack, 1);
    const int pairs = grid.heads * grid.batch;
    const int64_t sharing = p.heads_q / p.heads_k / pack;  // pairs of one K and V
    const int64_t bytes = 2 * (p.head_dim + p.v_head_dim) * std::max<int64_t>(p.seqlen_k, 1);
    const int64_t section = std::max<int64_t>(1, kL2Bytes / bytes) * sharing;
    const int width = static_cast<int>(std::min<int64_t>(section, pairs));
    return {grid, rows, pairs, width, pairs * grid.tiles};
  }
  unsigned blocks(int most) const { return static_cast<unsigned>(std::min(work, most)); }

  // f(work) for each piece with rows of this block. Every role of a block walks the same list.
  template <class F>
  AF_DEVICE void each(const FlashProblem& p, int block_n, const F& f) const {
    const int me = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
#pragma unroll 1
    for (int round = 0; round * blocks < work; ++round) {
      const int n = round * blocks + (round % 2 == 0 ? me : blocks - 1 - me);
      if (n >= work) continue;
      const int first = n / (section * grid.tiles) * section;  // pair of the section
      const int width = at_most(section, pairs - first), place = n - first * grid.tiles;
      const int tile = grid.tiles - 1 - place / width, pair = first + place % width;
      RowWork w = row_work(p, grid, SplitParams{}, 0, tile, pair % grid.heads, pair / grid.heads,
                           rows, block_n);
      w.rows.rows = at_most(w.rows.rows, w.rows.first + rows);
      if (w.some) f(w);
    }
  }
};

}  // namespace attnforge::cuda
