// Attention to listed keys, forward, for the sm_80 class: the decode kernel over gathered rows.
//
//   rows       16 that share a list, query rows of all heads of a KV head where it has one list,
//              else of one query head; warps share out the tiles of keys, as in flash/decode.cu
//   keys       the entries of the list (entries.h): ids, biases, rows of K and V
//   grid       split, row tile, head, batch. A split has splits.keys entries, or its share of a
//              list that is longer than splits.splits of those: a function of the list's length
//   flops      2 (D + Dv) per row and entry, rows padded to 16
//   bytes      K and V of the entries once per row tile, 4 or 8 of list
//
// Limits: head dims up to 256, multiples of 8.
#include "cuda/block_sparse/instances.h"
#include "cuda/flash/decode_kernel.h"
#include "cuda/retrieval/entries.h"
#include "cuda/retrieval/launch.h"

namespace attnforge::cuda {

template <DType kDType, int kDims>
struct IndexedCase {
  static constexpr FwdTile kTile = decode_tile(kDType, kListedDims[kDims]);
};

// Attend's traits: decode's tile over the entries of a list.
template <FwdTile kTile>
struct IndexedTraits : FwdTraits<kTile> {
  using Keys =
      EntryKeys<typename FwdTraits<kTile>::T, kTile.block_n, kTile.head_dim, kTile.v_head_dim>;
  static constexpr bool kFeatures = false;
};

// The list of the rows of a block. work counts keys and leaves counting entries.
AF_DEVICE EntryList entry_list(const IndexedFwdParams& params, const SplitParams& splits,
                               const Divider& slots, int block_n, RowWork& work) {
  const KeyPlaces places = KeyPlaces::of(params.pool, slots, work.seq.batch);
  const EntryList list =
      EntryList::of(params.lists, params.flash.problem, work.rows.first_head / work.rows.pack,
                    work.rows.pack, work.seq.k_len, places);
  const int parts = static_cast<int>(splits.splits);
  const int share = ceil_div(ceil_div(list.count, parts), block_n) * block_n;
  const int size = at_least(static_cast<int>(splits.keys), share);
  work.seq.k_len = list.count;
  work.keys =
      TileRange{0, 0, list.count, list.count}.within(work.split * size, work.split * size + size);
  return list;
}

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    indexed_fwd_kernel(const __grid_constant__ IndexedFwdParams params,
                       const __grid_constant__ SplitParams splits,
                       const __grid_constant__ RowGrid grid, const Divider slots) {
  using Kernel = RowKernel<Case::kTile>;
  using Walk = Attend<IndexedTraits<Case::kTile>>;
  static_assert(Walk::kSharedBytes <= kMostShared);
  const FlashProblem& p = params.flash.problem;
  RowWork work = row_work(p, grid, splits, Walk::kRows, Walk::kBlockN);
  if (!work.some) return;
  const EntryList list = entry_list(params, splits, slots, Walk::kBlockN, work);
  const bool paged = params.pool.table != nullptr;
  const typename Walk::Keys keys = {
      {nullptr, nullptr, 0, 0, static_cast<int>(p.head_dim), static_cast<int>(p.v_head_dim)},
      list,
      paged ? params.pool.k : params.flash.k,
      paged ? params.pool.v : params.flash.v,
      work.kv_head};
  const NoMod none;
  const Walk walk = {ptx::dynamic_shared_memory(),
                     p,
                     work.seq,
                     work.rows,
                     work.keys,
                     keys,
                     RowPlaces<Walk::kM>::of(p, work.seq, work.rows, Walk::first_row()),
                     grid.map,
                     none};
  RowSums<Walk::kM> sums = RowSums<Walk::kM>::none();
  typename Walk::Output out;
  zero<Walk::kM, Walk::kD>(out);
  walk.run([&](int r) { return Kernel::row_of(params.flash.q, work, r); }, sums, out);
  finish_decode<Case::kTile, true>(params.flash, splits, work, walk, sums, out);
}

template <>
int indexed_fwd<kThisDType>(const IndexedFwdParams& params, const SplitParams& splits,
                            void* stream) {
  const FlashProblem& p = params.flash.problem;
  return with_listed_dims(p, [&]<int kDims>() {
    using Case = IndexedCase<kThisDType, kDims>;
    const bool own = params.lists.heads == p.heads_q;
    const int pack = own ? 1 : static_cast<int>(p.heads_q / p.heads_k);
    const RowGrid grid = RowGrid::of(p, kDecodeRows, pack, splits.splits);
    if (grid.blocks() == 0) return 0;
    return ATTNFORGE_LAUNCH((indexed_fwd_kernel<Case>), dim3(grid.blocks()),
                            dim3(32 * Case::kTile.warps),
                            Attend<IndexedTraits<Case::kTile>>::kSharedBytes, stream, params,
                            splits, grid, Divider::by(params.pool.page_size));
  });
}

}  // namespace attnforge::cuda
