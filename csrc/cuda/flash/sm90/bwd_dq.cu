// Backward for sm_90a, gradient of queries: dQ = scale dS K with dS recomputed as in bwd_dkdv.cu.
//
// A block owns 128 rows of one head and walks the keys they see, so that dQ has one owner and one
// order: deterministic, without a workspace, for computing S and dP once more (7 products per
// visible pair in all instead of 5; docs/notes/hopper_flash.md has the floors of both).
//
//   in flight   S and dP of tile j behind dQ of tile j - 1; 2^(S - LSE) under dP
//   grid        row tiles * heads * batch, late tiles first
//   flops       2 (2 D + Dv) per visible pair; head dims are padded to the next tile
//   bytes       Q, dO, dQ once, K and V once per row tile, from L2 mostly
#include "cuda/flash/sm90/bwd_block.h"

namespace attnforge::cuda {

template <class Case>
__global__ void __launch_bounds__(Consumers<Case::kTile.groups>::kBlockThreads, 1)
    flash_dq_sm90_kernel(const __grid_constant__ FlashBwdParams params,
                         const __grid_constant__ Sm90BwdMaps maps,
                         const __grid_constant__ ScoreMap map, int tiles) {
  constexpr Sm90BwdTile kTile = Case::kTile;
  using Block = Sm90BwdBlock<kTile>;
  using T = typename Block::T;
  using Team = typename Block::Team;
  constexpr int kOwned = Block::kOwned, kStreamed = Block::kStreamed;
  constexpr int kN = Block::kN, kD = Block::kD;
  const FlashProblem& p = params.problem;
  const int tile = tiles - 1 - static_cast<int>(blockIdx.x) % tiles;
  const int pair = static_cast<int>(blockIdx.x) / tiles, heads = static_cast<int>(p.heads_q);
  const int head = pair % heads, kv_head = head / (heads / static_cast<int>(p.heads_k));
  const Sequence seq = sequence(p, pair / heads);
  const RowTile rows = {tile * kOwned, seq.q_len, 1, head};
  if (rows.first >= seq.q_len) return;

  // For both roles.
  const TileRange range = seen_range(rows.first_query(), rows.last_query(kOwned), seq.k_len,
                                     seq.offset(), map.keys, kStreamed);
  const int count = range.tiles(kStreamed);
  const auto key_of = [&](int j) { return range.lo + j * kStreamed; };
  const int64_t first_row = seq.q_row + rows.first;

  const Block block = {ptx::dynamic_shared_memory()};
  block.start(maps);
  if (Team::producing()) {
    ptx::lower_registers<kTile.producer_registers>();
    if (warp_id() != 0 || !ptx::elect_one()) return;
    block.produce(
        count,
        [&](uint32_t barrier) {
          load_rows_of(block.own_a(), maps.q, params.q, seq, head, first_row, barrier);
          load_rows_of(block.own_b(), maps.dout, params.dout, seq, head, first_row, barrier);
        },
        [&](int j, uint32_t barrier) {
          const int64_t row = seq.k_row + key_of(j);
          load_rows_of(block.stream_a(j), maps.k, params.k, seq, kv_head, row, barrier);
          load_rows_of(block.stream_b(j), maps.v, params.v, seq, kv_head, row, barrier);
        });
    return;
  }
  ptx::raise_registers<kTile.consumer_registers>();

  const int own_row = Block::warp_row();
  const RowPlaces<1> places = RowPlaces<1>::of(p, seq, rows, own_row);
  float lse[2], delta[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = fragment_row(own_row, 0, h);
    const int64_t row = first_row + r;
    lse[h] = rows.exists(r) ? base2_lse(*stat_ptr(params.lse, seq.batch, row, head)) : kInf;
    delta[h] = rows.exists(r) ? *stat_ptr(params.delta, seq.batch, row, head) : 0.0f;
  }

  typename Block::Gradients dq;
  zero<1, kD>(dq);
  typename Block::Scores s, dp, slope;
  Weights<kStreamed> gradients;
  bool wild = false;
  if (count > 0) block.own_stage().wait(0);
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    const int key = key_of(j);
    const bool hidden = !range.whole(key, kStreamed);
    wild |= block.await(j, hidden, [&](int r) { return key + r < seq.k_len; });
    block.scores(s, dp, j, [&] {
      ptx::wgmma_pin(flat<kD>(dq));
      ptx::wgmma_pin(gradients);
    });

    if (kTile.features) fill<1, kN>(slope, 1.0f);
    row_logits<kTile.features, 1, kN>(s, map, places, key,
                                      [&](int m, int n, int i, float x) { slope[m][n][i] = x; });
    Block::to_weights(s, [&](int) { return by_row(lse); });
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(flat<kN>(dp));
    Block::to_gradients(dp, s, slope, [&](int) { return by_row(delta); });
    if (hidden) {
      Block::clear_hidden(dp, [&](int h, int column) {
        return sees(places.at[0][h], key + column, seq.k_len, map.keys);
      });
    }
    pack_weights<T, kStreamed>(gradients, dp);
    ptx::wgmma_fence();
    issue_nn(dq, gradients, block.stream_a(j));
    ptx::wgmma_commit();
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_pin(flat<kD>(dq));

  const int d = static_cast<int>(p.head_dim);
  if (Team::any(wild, block.scratch())) {
    add_hidden<T, 1, kD>(dq, range, count, key_of, kStreamed,
                         row_ptr<const T>(params.k, seq.batch, seq.k_row, kv_head),
                         params.k.seq_stride, d, places, seq.k_len, map.keys);
  }
  Team::sync_group();  // all products of these rows are done: their tile becomes the way out
  store_rows<1, kD>(
      block.own_a(), own_row, d, [&](int m, int n, int i) { return dq[m][n][i] * p.softmax_scale; },
      [&](int r) -> T* {
        if (!rows.exists(r)) return nullptr;
        return row_ptr<T>(params.dq, seq.batch, first_row + r, head);
      });
}

template <>
int flash_dq_sm90<kThisDType>(const FlashBwdParams& params, void* stream) {
  const FlashProblem& p = params.problem;
  return with_sm90_bwd(p, [&]<int kDims, bool kFeatures>() {
    using Case = Sm90BwdCase<kThisDType, kDims, kFeatures, Gradient::kQueries>;
    using Block = Sm90BwdBlock<Case::kTile>;
    const int tiles = static_cast<int>((p.seqlen_q + Block::kOwned - 1) / Block::kOwned);
    const int64_t blocks = int64_t{tiles} * p.heads_q * p.batch;
    if (blocks == 0) return 0;
    Sm90BwdMaps maps;
    if (const int error = map_problem(&maps, params, Block::kOwned, Block::kStreamed)) return error;
    return ATTNFORGE_LAUNCH((flash_dq_sm90_kernel<Case>), dim3(static_cast<unsigned>(blocks)),
                            dim3(Block::Team::kBlockThreads), Block::kSharedBytes, stream, params,
                            maps, ScoreMap::of(p), tiles);
  });
}

}  // namespace attnforge::cuda
