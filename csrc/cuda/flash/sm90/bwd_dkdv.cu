// Backward for sm_90a, gradients of keys and values (the mathematics: ../bwd_dkdv.cu).
//
// A block owns 128 keys and walks the rows that see them, over all query heads of its KV head, in
// one fixed order: every sum has one owner, the result is deterministic. As in FlashAttention-3
// (Shah et al., 2024) it works on transposed tiles, S^T = K Q^T and dP^T = V dO^T, so that P^T and
// dS^T are left operands in registers and never touch shared memory.
//
//   in flight   S and dP of tile j behind dV and dK of tile j - 1; 2^(S - LSE) under dP, dS under
//               the products of the other warpgroup
//   grid        key tiles * KV heads * batch; under a causal mask those that most rows see first
//   flops       2 (2 D + 2 Dv) per visible pair; head dims are padded to the next tile
//   bytes       K, V, dK, dV once, Q and dO once per key tile, from L2 mostly
#include "cuda/flash/sm90/bwd_block.h"

namespace attnforge::cuda {

template <class Case>
__global__ void __launch_bounds__(Consumers<Case::kTile.groups>::kBlockThreads, 1)
    flash_dkdv_sm90_kernel(const __grid_constant__ FlashBwdParams params,
                           const __grid_constant__ Sm90BwdMaps maps,
                           const __grid_constant__ ScoreMap map, int tiles) {
  constexpr Sm90BwdTile kTile = Case::kTile;
  using Block = Sm90BwdBlock<kTile>;
  using T = typename Block::T;
  using Team = typename Block::Team;
  constexpr int kOwned = Block::kOwned, kStreamed = Block::kStreamed;
  constexpr int kN = Block::kN, kD = Block::kD;
  const FlashProblem& p = params.problem;
  const int first = static_cast<int>(blockIdx.x) % tiles * kOwned;
  const int pair = static_cast<int>(blockIdx.x) / tiles, heads_k = static_cast<int>(p.heads_k);
  const int kv_head = pair % heads_k, group = static_cast<int>(p.heads_q) / heads_k;
  const Sequence seq = sequence(p, pair / heads_k);
  if (first >= seq.k_slots) return;

  // Rows by the place of their keys: key j stands at row j - offset. For both roles.
  const Window window = {map.keys.ahead, map.keys.back};
  const int last = at_most(first + kOwned, seq.k_len) - 1, shift = -seq.offset();
  const TileRange range =
      seen_range(first, last, first < seq.k_len ? seq.q_len : 0, shift, window, kStreamed);
  const int per_head = range.tiles(kStreamed), count = group * per_head;
  const auto head_of = [&](int j) { return kv_head * group + j / per_head; };
  const auto row_of = [&](int j) { return range.lo + j % per_head * kStreamed; };

  const Block block = {ptx::dynamic_shared_memory()};
  block.start(maps);
  if (Team::producing()) {
    ptx::lower_registers<kTile.producer_registers>();
    const auto place_of = [&](int j) { return seq.q_row + row_of(j); };
    if (warp_id() == 0 && ptx::elect_one()) {
      block.produce(
          count,
          [&](uint32_t barrier) {
            const int64_t row = seq.k_row + first;
            load_rows_of(block.own_a(), maps.k, params.k, seq, kv_head, row, barrier);
            load_rows_of(block.own_b(), maps.v, params.v, seq, kv_head, row, barrier);
          },
          [&](int j, uint32_t barrier) {
            const int head = head_of(j);
            const int64_t row = place_of(j);
            load_rows_of(block.stream_a(j), maps.q, params.q, seq, head, row, barrier);
            load_rows_of(block.stream_b(j), maps.dout, params.dout, seq, head, row, barrier);
          });
    } else if (warp_id() == 1) {
      block.produce_stats(count, params, seq.batch, head_of, place_of,
                          [&](int j) { return seq.q_len - row_of(j); });
    }
    return;
  }
  ptx::raise_registers<kTile.consumer_registers>();

  const bool full = first + kOwned <= seq.k_len;
  const auto whole = [&](int j) { return full && range.whole(row_of(j), kStreamed); };
  const int own_row = Block::warp_row();
  int at[2];  // rows at which this thread's keys stand
  bool used[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int key = first + fragment_row(own_row, 0, h);
    at[h] = key + shift;
    used[h] = key < seq.k_len;
  }
  const auto seen = [&](int h, int row) { return used[h] && sees(at[h], row, seq.q_len, window); };

  typename Block::Gradients dk, dv;
  zero<1, kD>(dk);
  zero<1, kD>(dv);
  typename Block::Scores s, dp, slope;
  Weights<kStreamed> weights, gradients;
  bool wild = false;
  if (count > 0) block.own_stage().wait(0);
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    const int row = row_of(j);
    const bool hidden = !whole(j);
    const auto seen_here = [&](int h, int column) { return seen(h, row + column); };
    wild |= block.await(j, hidden, [&](int r) { return row + r < seq.q_len; });
    block.scores(s, dp, j, [&] {
      ptx::wgmma_pin(flat<kD>(dk));
      ptx::wgmma_pin(flat<kD>(dv));
      ptx::wgmma_pin(weights);
      ptx::wgmma_pin(gradients);
    });

    const float slope2 =
        p.alibi_slopes == nullptr
            ? 0.0f
            : p.alibi_slopes[seq.batch * p.alibi_batch_stride + head_of(j)] * kLog2E;
    const auto alibi = [&](int, int n, int i) {
      const int distance = at[i / 2] - (row + fragment_column(n, i));
      return slope2 * static_cast<float>(distance < 0 ? -distance : distance);
    };
    if (kTile.features) fill<1, kN>(slope, 1.0f);
    to_logits<kTile.features, 1, kN>(s, map, alibi,
                                     [&](int m, int n, int i, float x) { slope[m][n][i] = x; });
    Block::to_weights(s, [&](int n) { return block.lse_of_columns(j, n); });
    if (hidden) Block::clear_hidden(s, seen_here);

    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(flat<kN>(dp));
    Block::to_gradients(dp, s, slope, [&](int n) { return block.delta_of_columns(j, n); });
    if (hidden) Block::clear_hidden(dp, seen_here);
    pack_weights<T, kStreamed>(weights, s);
    pack_weights<T, kStreamed>(gradients, dp);
    ptx::wgmma_fence();
    issue_nn(dv, weights, block.stream_b(j));
    issue_nn(dk, gradients, block.stream_a(j));
    ptx::wgmma_commit();
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_pin(flat<kD>(dk));
  ptx::wgmma_pin(flat<kD>(dv));

  const int d = static_cast<int>(p.head_dim), d_v = static_cast<int>(p.v_head_dim);
  if (Team::any(wild, block.scratch())) {
    for (int j = 0; j < count; ++j) {
      if (whole(j)) continue;
      for (int row = row_of(j); row < at_most(row_of(j) + kStreamed, range.hi); ++row) {
        const auto sees_row = [&](int, int h) { return seen(h, row); };
        const int64_t place = seq.q_row + row;
        add_wild<T, 1, kD>(dk, row_ptr<const T>(params.q, seq.batch, place, head_of(j)), d,
                           sees_row);
        add_wild<T, 1, kD>(dv, row_ptr<const T>(params.dout, seq.batch, place, head_of(j)), d_v,
                           sees_row);
      }
    }
  }

  const auto slot = [&](const TensorRef& t) {
    return [&](int r) -> T* {
      if (first + r >= seq.k_slots) return nullptr;
      return row_ptr<T>(t, seq.batch, seq.k_row + first + r, kv_head);
    };
  };
  Team::sync_group();  // all products of these keys are done: their tiles become the way out
  store_rows<1, kD>(
      block.own_a(), own_row, d, [&](int m, int n, int i) { return dk[m][n][i] * p.softmax_scale; },
      slot(params.dk));
  store_rows<1, kD>(
      block.own_b(), own_row, d_v, [&](int m, int n, int i) { return dv[m][n][i]; },
      slot(params.dv));
}

template <>
int flash_dkdv_sm90<kThisDType>(const FlashBwdParams& params, void* stream) {
  const FlashProblem& p = params.problem;
  return with_sm90_bwd(p, [&]<int kDims, bool kFeatures>() {
    using Case = Sm90BwdCase<kThisDType, kDims, kFeatures, Gradient::kKeysValues>;
    using Block = Sm90BwdBlock<Case::kTile>;
    const int tiles = static_cast<int>((p.seqlen_k + Block::kOwned - 1) / Block::kOwned);
    const int64_t blocks = int64_t{tiles} * p.heads_k * p.batch;
    if (blocks == 0) return 0;
    Sm90BwdMaps maps;
    if (const int error = map_problem(&maps, params, Block::kStreamed, Block::kOwned)) return error;
    return ATTNFORGE_LAUNCH((flash_dkdv_sm90_kernel<Case>), dim3(static_cast<unsigned>(blocks)),
                            dim3(Block::Team::kBlockThreads), Block::kSharedBytes, stream, params,
                            maps, ScoreMap::of(p), tiles);
  });
}

}  // namespace attnforge::cuda
