// From the paged tiles to kernels: as flash/instances.h.
#pragma once

#include "cuda/flash/instances.h"
#include "cuda/flash/rows_kernel.h"
#include "cuda/paged/launch.h"
#include "cuda/paged/pieces.h"
#include "cuda/paged/tiles.h"
#include "cuda/tile/pages.h"

namespace attnforge::cuda {

template <FwdTile kTile, bool kCodes, bool kShared>
using PageKeysOf = PageKeys<typename ElementOf<kTile.dtype>::Type, kCodes, kShared, kTile.block_n,
                            kTile.head_dim, kTile.v_head_dim>;
template <FwdTile kTile>
struct KeysOf<kTile, StoreKind::kPages> {
  using Type = PageKeysOf<kTile, false, false>;
};
template <FwdTile kTile>
struct KeysOf<kTile, StoreKind::kCodes> {
  using Type = PageKeysOf<kTile, true, false>;
};
template <FwdTile kTile>
struct KeysOf<kTile, StoreKind::kLatentPages> {
  using Type = PageKeysOf<kTile, false, true>;
};
template <FwdTile kTile>
struct KeysOf<kTile, StoreKind::kLatentCodes> {
  using Type = PageKeysOf<kTile, true, true>;
};

template <DType kDType, int kDims, bool kCodes>
struct PagedPrefillCase {
  static constexpr FwdTile kTile = paged_prefill_tile(kDType, kPagedDims[kDims], kCodes);
};
template <DType kDType, int kDims, bool kCodes>
struct PagedDecodeCase {
  static constexpr FwdTile kTile = paged_decode_tile(kDType, kPagedDims[kDims], kCodes);
};
template <DType kDType, bool kCodes>
struct LatentCase {
  static constexpr FwdTile kTile = latent_tile(kDType, kCodes);
};

// The blocks of a call: of each piece, whoever it belongs to, or of each split of each sequence.
inline RowGrid paged_grid(const FlashProblem& p, int block_m, int pack, const SplitParams& splits,
                          const Pieces& pieces, RowRange rows) {
  RowGrid grid = RowGrid::of(p, block_m, pack, splits.splits, rows.above, rows.most);
  if (pieces.first != nullptr) grid.batch = 1;
  return grid;
}

// The store of pages.
struct PageStore {
  const PageSource& source;
  const FlashProblem& problem;
  const Pieces& pieces;

  AF_DEVICE RowWork work(const RowGrid& grid, const SplitParams& splits, int block_m,
                         int block_n) const {
    return piece_work(problem, grid, splits, pieces, block_m, block_n);
  }
  template <class Keys>
  AF_DEVICE Keys keys(const Sequence& seq, int kv_head) const {
    return {source, source.pool.table + seq.batch * source.pool.table_stride, kv_head,
            static_cast<int>(problem.head_dim), static_cast<int>(problem.v_head_dim)};
  }
};

inline bool holds_codes(const PagePool& pool) {
  return pool.type == PageType::kFp8 || pool.type == PageType::kInt8 ||
         pool.type == PageType::kInt4;
}

// Calls f.template operator()<kDims, kCodes>() for the kernel that serves the pages.
template <int kIndex = 0, class F>
int with_paged_dims(const PagedFwdParams& params, const F& f) {
  if constexpr (kIndex == kNumPagedDims) {
    return kNoKernel;
  } else {
    const FlashProblem& p = params.flash.problem;
    if (paged_dims_of(p.head_dim, p.v_head_dim) != kIndex) {
      return with_paged_dims<kIndex + 1>(params, f);
    }
    return holds_codes(params.pool) ? f.template operator()<kIndex, true>()
                                    : f.template operator()<kIndex, false>();
  }
}

}  // namespace attnforge::cuda
