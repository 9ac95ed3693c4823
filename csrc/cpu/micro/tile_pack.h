// Packing of K and V for tile_gemm.h: bf16 stays bf16, two to a dword.
//
//   key panels     B = K^T: [keys / 32][channels / 32][two tiles of 16 keys]
//   column panels  B = V:   [columns / 32][keys / 32][two tiles of 16 columns]
// Channels, columns and keys are padded with zeros to whole tiles.
#pragma once

#include "cpu/micro/pack.h"
#include "cpu/micro/tile_gemm.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

AF_INLINE int64_t tile_depth(int64_t channels) {
  return round_up(channels, kTileDepth);
}

// Up to kTileDepth elements, the rest zero.
AF_INLINE VecU load_pairs(const BFloat16* p, int64_t n) {
  if (n >= kTileDepth) return load_raw<VecU>(p);
  BFloat16 lanes[kTileDepth] = {};
  __builtin_memcpy(lanes, p, n * sizeof(BFloat16));
  return load_raw<VecU>(lanes);
}

AF_INLINE void transpose_pairs(VecU (&r)[kLanes]) {
#if defined(__AVX512F__)
  transpose_keys(r);
#else
  VecU turned[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) turned[i][j] = r[j][i];
  }
  for (int i = 0; i < kLanes; ++i) r[i] = turned[i];
#endif
}

// Up to kNR of `keys` keys into one key panel; row(j) is key j.
template <class Row>
AF_INLINE void pack_key_tiles(const Row& row, int64_t keys, int64_t dim, BFloat16* panel) {
  for (int64_t j = 0; j < kNR; j += kTileRows, panel += kTileSize) {
    for (int64_t i = j + kRowsAhead; i < min64(j + kRowsAhead + kTileRows, keys); ++i) {
      prefetch_row(row(i), dim);
    }
    BFloat16* tile = panel;
    for (int64_t d = 0; d < dim; d += kTileDepth, tile += 2 * kTileSize) {
      VecU r[kLanes];
      for (int64_t i = 0; i < kTileRows; ++i) {
        r[i] = j + i < keys ? load_pairs(row(j + i) + d, dim - d) : VecU{};
      }
      transpose_pairs(r);
      for (int64_t i = 0; i < kTileRows; ++i) store_raw(tile + i * kTileDepth, r[i]);
    }
  }
}

// Rows into column panels, panel_stride elements apart. Returns true if every element was finite.
template <class Row>
AF_INLINE bool pack_value_tiles(const Row& row, int64_t rows, int64_t dim, BFloat16* panels,
                                int64_t panel_stride) {
  VecF poison{};
  for (int64_t j = 0; j < round_up(rows, kTileDepth); j += 2) {
    for (int64_t i = j; i < min64(j + 2, rows - kRowsAhead); ++i) {
      prefetch_row(row(i + kRowsAhead), dim);
    }
    for (int64_t d = 0; d < dim; d += kLanes) {
      VecU pair{};
      for (int64_t i = 0; i < min64(2, rows - j); ++i) {
        const VecF x = load_partial(row(j + i) + d, dim - d);
        poison += x * splat(0.0f);  // NaN as soon as one element is NaN or infinite
        pair |= i == 0 ? float_to_bits(x) >> 16 : float_to_bits(x);
      }
      BFloat16* tile = panels + d / kNR * panel_stride + j / kTileDepth * 2 * kTileSize +
                       d % kNR / kLanes * kTileSize;
      store_raw(tile + j % kTileDepth / 2 * kTileDepth, pair);
    }
    // Of a panel half in use the other half is never multiplied.
  }
  return reduce_add(poison) == 0.0f;
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
