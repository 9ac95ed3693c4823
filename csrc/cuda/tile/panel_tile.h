// Tiles of 16-bit or e4m3 rows in shared memory as TMA leaves them and wgmma reads them: [kRows,
// kDim] in panels of 64 (e4m3: 128) columns, row after row of 128 bytes, with the 128-byte swizzle.
// A panel of a multiple of 8 rows is a multiple of the swizzle's period, and `base` is one too
// (1024 bytes).
//
// A tile is either operand of a product as it lies: rows with contiguous k (Q and K of Q K^T), or
// rows that are k themselves (V of P V; 16 bits only). Columns past the true head dim are out of
// the tensor's bounds, so they are zeros.
#pragma once

#include "cuda/ptx/memory.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"
#include "cuda/tile/element.h"

namespace attnforge::cuda {

template <class T, int kRows_, int kDim_>
struct PanelTile {
  using Element = T;
  static constexpr int kRows = kRows_, kDim = kDim_;
  static constexpr int kSize = static_cast<int>(sizeof(T)), kPanelColumns = 128 / kSize;
  static constexpr int kPanels = (kDim + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPerChunk = 16 / kSize, kPeriod = 8;
  static constexpr int kSteps = kDim * kSize / 32;   // products along a row
  static constexpr int kChunks = kPanels * kPeriod;  // of a row
  static constexpr int kRowBytes = kPanels * 128;
  static constexpr int kPanelBytes = kRows * 128, kBytes = kPanels * kPanelBytes;
  static_assert(kSize <= 2 && kDim * kSize % 32 == 0 && kRows % 8 == 0);

  uint32_t base;

  AF_DEVICE uint32_t chunk(int row, int c) const {
    return base + static_cast<uint32_t>(c / kPeriod * kPanelBytes + row * 128 +
                                        ((c % kPeriod) ^ (row & 7)) * 16);
  }

  // From chunk `home` to the one so many rows and chunks on, multiples of 8.
  AF_DEVICE static uint32_t from(uint32_t home, int rows, int chunks) {
    return home + static_cast<uint32_t>(rows * 128 + chunks / kPeriod * kPanelBytes);
  }

  // Descriptors. Rows from `row` on, a multiple of 8, with k along them: their first 32 bytes.
  AF_DEVICE uint64_t along_rows(int row) const {
    return ptx::wgmma_descriptor(base + static_cast<uint32_t>(row * 128), 16, 1024,
                                 ptx::MatrixSwizzle::k128);
  }
  // From there to the bytes 32 step.. of a row, in the descriptor's units.
  AF_DEVICE static constexpr uint64_t columns_on(int step) {
    return static_cast<uint64_t>(step / 4 * kPanelBytes + step % 4 * 32) / 16;
  }
  // All columns, with k across the rows: rows 0..15.
  AF_DEVICE uint64_t across_rows() const {
    return ptx::wgmma_descriptor(base, kPanelBytes, 1024, ptx::MatrixSwizzle::k128);
  }
  // From there to rows 16 step...
  AF_DEVICE static constexpr uint64_t rows_on(int step) {
    return static_cast<uint64_t>(step * 16 * 128) / 16;
  }
};

// Zeros in the rows of a tile from `first` on, by threads `rank` of `threads`; then
// ptx::fence_proxy_async and a barrier.
template <class Tile>
AF_DEVICE void clear_rows(const Tile& tile, int first, int rank, int threads AF_SITE) {
  for (int n = first * Tile::kChunks + rank; n < Tile::kRows * Tile::kChunks; n += threads) {
    ptx::store_shared(tile.chunk(n / Tile::kChunks, n % Tile::kChunks), ptx::U32x4 {} AF_PASS_SITE);
  }
}

// Starts the copy of a tile by one thread: a box of one panel's columns each, at (y, z, w) of the
// tensor's outer dimensions. 128 bytes of each of the box's rows and panels land on the barrier,
// kBytes if it has kRows.
template <class Tile>
AF_DEVICE void load_panels(const Tile& tile, const TensorMap& map, uint32_t barrier, int y, int z,
                           int w AF_SITE) {
  // Long rows in a loop: addresses of nine boxes at once would spill from a producer's registers.
#pragma unroll(Tile::kPanels <= 4 ? Tile::kPanels : 1)
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    ptx::tma_load_4d(tile.base + static_cast<uint32_t>(panel * Tile::kPanelBytes), &map, barrier,
                     Tile::kPanelColumns * panel, y, z, w AF_PASS_SITE);
  }
}

}  // namespace attnforge::cuda
