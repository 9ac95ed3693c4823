// Backward, gradients of keys and values, from recomputed probabilities (FlashAttention-2; Dao,
// 2023).
//
//   P = 2^(S - LSE)     dS = P * (dO V^T - delta) * dlogit/dproduct
//   dV = P^T dO         dK = scale dS^T Q
//
// A block owns a tile of keys and walks the rows that see them, over all query heads of its KV
// head, in one fixed order: GQA needs no reduction, every sum has one owner, the result is
// deterministic. It works on transposed tiles, S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T
// come out of the accumulators as left operands and never touch shared memory.
//
// grid: key tiles * KV heads * batch. flops: 2 (2 D + 2 Dv) per visible pair; two kernels, for dV
// and for dK, where both accumulators do not fit the registers: 2 (3 D + 2 Dv). bytes: K, V, dK, dV
// once, Q and dO once per key tile, from L2. Slots behind the used keys get zeros.
#include "cuda/flash/bwd_kernel.h"

namespace attnforge::cuda {

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    flash_dkdv_kernel(const __grid_constant__ FlashBwdParams params,
                      const __grid_constant__ ScoreMap map, int tiles) {
  constexpr BwdTile kTile = Case::kTile;
  using Kernel = BwdKernel<kTile>;
  using T = typename Kernel::T;
  using Team = typename Kernel::Team;
  constexpr int kN = Kernel::kN, kOwned = Kernel::kOwned, kStreamed = Kernel::kStreamed;
  constexpr int kD = Kernel::kD, kV = Kernel::kV;
  constexpr bool kWantK = kTile.gradient != Gradient::kValues;
  constexpr bool kWantV = kTile.gradient != Gradient::kKeys;
  const FlashProblem& p = params.problem;
  const int first = static_cast<int>(blockIdx.x) % tiles * kOwned;
  const int pair = static_cast<int>(blockIdx.x) / tiles, heads_k = static_cast<int>(p.heads_k);
  const int kv_head = pair % heads_k, group = static_cast<int>(p.heads_q) / heads_k;
  const Sequence seq = sequence(p, pair / heads_k);
  if (first >= seq.k_slots) return;

  // Rows by the place of their keys: key j stands at row j - offset.
  const Window window = {map.keys.ahead, map.keys.back};
  const int last = at_most(first + kOwned, seq.k_len) - 1, shift = -seq.offset();
  const TileRange range =
      seen_range(first, last, first < seq.k_len ? seq.q_len : 0, shift, window, kStreamed);
  const bool full = first + kOwned <= seq.k_len;
  const int per_head = range.tiles(kStreamed);
  const auto head_of = [&](int j) { return kv_head * group + j / per_head; };
  const auto row_of = [&](int j) { return range.lo + j % per_head * kStreamed; };
  const auto whole = [&](int j) { return full && range.whole(row_of(j), kStreamed); };

  const Kernel block = {ptx::dynamic_shared_memory()};
  const int d = static_cast<int>(p.head_dim), dv = static_cast<int>(p.v_head_dim);
  const auto load_own = [&] {
    const int left = seq.k_len - first;
    load_rows<Team>(block.own_a(),
                    row_ptr<const T>(params.k, seq.batch, seq.k_row + first, kv_head),
                    params.k.seq_stride, left, d);
    load_rows<Team>(block.own_b(),
                    row_ptr<const T>(params.v, seq.batch, seq.k_row + first, kv_head),
                    params.v.seq_stride, left, dv);
  };
  const auto load = [&](int j) {
    const int row = row_of(j), left = seq.q_len - row, head = head_of(j);
    load_rows<Team>(block.stream_a(j), row_ptr<const T>(params.q, seq.batch, seq.q_row + row, head),
                    params.q.seq_stride, left, d);
    load_rows<Team>(block.stream_b(j),
                    row_ptr<const T>(params.dout, seq.batch, seq.q_row + row, head),
                    params.dout.seq_stride, left, dv);
    for (int n = Team::rank(); n < 2 * kStreamed; n += Team::kThreads) {
      const int r = n % kStreamed;
      const RowStatRef& stat = n < kStreamed ? params.lse : params.delta;
      ptx::cp_async_4(block.stats(j) + 4 * n, stat_ptr(stat, seq.batch, seq.q_row + row + r, head),
                      r < left ? 4 : 0);
    }
  };
  bool wild = false;
  const auto settle = [&](int j) {
    if (whole(j)) return;
    if (kWantK) wild |= tame<Team>(block.stream_a(j));
    if (kWantV) wild |= tame<Team>(block.stream_b(j));
  };

  const int own_row = Kernel::own_row();
  int at[2];  // rows at which this thread's keys stand
  bool used[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int key = first + fragment_row(own_row, 0, h);
    at[h] = key + shift;
    used[h] = key < seq.k_len;
  }
  const auto seen = [&](int h, int row) { return used[h] && sees(at[h], row, seq.q_len, window); };

  Accumulators<1, kWantK ? kD : 2> dk;
  Accumulators<1, kWantV ? kV : 2> dvalue;
  zero<1, kWantK ? kD : 2>(dk);
  zero<1, kWantV ? kV : 2>(dvalue);
  const auto step = [&](int j) {
    const int row = row_of(j);
    const bool hidden = !whole(j);
    typename Kernel::Scores s, factor;
    zero<1, kN>(s);
    product_nt<1, kN>(s, block.own_a(), own_row, block.stream_a(j), 0);
    const float slope2 =
        p.alibi_slopes == nullptr
            ? 0.0f
            : p.alibi_slopes[seq.batch * p.alibi_batch_stride + head_of(j)] * kLog2E;
    const auto alibi = [&](int, int n, int i) {
      const int distance = at[i / 2] - (row + fragment_column(n, i));
      return slope2 * static_cast<float>(distance < 0 ? -distance : distance);
    };
    if (kTile.features) fill<1, kN>(factor, 1.0f);
    to_logits<kTile.features, 1, kN>(
        s, map, alibi, [&](int m, int n, int i, float slope) { factor[m][n][i] = slope; });
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = fragment_column(n, i);
        const float lse = base2_lse(ptx::load_shared<float>(block.stats(j) + 4 * column));
        float& x = s[0][n][i];
        x = ptx::exp2_approx(x - lse);
        if (hidden && (lse == kInf || !seen(i / 2, row + column))) x = 0.0f;
      }
    }
    if constexpr (kWantV) product_nn<1, kN, kV>(dvalue, s, block.stream_b(j), 0);
    if constexpr (kWantK) {
      typename Kernel::Scores ds;
      zero<1, kN>(ds);
      product_nt<1, kN>(ds, block.own_b(), own_row, block.stream_b(j), 0);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = fragment_column(n, i);
          const float delta = ptx::load_shared<float>(block.stats(j) + 4 * (kStreamed + column));
          float& x = ds[0][n][i];
          x = s[0][n][i] * (x - delta);
          if (kTile.features) x *= factor[0][n][i];
          if (hidden && !seen(i / 2, row + column)) x = 0.0f;
        }
      }
      product_nn<1, kN, kD>(dk, ds, block.stream_a(j), 0);
    }
  };
  block.run(group * per_head, load_own, load, settle, step);

  if (Team::any(wild, block.scratch())) {
    for (int j = 0; j < group * per_head; ++j) {
      if (whole(j)) continue;
      for (int row = row_of(j); row < at_most(row_of(j) + kStreamed, range.hi); ++row) {
        const auto sees_row = [&](int, int h) { return seen(h, row); };
        const int64_t place = seq.q_row + row;
        if constexpr (kWantK) {
          add_wild<T, 1, kD>(dk, row_ptr<const T>(params.q, seq.batch, place, head_of(j)), d,
                             sees_row);
        }
        if constexpr (kWantV) {
          add_wild<T, 1, kV>(dvalue, row_ptr<const T>(params.dout, seq.batch, place, head_of(j)),
                             dv, sees_row);
        }
      }
    }
  }

  const auto slot = [&](const TensorRef& t) {
    return [&](int r) -> T* {
      if (first + r >= seq.k_slots) return nullptr;
      return row_ptr<T>(t, seq.batch, seq.k_row + first + r, kv_head);
    };
  };
  ptx::sync_threads();  // the owned tiles become the way out
  if constexpr (kWantK) {
    store_rows<1, kD>(
        block.own_a(), own_row, d,
        [&](int m, int n, int i) { return dk[m][n][i] * p.softmax_scale; }, slot(params.dk));
  }
  if constexpr (kWantV) {
    store_rows<1, kV>(
        block.own_b(), own_row, dv, [&](int m, int n, int i) { return dvalue[m][n][i]; },
        slot(params.dv));
  }
}

template <>
int flash_dkdv<kThisDType>(const FlashBwdParams& params, void* stream) {
  const FlashProblem& p = params.problem;
  return with_head_dims(p, [&]<int kDims>() {
    const auto launch = [&]<bool kFeatures, Gradient kGradient>() {
      using Case = BwdCase<kThisDType, kDims, kFeatures, kGradient>;
      using Kernel = BwdKernel<Case::kTile>;
      const int tiles = static_cast<int>((p.seqlen_k + Kernel::kOwned - 1) / Kernel::kOwned);
      const int64_t blocks = int64_t{tiles} * p.heads_k * p.batch;
      if (blocks == 0) return 0;
      return ATTNFORGE_LAUNCH((flash_dkdv_kernel<Case>), dim3(static_cast<unsigned>(blocks)),
                              dim3(32 * Case::kTile.warps), Kernel::kSharedBytes, stream, params,
                              ScoreMap::of(p), tiles);
    };
    const auto launch_all = [&]<bool kFeatures>() {
      if constexpr (keys_and_values_apart(kThisDType, kHeadDims[kDims])) {
        const int error = launch.template operator()<kFeatures, Gradient::kValues>();
        return error != 0 ? error : launch.template operator()<kFeatures, Gradient::kKeys>();
      } else {
        return launch.template operator()<kFeatures, Gradient::kKeysValues>();
      }
    };
    return has_features(p) ? launch_all.template operator()<true>()
                           : launch_all.template operator()<false>();
  });
}

}  // namespace attnforge::cuda
