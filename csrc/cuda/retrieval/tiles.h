// The tiles of the scores of keys. Attention to lists has those of the block-sparse kernels
// (block_sparse/tiles.h). Nothing here was tuned on a GPU.
#pragma once

#include "cuda/block_sparse/tiles.h"

namespace attnforge::cuda {

constexpr int kScoreDims[] = {64, 128, 256};
constexpr int kNumScoreDims = 3;

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
