// Tiles of rows in shared memory: [kRows, kDim] elements, row after row, in chunks of 16 bytes.
//
// Swizzle: chunk c of row r lies at c ^ mask(r), so that the eight rows an ldmatrix reads at one
// chunk, 16 bytes each, fall into eight different groups of four banks. Rows whose length is a
// multiple of 128 bytes take r mod 8; rows of an odd multiple of 64 bytes already alternate between
// halves and take (r / 2) mod 4; those of an odd multiple of 32 bytes go through four places of two
// groups and take (r / 4) mod 2.
//
// Loads are cp.async: rows that do not exist and columns past the true head dim become zeros and
// are not read. A thread's chunks are always the same ones, so after its own wait it may look at
// them before anybody else can.
#pragma once

#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/memory.h"
#include "cuda/tile/element.h"

namespace attnforge::cuda {

template <class T, int kRows_, int kDim_>
struct SharedTile {
  using Element = T;
  static constexpr int kRows = kRows_, kDim = kDim_;
  static constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kChunks = kDim / kPerChunk;  // of a row
  static constexpr int kBytes = kRows * kChunks * 16;
  static_assert(kChunks % 2 == 0, "no swizzle for this row length");

  static constexpr int kRowBytes = kChunks * 16;
  // Chunks that change places.
  static constexpr int kPeriod = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;

  uint32_t base;

  AF_DEVICE static int swizzle(int row) {
    return kPeriod == 8 ? row & 7 : kPeriod == 4 ? row >> 1 & 3 : row >> 2 & 1;
  }
  AF_DEVICE uint32_t chunk(int row, int c) const {
    return base + static_cast<uint32_t>(row * kRowBytes + (c ^ swizzle(row)) * 16);
  }
  AF_DEVICE uint32_t element(int row, int column) const {
    return chunk(row, column / kPerChunk) +
           static_cast<uint32_t>(column % kPerChunk) * static_cast<uint32_t>(sizeof(T));
  }
  // The address of (row + down, c + first) from that of (row, first), for first 0 or 1, even c and
  // a down that is a multiple of 8: one exclusive or, the rest is an immediate offset.
  AF_DEVICE static uint32_t from(uint32_t row_chunk, int down, int c) {
    return (row_chunk ^ static_cast<uint32_t>(c % kPeriod * 16)) +
           static_cast<uint32_t>(c / kPeriod * kPeriod * 16 + down * kRowBytes);
  }
};

// This thread's share of a tile: one chunk column of every segment of kPeriod chunks, in rows that
// are kPass apart. f(row, segment); the chunk is segment * kPeriod + own_chunk().
template <class Team, class Tile>
struct Share {
  static constexpr int kPeriod = Tile::kPeriod, kPass = Team::kThreads / kPeriod;
  static constexpr int kSegments = Tile::kChunks / kPeriod;
  static constexpr int kPasses = (Tile::kRows + kPass - 1) / kPass;
  AF_DEVICE static int own_chunk() { return Team::rank() % kPeriod; }
  AF_DEVICE static int own_row() { return Team::rank() / kPeriod; }
  // Where this thread's chunk of pass i and segment s lies; all from one address where swizzles
  // agree.
  AF_DEVICE static uint32_t place(const Tile& tile, int i, int s) {
    if constexpr (kPass % 8 == 0) {
      return Tile::from(tile.chunk(own_row(), own_chunk()), i * kPass, s * kPeriod);
    } else {
      return tile.chunk(own_row() + i * kPass, s * kPeriod + own_chunk());
    }
  }
  AF_DEVICE static bool inside(int row) { return Tile::kRows % kPass == 0 || row < Tile::kRows; }
};

// Starts the copy of a tile whose rows row_at(row) points at, null for a row that does not exist.
// dim: elements of a row that exist, a multiple of 8. Rows are 16-byte aligned.
template <class Team, class Tile, class F>
AF_DEVICE void load_tile(const Tile& tile, int dim, const F& row_at AF_SITE) {
  using S = Share<Team, Tile>;
  using T = typename Tile::Element;
#pragma unroll
  for (int i = 0; i < S::kPasses; ++i) {
    const int row = S::own_row() + i * S::kPass;
    if (!S::inside(row)) continue;
    const T* from = row_at(row);
#pragma unroll
    for (int s = 0; s < S::kSegments; ++s) {
      const int c = s * S::kPeriod + S::own_chunk();
      const bool real = from != nullptr && c * Tile::kPerChunk < dim;
      ptx::cp_async_16(S::place(tile, i, s), from + c * Tile::kPerChunk,
                       real ? 16u : 0u AF_PASS_SITE);
    }
  }
}

// The same for rows that lie `stride` elements apart from `first` on, `rows` of which exist.
template <class Team, class Tile>
AF_DEVICE void load_rows(const Tile& tile, const typename Tile::Element* first, int64_t stride,
                         int rows, int dim AF_SITE) {
  using S = Share<Team, Tile>;
  const typename Tile::Element* from =
      first + S::own_row() * stride + S::own_chunk() * Tile::kPerChunk;
#pragma unroll
  for (int i = 0; i < S::kPasses; ++i) {
    const int row = S::own_row() + i * S::kPass;
    if (S::inside(row)) {
#pragma unroll
      for (int s = 0; s < S::kSegments; ++s) {
        const int c = s * S::kPeriod + S::own_chunk();
        const bool real = row < rows && c * Tile::kPerChunk < dim;
        ptx::cp_async_16(S::place(tile, i, s), from + s * S::kPeriod * Tile::kPerChunk,
                         real ? 16u : 0u AF_PASS_SITE);
      }
    }
    from += S::kPass * stride;
  }
}

}  // namespace attnforge::cuda
