// The rows of a merge that a block has, a warp each: what merge.cu says of it.
#pragma once

#include "cuda/flash/merge_row.h"

namespace attnforge::cuda {

constexpr int kMergeRows = 4;  // of a block; they do not meet

// inf_is_empty: a part of LSE +inf is nothing.
template <class Part, class T>
AF_DEVICE void merge_rows(const MergeParams& p, bool inf_is_empty) {
  const int64_t rows = p.batch * p.seqlen * p.heads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeRows + warp_id();  // [B, S, H]
  if (row >= rows) return;
  const int64_t head = row % p.heads, at = row / p.heads;
  const int64_t stat = (at / p.seqlen * p.heads + head) * p.seqlen + at % p.seqlen;
  const auto state = [&](int64_t n) {
    const float lse = p.lses[n * rows + stat];
    return inf_is_empty && lse == kInf ? -kInf : lse;
  };
  const auto part = [&](int64_t n) {
    return static_cast<const Part*>(p.outs) + (n * rows + row) * p.dim;
  };
  const float lse = merge_row(p.states, p.dim, state, part, static_cast<T*>(p.out) + row * p.dim);
  if (ptx::lane_id() == 0) p.lse[stat] = lse;
}

}  // namespace attnforge::cuda
