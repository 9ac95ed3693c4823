// Attention to listed keys, backward, gradient of queries: dQ = scale dS K with
//
//   P = 2^(S - LSE)     dS = P (dO V^T - delta)
//
// recomputed. A block owns rows that share a list and walks its entries (entries.h): dQ has one
// owner and one order. grid: row tiles, row heads, batch. flops: 2 (2 D + Dv) per row and entry.
// bytes: Q, dO, dQ once, K and V of the entries once per tile of rows, from L2.
#include "cuda/retrieval/indexed_bwd.h"

namespace attnforge::cuda {

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    indexed_dq_kernel(const __grid_constant__ IndexedBwdParams params,
                      const __grid_constant__ RowGrid grid) {
  constexpr BwdTile kTile = Case::kTile;
  using Kernel = BwdKernel<kTile, 1>;  // beside a key: its bias
  using T = typename Kernel::T;
  using Team = typename Kernel::Team;
  using Keys = EntryKeys<T, kTile.streamed, kTile.head_dim, kTile.v_head_dim>;
  static_assert(Keys::kStageBytes == Kernel::kStageBytes);
  constexpr int kN = Kernel::kN, kD = Kernel::kD, kStreamed = Kernel::kStreamed;
  const FlashBwdParams& f = params.flash;
  const FlashProblem& p = f.problem;
  const SplitParams whole;
  const RowWork work = row_work(p, grid, whole, Kernel::kOwned, kStreamed);
  if (!work.some) return;
  const Sequence& seq = work.seq;
  const RowTile& rows = work.rows;
  const EntryList list = entry_list(params, rows.first_head / rows.pack, rows.pack, seq);
  const Keys keys = entry_keys<Keys>(params, list, work.kv_head);
  const auto row_of = [&](const TensorRef& t, int r) -> T* {
    if (!rows.exists(r)) return nullptr;
    return row_ptr<T>(t, seq.batch, rows.query(r), rows.head(r));
  };

  const Kernel block = {ptx::dynamic_shared_memory()};
  const auto load_own = [&] {
    load_tile<Team>(block.own_a(), keys.k_dim, [&](int r) { return row_of(f.q, r); });
    load_tile<Team>(block.own_b(), keys.v_dim, [&](int r) { return row_of(f.dout, r); });
  };
  const auto load = [&](int j) { keys.template load<Team>(block.stage(j), j * kStreamed, 0); };

  const int own_row = Kernel::own_row();
  float lse[2], delta[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = fragment_row(own_row, 0, h);
    lse[h] = kInf, delta[h] = 0.0f;
    if (!rows.exists(r)) continue;
    lse[h] = base2_lse(*stat_ptr(f.lse, seq.batch, rows.query(r), rows.head(r)));
    delta[h] = *stat_ptr(f.delta, seq.batch, rows.query(r), rows.head(r));
  }

  Accumulators<1, kD> dq;
  zero<1, kD>(dq);
  const auto step = [&](int j) {
    typename Kernel::Scores s, ds;
    zero<1, kN>(s);
    product_nt<1, kN>(s, block.own_a(), own_row, block.stream_a(j), 0);
    zero<1, kN>(ds);
    product_nt<1, kN>(ds, block.own_b(), own_row, block.stream_b(j), 0);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const FloatPair bias = Keys::biases(block.stage(j), n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float own = i % 2 == 0 ? bias.x : bias.y;
        const float prob = ptx::exp2_approx(s[0][n][i] * grid.map.scale + own - lse[i / 2]);
        const bool seen = own != -kInf && lse[i / 2] != kInf;
        ds[0][n][i] = seen ? prob * (ds[0][n][i] - delta[i / 2]) : 0.0f;
      }
    }
    product_nn<1, kN, kD>(dq, ds, block.stream_a(j), 0);
  };
  block.run(ceil_div(list.count, kStreamed), load_own, load, [](int) {}, step);

  ptx::sync_threads();  // the owned tile becomes the way out
  store_rows<1, kD>(
      block.own_a(), own_row, keys.k_dim,
      [&](int m, int n, int i) { return dq[m][n][i] * p.softmax_scale; },
      [&](int r) { return row_of(f.dq, r); });
}

template <>
int indexed_dq<kThisDType>(const IndexedBwdParams& params, void* stream) {
  const FlashProblem& p = params.flash.problem;
  return with_indexed_bwd_dims(p, [&]<int kDims>() {
    using Case = IndexedBwdCase<kThisDType, kDims, Gradient::kQueries>;
    using Kernel = BwdKernel<Case::kTile, 1>;
    const RowGrid grid = RowGrid::of(p, Kernel::kOwned, pack_of(params), 1);
    if (grid.blocks() == 0) return 0;
    return ATTNFORGE_LAUNCH((indexed_dq_kernel<Case>), dim3(grid.blocks()),
                            dim3(32 * Case::kTile.warps), Kernel::kSharedBytes, stream, params,
                            grid);
  });
}

}  // namespace attnforge::cuda
