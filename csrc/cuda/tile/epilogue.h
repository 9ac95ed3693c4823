// From accumulators to memory: rows of a warp, rounded, in 16-byte stores.
//
// 16-bit rows pass through the warp's own rows of a tile in shared memory that nobody reads any
// more (the queries'), so that stores are whole chunks of a row; fp32 rows leave as pairs, 32 bytes
// of a row at a time, which is a whole sector as it is.
#pragma once

#include "cuda/tile/product.h"
#include "cuda/tile/rows.h"

namespace attnforge::cuda {

struct alignas(8) FloatPair {
  float x, y;
};

// fp32 rows, straight from registers. value(m, d, i): element i of fragment d of rows m. row_at(r):
// where row r of the tile goes, or null. first: fragment of the row that value begins at.
template <int kM, int kD, class Value, class RowAt>
AF_DEVICE void store_pairs(int warp_row, int dim, const Value& value, const RowAt& row_at,
                           int first = 0) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* to = row_at(fragment_row(warp_row, m, h));
      if (to == nullptr) continue;
#pragma unroll
      for (int d = 0; d < kD; ++d) {
        const int column = fragment_column(first + d, 0);
        if (column < dim) {
          *reinterpret_cast<FloatPair*>(to + column) = {value(m, d, 2 * h), value(m, d, 2 * h + 1)};
        }
      }
    }
  }
}

// The same for either size of elements. tile: rows warp_row.. of it belong to this warp, from chunk
// `first` on.
template <int kM, int kD, class Tile, class Value, class RowAt>
AF_DEVICE void store_rows(const Tile& tile, int warp_row, int dim, const Value& value,
                          const RowAt& row_at, int first = 0 AF_SITE) {
  using T = typename Tile::Element;
  if constexpr (sizeof(T) == 4) {
    store_pairs<kM, kD>(warp_row, dim, value, row_at, first);
  } else {
    const int lane = static_cast<int>(ptx::lane_id());
    ptx::sync_warp(ptx::kFullWarp AF_PASS_SITE);  // of reads of the tile
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int d = 0; d < kD; ++d) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t pair = pack<T>(value(m, d, 2 * h), value(m, d, 2 * h + 1));
          const int row = fragment_row(warp_row, m, h);
          ptx::store_shared(tile.chunk(row, first + d) + 4 * (lane % 4), pair AF_PASS_SITE);
        }
      }
    }
    ptx::sync_warp(ptx::kFullWarp AF_PASS_SITE);
    for (int n = lane; n < 16 * kM * kD; n += 32) {
      const int row = warp_row + n / kD, c = first + n % kD;
      T* to = row_at(row);
      if (to == nullptr || 8 * c >= dim) continue;
      const auto chunk = ptx::load_shared<ptx::U32x4>(tile.chunk(row, c) AF_PASS_SITE);
      ptx::store_global_16(to + 8 * c, chunk);
    }
  }
}

// What rounding to T drops: the second 16-bit part of a result.
template <class T>
AF_DEVICE float residue(float x) {
  return x - widen(narrow<T>(x));
}

}  // namespace attnforge::cuda
