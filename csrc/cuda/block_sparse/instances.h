// From the block-sparse tiles to kernels, as flash/instances.h, and which block does which rows.
#pragma once

#include "cuda/block_sparse/launch.h"
#include "cuda/block_sparse/tiles.h"
#include "cuda/flash/instances.h"
#include "cuda/flash/schedule.h"
#include "cuda/tile/listed.h"

namespace attnforge::cuda {

template <FwdTile kTile>
struct KeysOf<kTile, StoreKind::kListed> {
  using Type = ListedKeys<typename ElementOf<kTile.dtype>::Type, kTile.block_n, kTile.head_dim,
                          kTile.v_head_dim>;
};

template <DType kDType, int kDims, ListRows kRows>
struct ListedFwdCase {
  static constexpr FwdTile kTile = listed_fwd_tile(kDType, kListedDims[kDims], kRows);
};
template <DType kDType, int kDims, ListRows kRows, Gradient kGradient>
struct ListedBwdCase {
  static constexpr BwdTile kTile = listed_bwd_tile(kDType, kListedDims[kDims], kRows, kGradient);
};

// Calls f.template operator()<kDims>() for the pair of head dims that serves the problem.
template <int kIndex = 0, class F>
int with_listed_dims(const FlashProblem& p, const F& f) {
  if constexpr (kIndex == kNumListedDims) {
    return kNoKernel;
  } else {
    if (listed_dims_of(p.head_dim, p.v_head_dim) == kIndex) {
      return f.template operator()<kIndex>();
    }
    return with_listed_dims<kIndex + 1>(p, f);
  }
}

// Blocks over parts of a list row, list rows, heads and sequences.
struct ListGrid {
  int parts, rows, heads, batch;
  ScoreMap map;
  Divider kv_block;

  static ListGrid of(const FlashProblem& p, const BlockListRef& lists, int block_m) {
    const auto parts = (lists.q_block * lists.pack + block_m - 1) / block_m;
    const auto rows = (p.seqlen_q + lists.q_block - 1) / lists.q_block;
    return {
        static_cast<int>(parts),   static_cast<int>(rows), static_cast<int>(p.heads_q / lists.pack),
        static_cast<int>(p.batch), ScoreMap::of(p),        Divider::by(lists.kv_block)};
  }
  unsigned blocks() const { return static_cast<unsigned>(int64_t{parts} * rows * heads * batch); }
};

// The rows of a block, and the places of their list's stream that they see.
struct ListedWork {
  RowWork work;
  Stream stream;
};

// Rows of one list row: its queries, position by position, each with the heads that share the list.
// Late list rows, which see most keys under a causal mask, go first.
AF_DEVICE ListedWork listed_work(const FlashProblem& p, const BlockListRef& lists,
                                 const ListGrid& grid, int block_m) {
  ListedWork w;
  int id = static_cast<int>(blockIdx.x);
  const int part = id % grid.parts;
  id /= grid.parts;
  const int row = grid.rows - 1 - id % grid.rows;
  id /= grid.rows;
  const int head = id % grid.heads, batch = id / grid.heads;
  const int pack = static_cast<int>(lists.pack), q_block = static_cast<int>(lists.q_block);
  const int group = static_cast<int>(p.heads_q / p.heads_k);
  RowWork& work = w.work;
  work.split = 0;
  work.kv_head = head * pack / group;
  work.seq = sequence(p, batch, work.kv_head);
  const int end = at_most((row + 1) * q_block, work.seq.q_len);
  work.rows = {row * q_block * pack + part * block_m, end * pack, pack, head * pack};
  work.some = work.rows.first < work.rows.rows;
  if (!work.some) return w;
  // Where sequences begin is data.
  const int64_t at = (lists.first == nullptr ? 0 : lists.first[batch]) + row;
  const bool real = at >= 0 && at < lists.rows;
  const int64_t list = batch * lists.batch + head * lists.head + (real ? at : 0);
  w.stream = {lists.ids + list * lists.slots, real ? lists.counts[list] : 0, grid.kv_block};
  work.keys = w.stream.places(seen_range(work.rows.first_query(), work.rows.last_query(block_m),
                                         work.seq.k_len, work.seq.offset(), grid.map.keys, 1));
  return w;
}

// K and V of a KV head as a store of the keys of a stream.
template <class Keys, class Params>
AF_DEVICE Keys listed_keys(const Params& params, const ListedWork& w) {
  using T = typename Keys::T;
  const Sequence& seq = w.work.seq;
  return {{row_ptr<const T>(params.k, seq.batch, seq.k_row, w.work.kv_head),
           row_ptr<const T>(params.v, seq.batch, seq.k_row, w.work.kv_head), params.k.seq_stride,
           params.v.seq_stride, static_cast<int>(params.problem.head_dim),
           static_cast<int>(params.problem.v_head_dim)},
          w.stream,
          seq.k_len};
}

}  // namespace attnforge::cuda
