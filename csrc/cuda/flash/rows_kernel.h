// What the kernels that own query rows have in common: find the work, walk the keys.
#pragma once

#include "cuda/flash/instances.h"
#include "cuda/flash/schedule.h"
#include "cuda/tile/epilogue.h"

namespace attnforge::cuda {

// The store of K and V as tensors.
struct TensorStore {
  const FlashFwdParams& params;

  AF_DEVICE RowWork work(const RowGrid& grid, const SplitParams& splits, int block_m,
                         int block_n) const {
    return row_work(params.problem, grid, splits, block_m, block_n);
  }
  template <class Keys>
  AF_DEVICE Keys keys(const Sequence& seq, int kv_head) const {
    using T = typename Keys::T;
    return {row_ptr<const T>(params.k, seq.batch, seq.k_row, kv_head),
            row_ptr<const T>(params.v, seq.batch, seq.k_row, kv_head),
            params.k.seq_stride,
            params.v.seq_stride,
            static_cast<int>(params.problem.head_dim),
            static_cast<int>(params.problem.v_head_dim)};
  }
};

template <FwdTile kTile, class Mod = NoMod>
struct RowKernel {
  using Traits = FwdTraits<kTile, Mod>;
  using Walk = Attend<Traits>;
  using T = typename Traits::T;
  static constexpr int kM = Walk::kM, kD = Walk::kD;
  using Output = typename Walk::Output;
  static_assert(Walk::kSharedBytes <= kMostShared);

  // Calls finish(work, walk, sums, out) after all keys; blocks without rows leave before.
  // store.work(grid, splits, ..): what is this block's. store.keys<Keys>(seq, kv_head): what the
  // tiles are loaded through. mod: tile/mods.h.
  template <class Store, class Finish>
  AF_DEVICE static void run(const FlashFwdParams& params, const SplitParams& splits,
                            const RowGrid& grid, const Store& store, const Mod& mod,
                            const Finish& finish) {
    const FlashProblem& p = params.problem;
    RowWork work = store.work(grid, splits, Walk::kRows, Walk::kBlockN);
    if (!work.some) return;
    if (Walk::Keys::kPages && p.mods.mask != nullptr) {  // the last keys are not seen whole
      const int64_t unmasked = work.seq.k_len - p.mods.mask_keys;
      work.keys.whole_hi = static_cast<int>(at_most<int64_t>(work.keys.whole_hi, unmasked));
    }
    attend(params, work, grid.map, store.template keys<typename Walk::Keys>(work.seq, work.kv_head),
           mod, finish);
  }

  // The same for work that is known, and through any keys.
  template <class Finish>
  AF_DEVICE static void attend(const FlashFwdParams& params, const RowWork& work,
                               const ScoreMap& map, const typename Walk::Keys& keys, const Mod& mod,
                               const Finish& finish) {
    const FlashProblem& p = params.problem;
    const Sequence& seq = work.seq;
    const RowTile& rows = work.rows;
    const Walk walk = {ptx::dynamic_shared_memory(),
                       p,
                       seq,
                       rows,
                       work.keys,
                       keys,
                       RowPlaces<kM>::of(p, seq, rows, Walk::first_row()),
                       map,
                       mod};
    RowSums<kM> sums = RowSums<kM>::none();
    Output out;
    zero<kM, kD>(out);
    walk.run([&](int r) { return row_of(params.q, work, r); }, sums, out);
    finish(work, walk, sums, out);
  }

  // Row r of the tile in a tensor like q, or null if it does not exist.
  AF_DEVICE static T* row_of(const TensorRef& t, const RowWork& work, int r) {
    if (!work.rows.exists(r)) return nullptr;
    return row_ptr<T>(t, work.seq.batch, work.seq.q_row + work.rows.query(r), work.rows.head(r));
  }

  // The sink's logit of row r; it belongs to the first split.
  AF_DEVICE static float sink(const FlashProblem& p, const RowWork& work, int r) {
    const bool counts = p.sinks != nullptr && work.split == 0 && work.rows.exists(r);
    return counts ? p.sinks[work.rows.head(r)] : -kInf;
  }
};

}  // namespace attnforge::cuda
