// Attention to listed keys, backward: what each entry of a list adds to its key, its value and its
// bias,
//
//   dV += P^T dO     dK += scale dS^T Q     dlog_bias = sum over rows of dS
//
// in an fp32 workspace; indexed_sum.cu adds the entries of a key. A block owns entries and walks
// the rows that share their list, on transposed tiles as flash/bwd_dkdv.cu: every sum has one owner
// and one order, ids that stand twice included. Entries that name no key in use get what nobody
// reads.
//
// grid: tiles of entries, row heads, batch. flops: 2 (2 D + 2 Dv) per row and entry; two kernels,
// for dV and for dK, where both accumulators do not fit the registers. bytes: K and V of the
// entries once, 4 (D + Dv) of workspace, Q and dO once per tile of entries, from L2.
#include "cuda/retrieval/indexed_bwd.h"

namespace attnforge::cuda {

// How blocks are dealt: tiles of entries, row heads of `pack` query heads, sequences.
struct EntryGrid {
  int tiles, heads, batch, pack;
  float scale;  // softmax_scale log2(e)

  unsigned blocks() const { return static_cast<unsigned>(int64_t{tiles} * heads * batch); }
};

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    indexed_dkdv_kernel(const __grid_constant__ IndexedBwdParams params,
                        const __grid_constant__ EntryGrads grads,
                        const __grid_constant__ EntryGrid grid) {
  constexpr BwdTile kTile = Case::kTile;
  using Kernel = BwdKernel<kTile>;
  using T = typename Kernel::T;
  using Team = typename Kernel::Team;
  using Keys = EntryKeys<T, Kernel::kOwned, kTile.head_dim, kTile.v_head_dim>;
  constexpr int kN = Kernel::kN, kStreamed = Kernel::kStreamed;
  constexpr int kD = Kernel::kD, kV = Kernel::kV;
  constexpr bool kWantK = kTile.gradient != Gradient::kValues;
  constexpr bool kWantV = kTile.gradient != Gradient::kKeys;
  const FlashBwdParams& f = params.flash;
  const FlashProblem& p = f.problem;
  int id = static_cast<int>(blockIdx.x);
  const int first = id % grid.tiles * Kernel::kOwned;
  id /= grid.tiles;
  const int head = id % grid.heads;
  const Sequence seq = sequence(p, id / grid.heads);
  const EntryList list = entry_list(params, head, grid.pack, seq);
  if (first >= list.count) return;
  const int kv_head = head * grid.pack / static_cast<int>(p.heads_q / p.heads_k);
  const Keys keys = entry_keys<Keys>(params, list, kv_head);
  const RowTile rows = {0, seq.q_len * grid.pack, grid.pack, head * grid.pack};
  const auto row_of = [&](const TensorRef& t, int r) -> const T* {
    if (!rows.exists(r)) return nullptr;
    return row_ptr<const T>(t, seq.batch, rows.query(r), rows.head(r));
  };

  const Kernel block = {ptx::dynamic_shared_memory()};
  const auto load_own = [&] {
    load_tile<Team>(block.own_a(), keys.k_dim, [&](int r) { return keys.row(f.k, first + r); });
    load_tile<Team>(block.own_b(), keys.v_dim, [&](int r) { return keys.row(f.v, first + r); });
  };
  const auto load = [&](int j) {
    const int row = j * kStreamed;
    load_tile<Team>(block.stream_a(j), keys.k_dim, [&](int r) { return row_of(f.q, row + r); });
    load_tile<Team>(block.stream_b(j), keys.v_dim, [&](int r) { return row_of(f.dout, row + r); });
    for (int n = Team::rank(); n < 2 * kStreamed; n += Team::kThreads) {
      const int r = row + n % kStreamed;
      const bool real = rows.exists(r);
      const float* from = stat_ptr(n < kStreamed ? f.lse : f.delta, seq.batch,
                                   real ? rows.query(r) : 0, real ? rows.head(r) : 0);
      ptx::cp_async_4(block.stats(j) + 4 * n, from, real ? 4 : 0);
    }
  };

  const int own_row = Kernel::own_row();
  float bias[2], dbias[2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) bias[h] = list.at(first + fragment_row(own_row, 0, h)).bias;

  Accumulators<1, kWantK ? kD : 2> dk;
  Accumulators<1, kWantV ? kV : 2> dvalue;
  zero<1, kWantK ? kD : 2>(dk);
  zero<1, kWantV ? kV : 2>(dvalue);
  const auto step = [&](int j) {
    // Behind the rows LSE is 0: what is there does not count, whatever the bias makes of it.
    const auto counts = [&](int n, int i) {
      return bias[i / 2] != -kInf && rows.exists(j * kStreamed + fragment_column(n, i));
    };
    typename Kernel::Scores s;
    zero<1, kN>(s);
    product_nt<1, kN>(s, block.own_a(), own_row, block.stream_a(j), 0);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = fragment_column(n, i);
        const float lse = base2_lse(ptx::load_shared<float>(block.stats(j) + 4 * column));
        const float prob = ptx::exp2_approx(s[0][n][i] * grid.scale + bias[i / 2] - lse);
        s[0][n][i] = counts(n, i) && lse != kInf ? prob : 0.0f;
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
          x = counts(n, i) ? s[0][n][i] * (x - delta) : 0.0f;
          dbias[i / 2] += x;
        }
      }
      product_nn<1, kN, kD>(dk, ds, block.stream_a(j), 0);
    }
  };
  block.run(ceil_div(rows.rows, kStreamed), load_own, load, [](int) {}, step);

  const int64_t lists = seq.batch * grid.heads + head;
  const auto entry = [&](float* to, int size) {
    return [=](int r) -> float* {
      if (first + r >= list.count) return nullptr;
      return to + (lists * params.lists.slots + first + r) * size;
    };
  };
  if constexpr (kWantK) {
    store_pairs<1, kD>(
        own_row, keys.k_dim, [&](int m, int n, int i) { return dk[m][n][i] * p.softmax_scale; },
        entry(grads.k, keys.k_dim));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = quad_sum(dbias[h]);
      float* to = entry(grads.bias, 1)(fragment_row(own_row, 0, h));
      if (grads.bias != nullptr && to != nullptr && ptx::lane_id() % 4 == 0) *to = sum;
    }
  }
  if constexpr (kWantV) {
    store_pairs<1, kV>(
        own_row, keys.v_dim, [&](int m, int n, int i) { return dvalue[m][n][i]; },
        entry(grads.v, keys.v_dim));
  }
}

template <>
int indexed_dkdv<kThisDType>(const IndexedBwdParams& params, const EntryGrads& grads,
                             void* stream) {
  const FlashProblem& p = params.flash.problem;
  return with_indexed_bwd_dims(p, [&]<int kDims>() {
    const auto launch = [&]<Gradient kGradient>() {
      using Case = IndexedBwdCase<kThisDType, kDims, kGradient>;
      using Kernel = BwdKernel<Case::kTile>;
      const int pack = pack_of(params);
      const EntryGrid grid = {
          static_cast<int>((params.lists.slots + Kernel::kOwned - 1) / Kernel::kOwned),
          static_cast<int>(p.heads_q / pack), static_cast<int>(p.batch), pack,
          p.softmax_scale * kLog2E};
      if (grid.blocks() == 0) return 0;
      return ATTNFORGE_LAUNCH((indexed_dkdv_kernel<Case>), dim3(grid.blocks()),
                              dim3(32 * Case::kTile.warps), Kernel::kSharedBytes, stream, params,
                              grads, grid);
    };
    if constexpr (keys_and_values_apart(kThisDType, kIndexedBwdDims[kDims])) {
      const int error = launch.template operator()<Gradient::kValues>();
      return error != 0 ? error : launch.template operator()<Gradient::kKeys>();
    } else {
      return launch.template operator()<Gradient::kKeysValues>();
    }
  });
}

}  // namespace attnforge::cuda
