// What the backward kernels of attention to lists share: tiles of the block-sparse backward, rows
// that share a list, and their list.
#pragma once

#include "cuda/block_sparse/instances.h"
#include "cuda/flash/bwd_kernel.h"
#include "cuda/retrieval/entries.h"
#include "cuda/retrieval/launch.h"
#include "cuda/retrieval/tiles.h"

namespace attnforge::cuda {

// 64 rows, or entries, of a block: rows that are not there cost products, and a tile that all warps
// load together gathers no row twice.
template <DType kDType, int kDims, Gradient kGradient>
struct IndexedBwdCase {
  static constexpr BwdTile kTile =
      listed_bwd_tile(kDType, kIndexedBwdDims[kDims], ListRows::kMany, kGradient);
};

// Keys are in one piece here: `places` has no table.
AF_DEVICE EntryList entry_list(const IndexedBwdParams& params, int head, int pack,
                               const Sequence& seq) {
  const KeyPlaces places = {nullptr, {}, 0, seq.batch};
  return EntryList::of(params.lists, params.flash.problem, head, pack, seq.k_len, places);
}

template <class Keys>
AF_DEVICE Keys entry_keys(const IndexedBwdParams& params, const EntryList& list, int kv_head) {
  const FlashProblem& p = params.flash.problem;
  return {{nullptr, nullptr, 0, 0, static_cast<int>(p.head_dim), static_cast<int>(p.v_head_dim)},
          list,
          params.flash.k,
          params.flash.v,
          kv_head};
}

inline int pack_of(const IndexedBwdParams& params) {
  const FlashProblem& p = params.flash.problem;
  return params.lists.heads == p.heads_q ? 1 : static_cast<int>(p.heads_q / p.heads_k);
}

// Calls f.template operator()<kDims>() for the pair of head dims that serves the problem.
template <class F>
int with_indexed_bwd_dims(const FlashProblem& p, const F& f) {
  return with_index<kNumIndexedBwdDims>(indexed_bwd_dims_of(p.head_dim, p.v_head_dim), f);
}

}  // namespace attnforge::cuda
