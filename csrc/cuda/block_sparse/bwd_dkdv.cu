// Block-sparse backward, gradients of keys and values, from the inverse lists: as
// flash/bwd_dkdv.cu, over the rows that list a block.
//
// A block owns keys of one block of keys. Per list head it walks the stream of the list rows that
// name its block (tile/listed.h; a list row is q_block queries with `pack` heads each), gathered
// row by row, all query heads of its KV head in one fixed order. No atomics: every sum has one
// owner, GQA needs no reduction, and the result is deterministic.
//
// grid: parts of a block of keys, blocks, KV heads, batch. flops: 2 (2 D + 2 Dv) per listed pair;
// two kernels, for dV and for dK, where both accumulators do not fit the registers. bytes: K, V,
// dK, dV once, Q and dO of the listing rows once per part. Work follows the most popular block: one
// that every row lists is walked by one block of threads per part. Slots behind the used keys get
// zeros.
#include "cuda/block_sparse/instances.h"
#include "cuda/flash/bwd_kernel.h"

namespace attnforge::cuda {

// Blocks over parts of a block of keys, blocks of a sequence, KV heads and sequences.
struct KeyGrid {
  int parts, blocks, heads, batch;
  ScoreMap map;
  Divider row_size;  // rows of a list row: q_block * pack

  static KeyGrid of(const FlashProblem& p, const BlockListRef& lists, int owned) {
    return {static_cast<int>((lists.kv_block + owned - 1) / owned),
            static_cast<int>((p.seqlen_k + lists.kv_block - 1) / lists.kv_block),
            static_cast<int>(p.heads_k),
            static_cast<int>(p.batch),
            ScoreMap::of(p),
            Divider::by(lists.q_block * lists.pack)};
  }
  unsigned launched() const {
    return static_cast<unsigned>(int64_t{parts} * blocks * heads * batch);
  }
};

// The list rows that name a block of keys, as a stream of rows.
AF_DEVICE Stream listing_rows(const InverseRef& inverse, const KeyGrid& grid, int batch, int head,
                              int block) {
  const int64_t list = batch * inverse.batch + head * inverse.head;
  const int32_t* start =
      inverse.starts + list * (inverse.blocks + 1) + batch * inverse.each + block;
  return {inverse.rows + list * inverse.entries + start[0], start[1] - start[0], grid.row_size};
}

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    block_sparse_dkdv_kernel(const __grid_constant__ FlashBwdParams params,
                             const __grid_constant__ BlockListRef lists,
                             const __grid_constant__ InverseRef inverse,
                             const __grid_constant__ KeyGrid grid) {
  constexpr BwdTile kTile = Case::kTile;
  using Kernel = BwdKernel<kTile, 4>;  // beside a row: LSE, delta, position, slope
  using T = typename Kernel::T;
  using Team = typename Kernel::Team;
  constexpr int kN = Kernel::kN, kOwned = Kernel::kOwned, kStreamed = Kernel::kStreamed;
  constexpr int kD = Kernel::kD, kV = Kernel::kV;
  constexpr bool kWantK = kTile.gradient != Gradient::kValues;
  constexpr bool kWantV = kTile.gradient != Gradient::kKeys;
  const FlashProblem& p = params.problem;
  int id = static_cast<int>(blockIdx.x);
  const int part = id % grid.parts;
  id /= grid.parts;
  const int number = id % grid.blocks;
  id /= grid.blocks;
  const int kv_head = id % grid.heads;
  const Sequence seq = sequence(p, id / grid.heads);
  const int kv_block = static_cast<int>(lists.kv_block), pack = static_cast<int>(lists.pack);
  const int first = number * kv_block + part * kOwned;
  if (first >= seq.k_slots) return;
  const int end = at_most(first + kOwned, (number + 1) * kv_block);  // of the slots that are ours
  const int keys_end = at_most(end, seq.k_len);

  // Rows by the place of their keys: key j stands at row j - offset.
  const ScoreMap& map = grid.map;
  const Window window = {map.keys.ahead, map.keys.back};
  const int shift = -seq.offset();
  TileRange seen_rows =
      seen_range(first, keys_end - 1, first < keys_end ? seq.q_len : 0, shift, window, 1);
  seen_rows = {seen_rows.lo * pack, seen_rows.whole_lo * pack, seen_rows.whole_hi * pack,
               seen_rows.hi * pack};
  const bool full = first + kOwned <= keys_end;

  const Kernel block = {ptx::dynamic_shared_memory()};
  const int d = static_cast<int>(p.head_dim), dv = static_cast<int>(p.v_head_dim);
  const int own_row = Kernel::own_row();
  int at[2];  // rows at which this thread's keys stand
  bool used[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int key = first + fragment_row(own_row, 0, h);
    at[h] = key + shift;
    used[h] = key < keys_end;
  }
  const auto seen = [&](int h, int row) { return used[h] && sees(at[h], row, seq.q_len, window); };

  Accumulators<1, kWantK ? kD : 2> dk;
  Accumulators<1, kWantV ? kV : 2> dvalue;
  zero<1, kWantK ? kD : 2>(dk);
  zero<1, kWantV ? kV : 2>(dvalue);

  // What one list head adds. Rows of its stream are numbered as those of a RowTile.
  const auto add_head = [&](int head, bool is_first) {
    const Stream stream = listing_rows(inverse, grid, seq.batch, head, number);
    const TileRange range = stream.places(seen_rows);
    const RowTile rows = {0, seq.q_len * pack, pack, head * pack};
    const auto place_of = [&](int j) { return range.lo + j * kStreamed; };
    const auto whole = [&](int j) { return full && range.whole(place_of(j), kStreamed); };
    const auto row_of = [&](const TensorRef& t, int r) -> const T* {
      if (!rows.exists(r)) return nullptr;
      return row_ptr<const T>(t, seq.batch, seq.q_row + rows.query(r), rows.head(r));
    };
    const auto load_own = [&] {
      if (!is_first) return;
      load_rows<Team>(block.own_a(),
                      row_ptr<const T>(params.k, seq.batch, seq.k_row + first, kv_head),
                      params.k.seq_stride, keys_end - first, d);
      load_rows<Team>(block.own_b(),
                      row_ptr<const T>(params.v, seq.batch, seq.k_row + first, kv_head),
                      params.v.seq_stride, keys_end - first, dv);
    };
    const auto stat = [&](int j, int kind, int n) {
      return block.stats(j) + 4 * (kind * kStreamed + n);
    };
    const auto load = [&](int j) {
      const int place = place_of(j);
      load_tile<Team>(block.stream_a(j), d,
                      [&](int n) { return row_of(params.q, stream.at(place + n)); });
      load_tile<Team>(block.stream_b(j), dv,
                      [&](int n) { return row_of(params.dout, stream.at(place + n)); });
      for (int n = Team::rank(); n < kStreamed; n += Team::kThreads) {
        const int r = stream.at(place + n);
        const bool real = rows.exists(r);
        const int query = real ? rows.query(r) : kNowhere, query_head = real ? rows.head(r) : 0;
        const int64_t row = seq.q_row + (real ? query : 0);
        ptx::cp_async_4(stat(j, 0, n), stat_ptr(params.lse, seq.batch, row, query_head),
                        real ? 4 : 0);
        ptx::cp_async_4(stat(j, 1, n), stat_ptr(params.delta, seq.batch, row, query_head),
                        real ? 4 : 0);
        ptx::store_shared(stat(j, 2, n), query);
        ptx::store_shared(
            stat(j, 3, n),
            map.sloped ? p.alibi_slopes[seq.batch * p.alibi_batch_stride + query_head] * kLog2E
                       : 0.0f);
      }
    };
    bool wild = false;
    const auto settle = [&](int j) {
      if (whole(j)) return;
      if (kWantK) wild |= tame<Team>(block.stream_a(j));
      if (kWantV) wild |= tame<Team>(block.stream_b(j));
    };
    const auto step = [&](int j) {
      const bool hidden = !whole(j);
      const auto query = [&](int column) { return ptx::load_shared<int32_t>(stat(j, 2, column)); };
      typename Kernel::Scores s, factor;
      zero<1, kN>(s);
      product_nt<1, kN>(s, block.own_a(), own_row, block.stream_a(j), 0);
      const auto alibi = [&](int, int n, int i) {
        const int column = fragment_column(n, i), distance = at[i / 2] - query(column);
        return ptx::load_shared<float>(stat(j, 3, column)) *
               static_cast<float>(distance < 0 ? -distance : distance);
      };
      fill<1, kN>(factor, 1.0f);
      to_logits<true, 1, kN>(s, map, alibi,
                             [&](int m, int n, int i, float slope) { factor[m][n][i] = slope; });
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = fragment_column(n, i);
          const float lse = base2_lse(ptx::load_shared<float>(stat(j, 0, column)));
          float& x = s[0][n][i];
          x = ptx::exp2_approx(x - lse);
          if (hidden && (lse == kInf || !seen(i / 2, query(column)))) x = 0.0f;
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
            const float delta = ptx::load_shared<float>(stat(j, 1, column));
            float& x = ds[0][n][i];
            x = s[0][n][i] * (x - delta) * factor[0][n][i];
            if (hidden && !seen(i / 2, query(column))) x = 0.0f;
          }
        }
        product_nn<1, kN, kD>(dk, ds, block.stream_a(j), 0);
      }
    };
    const int count = range.tiles(kStreamed);
    if (!is_first) Team::sync();  // nobody works on the last head's tiles any more
    block.run(count, load_own, load, settle, step);

    if (Team::any(wild, block.scratch())) {
      for (int j = 0; j < count; ++j) {
        if (whole(j)) continue;
        for (int place = place_of(j); place < at_most(place_of(j) + kStreamed, range.hi); ++place) {
          const int r = stream.at(place);
          if (!rows.exists(r)) continue;
          const auto sees_row = [&](int, int h) { return seen(h, rows.query(r)); };
          if constexpr (kWantK) add_wild<T, 1, kD>(dk, row_of(params.q, r), d, sees_row);
          if constexpr (kWantV) add_wild<T, 1, kV>(dvalue, row_of(params.dout, r), dv, sees_row);
        }
      }
    }
  };
  const int heads = static_cast<int>(p.heads_q / p.heads_k) / pack;  // list heads of the KV head
  for (int n = 0; n < heads; ++n) add_head(kv_head * heads + n, n == 0);

  const auto slot = [&](const TensorRef& t) {
    return [&](int r) -> T* {
      if (first + r >= at_most(end, seq.k_slots)) return nullptr;
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
int block_sparse_dkdv<kThisDType>(const FlashBwdParams& params, const BlockListRef& lists,
                                  const InverseRef& inverse, void* stream) {
  const FlashProblem& p = params.problem;
  return with_listed_dims(p, [&]<int kDims>() {
    const auto launch = [&]<Gradient kGradient>() {
      using Case = ListedBwdCase<kThisDType, kDims, ListRows::kMany, kGradient>;
      using Kernel = BwdKernel<Case::kTile, 4>;
      const KeyGrid grid = KeyGrid::of(p, lists, Kernel::kOwned);
      if (grid.launched() == 0) return 0;
      return ATTNFORGE_LAUNCH((block_sparse_dkdv_kernel<Case>), dim3(grid.launched()),
                              dim3(32 * Case::kTile.warps), Kernel::kSharedBytes, stream, params,
                              lists, inverse, grid);
    };
    if constexpr (keys_and_values_apart(kThisDType, kListedDims[kDims])) {
      const int error = launch.template operator()<Gradient::kValues>();
      return error != 0 ? error : launch.template operator()<Gradient::kKeys>();
    } else {
      return launch.template operator()<Gradient::kKeysValues>();
    }
  });
}

}  // namespace attnforge::cuda
