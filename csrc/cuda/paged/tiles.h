// The tiles of the paged kernels: those of flash with features, for fewer head dims (calls are
// padded to them), once for pages of the call's dtype and once for pages of codes; and the kernel
// of latent attention. Nothing here was tuned on a GPU.
#pragma once

#include "cuda/flash/tiles.h"

namespace attnforge::cuda {

constexpr HeadDims kPagedDims[] = {{64, 64}, {128, 128}, {256, 256}};
constexpr int kNumPagedDims = 3;
constexpr HeadDims kLatentDims = {576, 512};

// Index of the first pair that has room, or -1.
constexpr int paged_dims_of(int64_t qk, int64_t v) {
  for (int i = 0; i < kNumPagedDims; ++i) {
    if (qk <= kPagedDims[i].qk && v <= kPagedDims[i].v) return i;
  }
  return -1;
}

constexpr FwdTile paged_prefill_tile(DType dtype, HeadDims d, bool codes) {
  FwdTile t = fwd_tile(dtype, d, true);
  t.store = codes ? StoreKind::kCodes : StoreKind::kPages;
  return t;
}

constexpr FwdTile paged_decode_tile(DType dtype, HeadDims d, bool codes) {
  FwdTile t = decode_tile(dtype, d);
  t.store = codes ? StoreKind::kCodes : StoreKind::kPages;
  return t;
}

// 16 rows: O of 512 channels is 128 per warp, and K of a stage is 36 KiB, so that Q, two stages and
// the parts of the scores just fit. Codes take a decoded tile beside the stages: shorter ones.
constexpr FwdTile latent_tile(DType dtype, bool codes) {
  return {dtype,
          kLatentDims.qk,
          kLatentDims.v,
          true,
          TeamKind::kColumns,
          4,
          1,
          codes ? 16 : 32,
          codes ? 3 : 2,
          codes ? StoreKind::kLatentCodes : StoreKind::kLatentPages};
}

}  // namespace attnforge::cuda
