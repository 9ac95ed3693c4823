// Block-sparse backward, gradient of queries: dQ = scale dS K with dS recomputed as in
// flash/bwd_dq.cu, over the stream of a list's keys.
//
// A block owns rows that share a list, as in fwd.cu, and walks the places of its stream that they
// see: dQ has one owner and one order. Up to 16 rows have a warp to themselves. flops:
// 2 (2 D + Dv) per listed pair. bytes: Q, dO, dQ once, K and V of the listed blocks once per tile
// of rows, from L2.
#include "cuda/block_sparse/instances.h"
#include "cuda/flash/bwd_kernel.h"

namespace attnforge::cuda {

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    block_sparse_dq_kernel(const __grid_constant__ FlashBwdParams params,
                           const __grid_constant__ BlockListRef lists,
                           const __grid_constant__ ListGrid grid) {
  constexpr BwdTile kTile = Case::kTile;
  using Kernel = BwdKernel<kTile, 1>;  // beside a key: its position
  using T = typename Kernel::T;
  using Team = typename Kernel::Team;
  using Keys = ListedKeys<T, kTile.streamed, kTile.head_dim, kTile.v_head_dim>;
  static_assert(Keys::kStageBytes == Kernel::kStageBytes);
  constexpr int kN = Kernel::kN, kD = Kernel::kD, kStreamed = Kernel::kStreamed;
  const FlashProblem& p = params.problem;
  const ListedWork w = listed_work(p, lists, grid, Kernel::kOwned);
  if (!w.work.some) return;
  const Sequence& seq = w.work.seq;
  const RowTile& rows = w.work.rows;
  const TileRange& range = w.work.keys;
  const Keys keys = listed_keys<Keys>(params, w);
  const ScoreMap& map = grid.map;
  const auto place_of = [&](int j) { return range.lo + j * kStreamed; };
  const auto whole = [&](int j) { return range.whole(place_of(j), kStreamed); };
  const auto row_of = [&](const TensorRef& t, int r) -> T* {
    if (!rows.exists(r)) return nullptr;
    return row_ptr<T>(t, seq.batch, seq.q_row + rows.query(r), rows.head(r));
  };

  const Kernel block = {ptx::dynamic_shared_memory()};
  const int d = static_cast<int>(p.head_dim), dv = static_cast<int>(p.v_head_dim);
  const auto load_own = [&] {
    load_tile<Team>(block.own_a(), d, [&](int r) { return row_of(params.q, r); });
    load_tile<Team>(block.own_b(), dv, [&](int r) { return row_of(params.dout, r); });
  };
  const auto load = [&](int j) { keys.template load<Team>(block.stage(j), place_of(j), 0); };
  bool wild = false;
  const auto settle = [&](int j) {
    if (!whole(j)) wild |= tame<Team>(block.stream_a(j));
  };

  const int own_row = Kernel::own_row();
  const RowPlaces<1> places = RowPlaces<1>::of(p, seq, rows, own_row);
  float lse[2], delta[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = fragment_row(own_row, 0, h);
    lse[h] = kInf, delta[h] = 0.0f;
    if (!rows.exists(r)) continue;
    const int64_t row = seq.q_row + rows.query(r);
    lse[h] = base2_lse(*stat_ptr(params.lse, seq.batch, row, rows.head(r)));
    delta[h] = *stat_ptr(params.delta, seq.batch, row, rows.head(r));
  }

  Accumulators<1, kD> dq;
  zero<1, kD>(dq);
  const auto step = [&](int j) {
    const bool hidden = !whole(j);
    const auto columns = Keys::columns(block.stage(j), 0);
    typename Kernel::Scores s, ds, factor;
    zero<1, kN>(s);
    product_nt<1, kN>(s, block.own_a(), own_row, block.stream_a(j), 0);
    fill<1, kN>(factor, 1.0f);
    row_logits<true, 1, kN>(s, map, places, columns,
                            [&](int m, int n, int i, float slope) { factor[m][n][i] = slope; });
    zero<1, kN>(ds);
    product_nt<1, kN>(ds, block.own_b(), own_row, block.stream_b(j), 0);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = ds[0][n][i];
        x = ptx::exp2_approx(s[0][n][i] - lse[i / 2]) * (x - delta[i / 2]) * factor[0][n][i];
        if (!hidden) continue;
        const bool visible =
            lse[i / 2] != kInf && sees(places.at[0][i / 2], columns(n, i), seq.k_len, map.keys);
        if (!visible) x = 0.0f;
      }
    }
    product_nn<1, kN, kD>(dq, ds, block.stream_a(j), 0);
  };
  const int count = range.tiles(kStreamed);
  block.run(count, load_own, load, settle, step);

  if (Team::any(wild, block.scratch())) {
    for (int j = 0; j < count; ++j) {
      if (whole(j)) continue;
      for (int place = place_of(j); place < at_most(place_of(j) + kStreamed, range.hi); ++place) {
        const int key = keys.key_at(place);
        if (key >= seq.k_len) continue;
        const auto seen = [&](int, int h) {
          return sees(places.at[0][h], key, seq.k_len, map.keys);
        };
        add_wild<T, 1, kD>(dq, keys.k + key * keys.k_stride, d, seen);
      }
    }
  }
  ptx::sync_threads();  // the owned tile becomes the way out
  store_rows<1, kD>(
      block.own_a(), own_row, d, [&](int m, int n, int i) { return dq[m][n][i] * p.softmax_scale; },
      [&](int r) { return row_of(params.dq, r); });
}

template <>
int block_sparse_dq<kThisDType>(const FlashBwdParams& params, const BlockListRef& lists,
                                void* stream) {
  const FlashProblem& p = params.problem;
  return with_listed_dims(p, [&]<int kDims>() {
    const auto launch = [&]<ListRows kRows>() {
      using Case = ListedBwdCase<kThisDType, kDims, kRows, Gradient::kQueries>;
      using Kernel = BwdKernel<Case::kTile, 1>;
      const ListGrid grid = ListGrid::of(p, lists, Kernel::kOwned);
      if (grid.blocks() == 0) return 0;
      return ATTNFORGE_LAUNCH((block_sparse_dq_kernel<Case>), dim3(grid.blocks()),
                              dim3(32 * Case::kTile.warps), Kernel::kSharedBytes, stream, params,
                              lists, grid);
    };
    return lists.q_block * lists.pack <= 16 ? launch.template operator()<ListRows::kFew>()
                                            : launch.template operator()<ListRows::kMany>();
  });
}

}  // namespace attnforge::cuda
