// The tiles of the block-sparse kernels: those of flash with features, for the head dims that the
// methods over lists have (calls are padded to them). Nothing here was tuned on a GPU.
#pragma once

#include "cuda/flash/tiles.h"

namespace attnforge::cuda {

constexpr HeadDims kListedDims[] = {{64, 64}, {128, 128}, {192, 128}, {256, 256}};
constexpr int kNumListedDims = 4;

// Index of the first pair that has room, or -1.
constexpr int listed_dims_of(int64_t qk, int64_t v) {
  for (int i = 0; i < kNumListedDims; ++i) {
    if (qk <= kListedDims[i].qk && v <= kListedDims[i].v) return i;
  }
  return -1;
}

// kFew: up to 16 rows share a list (one query with the heads of its group), kMany: more.
enum class ListRows { kFew, kMany };

constexpr FwdTile listed_fwd_tile(DType dtype, HeadDims d, ListRows rows) {
  FwdTile t = rows == ListRows::kFew ? decode_tile(dtype, d) : fwd_tile(dtype, d, true);
  // 64 rows, what a list row of the usual methods has: with two fragments per warp half of the rows
  // of a tile would be padding.
  t.m_tiles = 1;
  t.store = StoreKind::kListed;
  return t;
}

// Rows are owned by one warp where 16 share a list, by four where there are more; keys by four
// always, so that blocks of fewer than 64 keys are padded to that.
constexpr BwdTile listed_bwd_tile(DType dtype, HeadDims d, ListRows rows, Gradient gradient) {
  BwdTile t = bwd_tile(dtype, d, true, gradient);
  if (rows == ListRows::kFew) t.warps = 1;
  if (t.streamed > 32) t.streamed = 32;  // streamed rows have an address each
  return t;
}

}  // namespace attnforge::cuda
