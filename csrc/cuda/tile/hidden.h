// NaN and infinities behind a mask. A hidden pair has weight 0, but 0 * NaN is NaN, so where a tile
// is partly hidden its right operand may hold finite numbers only:
//
//   tame      sets what is not finite in a tile to 0 and says whether there was anything
//   add_wild  adds it back, in registers after the loop, where it is seen
//
// Whole tiles multiply as they are. add_wild is cold: it runs where tame found something.
#pragma once

#include "cuda/tile/product.h"
#include "cuda/tile/rows.h"

namespace attnforge::cuda {

template <class T>
AF_DEVICE bool tame_chunk(ptx::U32x4& chunk) {
  bool wild = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      const bool bad = !finite(ptx::float_from_bits(chunk.v[i]));
      wild |= bad;
      chunk.v[i] = bad ? 0u : chunk.v[i];
    } else if constexpr (sizeof(T) == 1) {  // e4m3 has NaN alone: all bits but the sign
      const uint32_t bad = ((chunk.v[i] & 0x7f7f7f7fu) + 0x01010101u) >> 7 & 0x01010101u;
      wild |= bad != 0;
      chunk.v[i] &= ~(bad * 0xffu);
    } else {
      constexpr uint32_t kExponent = kSame<T, Half> ? 0x7c00u : 0x7f80u;
      const bool low = (chunk.v[i] & kExponent) == kExponent;
      const bool high = (chunk.v[i] >> 16 & kExponent) == kExponent;
      wild |= low || high;
      chunk.v[i] &= (low ? 0xffff0000u : 0xffffffffu) & (high ? 0x0000ffffu : 0xffffffffu);
    }
  }
  return wild;
}

// Of this thread's own chunks of a tile that has landed for this thread (its wait is done, the
// barrier that shows the tile to others is not). Rows where counts(row) is false say nothing:
// whatever they hold becomes finite.
template <class Team, class Tile, class Counts>
AF_DEVICE bool tame(const Tile& tile, const Counts& counts AF_SITE) {
  using S = Share<Team, Tile>;
  constexpr bool kRoom = Tile::kChunks * Tile::kPerChunk > Tile::kDim;  // of a last panel
  bool wild = false;
#pragma unroll 1
  for (int i = 0; i < S::kPasses * S::kSegments; ++i) {
    const int row = S::own_row() + i / S::kSegments * S::kPass;
    const int c = i % S::kSegments * S::kPeriod + S::own_chunk();
    if (!S::inside(row) || (kRoom && c * Tile::kPerChunk >= Tile::kDim)) continue;
    const uint32_t address = tile.chunk(row, c);
    auto chunk = ptx::load_shared<ptx::U32x4>(address AF_PASS_SITE);
    if (tame_chunk<typename Tile::Element>(chunk)) {
      ptx::store_shared(address, chunk AF_PASS_SITE);
      wild |= counts(row);
    }
  }
  return wild;
}
template <class Team, class Tile>
AF_DEVICE bool tame(const Tile& tile AF_SITE) {
  return tame<Team>(tile, [](int) { return true; } AF_PASS_SITE);
}

// acc[m][d] + what is not finite of one row of the other operand, x(column), for the rows of acc
// that see it: seen(m, h). The first column of acc is first_column. Without branches, as registers
// cannot be indexed and code would be long.
template <int kM, int kD, class X, class Seen>
AF_DEVICE void add_wild_of(Accumulators<kM, kD>& acc, const X& x, int first_column,
                           const Seen& seen) {
#pragma unroll
  for (int d = 0; d < kD; ++d) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float value = x(first_column + fragment_column(d, i));
      const float wild = finite(value) ? 0.0f : value;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) acc[m][d][2 * h + i] += seen(m, h) ? wild : 0.0f;
      }
    }
  }
}

// The same of a row x [dim] in memory.
template <class T, int kM, int kD, class Seen>
AF_DEVICE void add_wild(Accumulators<kM, kD>& acc, const T* x, int dim, const Seen& seen) {
  add_wild_of<kM, kD>(acc, [&](int c) { return c < dim ? widen(x[c]) : 0.0f; }, 0, seen);
}

// The same for V of all keys in the partly hidden of some tiles, whose first keys are first_key(j).
template <class T, int kM, int kD, class FirstKey>
AF_DEVICE void add_hidden(Accumulators<kM, kD>& acc, const TileRange& range, int tiles,
                          const FirstKey& first_key, int block, const T* v, int64_t stride, int dim,
                          const RowPlaces<kM>& places, int keys, Window window) {
  for (int j = 0; j < tiles; ++j) {
    const int first = first_key(j);
    if (range.whole(first, block)) continue;
    for (int key = first; key < at_most(first + block, range.hi); ++key) {
      const auto seen = [&](int m, int h) { return sees(places.at[m][h], key, keys, window); };
      add_wild<T, kM, kD>(acc, v + key * stride, dim, seen);
    }
  }
}

}  // namespace attnforge::cuda
