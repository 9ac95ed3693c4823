// Backward, gradient of queries: dQ = scale dS K with dS recomputed as in bwd_dkdv.cu.
//
// A block owns a tile of rows of one head and walks the keys they see, so that dQ has one owner and
// one order: no atomics, deterministic at every head dim, for computing S and dP once more (7
// products per visible pair in all instead of 5). grid: row tiles * heads * batch, late tiles
// first. flops: 2 (2 D + Dv) per visible pair. bytes: Q, dO, dQ once, K and V once per row tile,
// from L2.
#include "cuda/flash/bwd_kernel.h"

namespace attnforge::cuda {

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    flash_dq_kernel(const __grid_constant__ FlashBwdParams params,
                    const __grid_constant__ ScoreMap map, int tiles) {
  constexpr BwdTile kTile = Case::kTile;
  using Kernel = BwdKernel<kTile>;
  using T = typename Kernel::T;
  using Team = typename Kernel::Team;
  constexpr int kN = Kernel::kN, kD = Kernel::kD;
  constexpr int kOwned = Kernel::kOwned, kStreamed = Kernel::kStreamed;
  const FlashProblem& p = params.problem;
  const int tile = tiles - 1 - static_cast<int>(blockIdx.x) % tiles;
  const int pair = static_cast<int>(blockIdx.x) / tiles, heads = static_cast<int>(p.heads_q);
  const int head = pair % heads, kv_head = head / (heads / static_cast<int>(p.heads_k));
  const Sequence seq = sequence(p, pair / heads);
  const RowTile rows = {tile * kOwned, seq.q_len, 1, head};
  if (rows.first >= seq.q_len) return;
  const TileRange range = seen_range(rows.first_query(), rows.last_query(kOwned), seq.k_len,
                                     seq.offset(), map.keys, kStreamed);
  const auto key_of = [&](int j) { return range.lo + j * kStreamed; };
  const auto whole = [&](int j) { return range.whole(key_of(j), kStreamed); };

  const Kernel block = {ptx::dynamic_shared_memory()};
  const int d = static_cast<int>(p.head_dim), dv = static_cast<int>(p.v_head_dim);
  const T* k = row_ptr<const T>(params.k, seq.batch, seq.k_row, kv_head);
  const T* v = row_ptr<const T>(params.v, seq.batch, seq.k_row, kv_head);
  const int64_t first_row = seq.q_row + rows.first;
  const auto load_own = [&] {
    const int left = seq.q_len - rows.first;
    load_rows<Team>(block.own_a(), row_ptr<const T>(params.q, seq.batch, first_row, head),
                    params.q.seq_stride, left, d);
    load_rows<Team>(block.own_b(), row_ptr<const T>(params.dout, seq.batch, first_row, head),
                    params.dout.seq_stride, left, dv);
  };
  const auto load = [&](int j) {
    const int key = key_of(j), left = seq.k_len - key;
    load_rows<Team>(block.stream_a(j), k + key * params.k.seq_stride, params.k.seq_stride, left, d);
    load_rows<Team>(block.stream_b(j), v + key * params.v.seq_stride, params.v.seq_stride, left,
                    dv);
  };
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
    const int64_t row = first_row + r;
    lse[h] = rows.exists(r) ? base2_lse(*stat_ptr(params.lse, seq.batch, row, head)) : kInf;
    delta[h] = rows.exists(r) ? *stat_ptr(params.delta, seq.batch, row, head) : 0.0f;
  }

  Accumulators<1, kD> dq;
  zero<1, kD>(dq);
  const auto step = [&](int j) {
    const int key = key_of(j);
    const bool hidden = !whole(j);
    typename Kernel::Scores s, ds, factor;
    zero<1, kN>(s);
    product_nt<1, kN>(s, block.own_a(), own_row, block.stream_a(j), 0);
    if (kTile.features) fill<1, kN>(factor, 1.0f);
    row_logits<kTile.features, 1, kN>(
        s, map, places, key, [&](int m, int n, int i, float slope) { factor[m][n][i] = slope; });
    zero<1, kN>(ds);
    product_nt<1, kN>(ds, block.own_b(), own_row, block.stream_b(j), 0);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = ds[0][n][i];
        x = ptx::exp2_approx(s[0][n][i] - lse[i / 2]) * (x - delta[i / 2]);
        if (kTile.features) x *= factor[0][n][i];
        const bool visible =
            lse[i / 2] != kInf &&
            sees(places.at[0][i / 2], key + fragment_column(n, i), seq.k_len, map.keys);
        if (hidden && !visible) x = 0.0f;
      }
    }
    product_nn<1, kN, kD>(dq, ds, block.stream_a(j), 0);
  };
  const int count = range.tiles(kStreamed);
  block.run(count, load_own, load, settle, step);

  if (Team::any(wild, block.scratch())) {
    for (int j = 0; j < count; ++j) {
      if (whole(j)) continue;
      for (int key = key_of(j); key < at_most(key_of(j) + kStreamed, range.hi); ++key) {
        const auto seen = [&](int, int h) {
          return sees(places.at[0][h], key, seq.k_len, map.keys);
        };
        add_wild<T, 1, kD>(dq, k + key * params.k.seq_stride, d, seen);
      }
    }
  }
  ptx::sync_threads();  // the owned tile becomes the way out
  store_rows<1, kD>(
      block.own_a(), own_row, d, [&](int m, int n, int i) { return dq[m][n][i] * p.softmax_scale; },
      [&](int r) -> T* {
        if (!rows.exists(r)) return nullptr;
        return row_ptr<T>(params.dq, seq.batch, first_row + r, head);
      });
}

template <>
int flash_dq<kThisDType>(const FlashBwdParams& params, void* stream) {
  const FlashProblem& p = params.problem;
  return with_head_dims(p, [&]<int kDims>() {
    const auto launch = [&]<bool kFeatures>() {
      using Case = BwdCase<kThisDType, kDims, kFeatures, Gradient::kQueries>;
      using Kernel = BwdKernel<Case::kTile>;
      const int tiles = static_cast<int>((p.seqlen_q + Kernel::kOwned - 1) / Kernel::kOwned);
      const int64_t blocks = int64_t{tiles} * p.heads_q * p.batch;
      if (blocks == 0) return 0;
      return ATTNFORGE_LAUNCH((flash_dq_kernel<Case>), dim3(static_cast<unsigned>(blocks)),
                              dim3(32 * Case::kTile.warps), Kernel::kSharedBytes, stream, params,
                              ScoreMap::of(p), tiles);
    };
    return has_features(p) ? launch.template operator()<true>()
                           : launch.template operator()<false>();
  });
}

}  // namespace attnforge::cuda
