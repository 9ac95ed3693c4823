// The tiles of the scores of keys, and head dims of the backward of lists. Attention to lists has
// the tiles of the block-sparse kernels (block_sparse/tiles.h). Nothing here was tuned on a GPU.
#pragma once

#include "cuda/block_sparse/tiles.h"
#include "cuda/flash/launch.h"

namespace attnforge::cuda {

// Of the backward. 192 with 128 is padded: lists are rarely trained on latent attention, and every
// pair is a minute of a compiler.
constexpr HeadDims kIndexedBwdDims[] = {{64, 64}, {128, 128}, {256, 256}};
constexpr int kNumIndexedBwdDims = 3;

constexpr int indexed_bwd_dims_of(int64_t qk, int64_t v) {
  for (int i = 0; i < kNumIndexedBwdDims; ++i) {
    if (qk <= kIndexedBwdDims[i].qk && v <= kIndexedBwdDims[i].v) return i;
  }
  return -1;
}

constexpr int kScoreDims[] = {64, 128, 256};
constexpr int kNumScoreDims = 3;

constexpr int score_dims_of(int64_t head_dim) {
  for (int i = 0; i < kNumScoreDims; ++i) {
    if (head_dim <= kScoreDims[i]) return i;
  }
  return -1;
}

// f.template operator()<index>() for an index below kCount.
template <int kCount, int kIndex = 0, class F>
int with_index(int index, const F& f) {
  if constexpr (kIndex == kCount) {
    return kNoKernel;
  } else {
    if (index == kIndex) return f.template operator()<kIndex>();
    return with_index<kCount, kIndex + 1>(index, f);
  }
}

// 16 * warps keys that stay, tiles of `rows` that pass by in two stages.
struct ScoreTile {
  DType dtype;
  int head_dim, warps, rows;

  constexpr int shared_bytes() const {
    return (16 * warps + 2 * rows) * head_dim * (dtype == DType::kFloat32 ? 4 : 2);
  }
};

constexpr ScoreTile score_tile(DType dtype, int head_dim) {
  // Decode has 4 to 16 rows. More of them in a tile use what is loaded from the keys' tile twice,
  // where there is shared memory for it.
  const bool wide = head_dim * (dtype == DType::kFloat32 ? 4 : 2) > 512;
  return {dtype, head_dim, 4, wide ? 16 : 32};
}
static_assert(score_tile(DType::kFloat32, 256).shared_bytes() <= kMostShared);

}  // namespace attnforge::cuda
