// The loop of the forward for sm_90a, as FlashAttention-3 has it (Shah et al., 2024): rows of a
// tile attend to a range of keys.
//
//   producer    one thread: Q of each piece of work and its K and V tiles by TMA, through stages
//   consumers   64 rows per warpgroup. S of tile j and O += P V of tile j - 1 are in flight
//               together; when S has landed, its softmax runs under P V. Groups issue in turn, so
//               that one's softmax also runs under the other's products
//
// Which keys: RowWork::keys, asked by both roles. Tiles hang over a sequence's end into whatever
// lies there: scores of such keys are hidden, and what is not finite in partly hidden tiles of V
// becomes 0 in shared memory before the product (hidden.h), so it reaches no row.
#pragma once

#include "cuda/flash/sm90/maps.h"
#include "cuda/flash/sm90/schedule.h"
#include "cuda/flash/sm90/tiles.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/tile/hidden.h"
#include "cuda/tile/pipeline.h"
#include "cuda/tile/scores.h"
#include "cuda/tile/softmax.h"
#include "cuda/tile/warpgroup.h"

namespace attnforge::cuda {

// What one warpgroup knows when a piece of work is done.
template <int kValueDim>
struct Sm90Result {
  RowSums<1> sums;
  Accumulators<1, kValueDim / 8> out;
};

template <class Case>
struct Sm90Walk {
  static constexpr Sm90Tile kTile = Case::kTile;
  using T = typename ElementOf<kTile.dtype>::Type;
  using Team = Consumers<kTile.groups>;
  static constexpr int kBlockM = 64 * kTile.groups, kBlockN = kTile.block_n;
  static constexpr int kValueDim = kTile.v_head_dim, kStages = kTile.stages;
  using QTile = PanelTile<T, kBlockM, kTile.head_dim>;
  using KTile = PanelTile<T, kBlockN, kTile.head_dim>;
  using VTile = PanelTile<T, kBlockN, kValueDim>;
  using Stages = Pipeline<kStages>;
  using Result = Sm90Result<kValueDim>;
  // Layout: Q, stages of K, stages of V, barriers of Q, K and V, scratch.
  static constexpr uint32_t kTileBytes = QTile::kBytes + kStages * (KTile::kBytes + VTile::kBytes);
  static constexpr uint32_t kSharedBytes =
      kTileBytes + Pipeline<1>::kBytes + 2 * Stages::kBytes + 4 * Team::kWarps;
  static_assert(kSharedBytes <= kMostSharedSm90);

  const FlashFwdParams& params;
  const Sm90Maps& maps;
  const Sm90Schedule& schedule;
  uint32_t shared;

  AF_DEVICE QTile q_tile() const { return {shared}; }
  AF_DEVICE KTile k_tile(int n) const {
    return {shared + QTile::kBytes + static_cast<uint32_t>(Stages::stage(n) * KTile::kBytes)};
  }
  AF_DEVICE VTile v_tile(int n) const {
    return {k_tile(0).base + kStages * KTile::kBytes +
            static_cast<uint32_t>(Stages::stage(n) * VTile::kBytes)};
  }
  AF_DEVICE Pipeline<1> q_stage() const { return {shared + kTileBytes}; }
  AF_DEVICE Stages k_stages() const { return {q_stage().base + Pipeline<1>::kBytes}; }
  AF_DEVICE Stages v_stages() const { return {k_stages().base + Stages::kBytes}; }
  AF_DEVICE uint32_t scratch() const { return v_stages().base + Stages::kBytes; }

  // By all threads of the block, before the roles part.
  AF_DEVICE void start() const {
    if (threadIdx.x == 0) {
      ptx::prefetch_tensor_map(&maps.q);
      ptx::prefetch_tensor_map(&maps.k);
      ptx::prefetch_tensor_map(&maps.v);
      q_stage().init(Team::kWarps);
      k_stages().init(Team::kWarps);
      v_stages().init(Team::kWarps);
      ptx::fence_mbarrier_init();
    }
    if (schedule.rows < kBlockM) {  // what no box fills has to be numbers
      clear_rows(q_tile(), schedule.rows, static_cast<int>(threadIdx.x), Team::kBlockThreads);
      ptx::fence_proxy_async();
    }
    ptx::sync_threads();
  }

  // The producer: tiles in the order in which consumers release their stages.
  AF_DEVICE void produce() const {
    int n = 0, piece = 0;  // key tiles and pieces of work so far
    schedule.each(params.problem, kBlockN, [&](const RowWork& work) {
      const int count = work.keys.tiles(kBlockN);
      const int batch = work.seq.batch, row = static_cast<int>(work.seq.k_row) + work.keys.lo;
      const auto load_keys = [&](int j) {
        k_stages().acquire(n + j, KTile::kBytes);
        load_panels(k_tile(n + j), maps.k, k_stages().full(n + j),
                    params.k.head_stride == 0 ? 0 : work.kv_head, row + j * kBlockN,
                    params.k.batch_stride == 0 ? 0 : batch);
      };
      const auto load_values = [&](int j) {
        v_stages().acquire(n + j, VTile::kBytes);
        load_panels(v_tile(n + j), maps.v, v_stages().full(n + j),
                    params.v.head_stride == 0 ? 0 : work.kv_head, row + j * kBlockN,
                    params.v.batch_stride == 0 ? 0 : batch);
      };
      if (count > 0) load_keys(0);  // before Q, whose memory the last results may still leave by
      q_stage().acquire(piece, static_cast<uint32_t>(schedule.rows * QTile::kRowBytes));
      load_panels(q_tile(), maps.q, q_stage().full(piece),
                  params.q.head_stride == 0 ? 0 : work.rows.first_head,
                  static_cast<int>(work.seq.q_row) + work.rows.first_query(),
                  params.q.batch_stride == 0 ? 0 : batch);
      ++piece;
#pragma unroll 1
      for (int j = 1; j < count; ++j) {
        load_keys(j);
        load_values(j - 1);
      }
      if (count > 0) load_values(count - 1);
      n += count;
    });
  }

  // A consumer: finish(work, piece, result) has the sums and outputs of this group's rows, and
  // releases q_stage() when the memory of Q is free.
  template <class Finish>
  AF_DEVICE void consume(const Finish& finish) const {
    int n = 0, piece = 0;
    if (kTile.turns) Turns<Team::kGroups>::start(Team::group());
    schedule.each(params.problem, kBlockN, [&](const RowWork& work) {
      Result result = {RowSums<1>::none(), {}};
      zero<1, kValueDim / 8>(result.out);
      q_stage().wait(piece);
      attend(work, n, result);
      finish(work, piece, result);
      ++piece;
      n += work.keys.tiles(kBlockN);
    });
    if (kTile.turns) Turns<Team::kGroups>::finish(Team::group());
  }

 private:
  using Scores = Accumulators<1, kBlockN / 8>;

  AF_DEVICE static void take_turn() {
    if (kTile.turns) Turns<Team::kGroups>::take(Team::group());
  }
  AF_DEVICE static void pass_turn() {
    if (kTile.turns) Turns<Team::kGroups>::pass(Team::group());
  }

  AF_DEVICE void attend(const RowWork& work, int n, Result& result) const {
    const FlashProblem& p = params.problem;
    const ScoreMap& map = schedule.grid.map;
    const Sequence& seq = work.seq;
    const TileRange& range = work.keys;
    const int count = range.tiles(kBlockN);
    if (count == 0) return;
    const auto places = RowPlaces<1>::of(p, seq, work.rows, 16 * Team::warp());
    const QTile q = q_tile();
    const int row = 64 * static_cast<int>(Team::group());
    bool wild = false, partly = false;

    Scores s;
    Weights<kBlockN> weights;
    float kept[2];
    // Products of tile j become weights. V of a tile that is partly hidden is tamed meanwhile.
    const auto weigh = [&](int j) {
      const int key = range.lo + j * kBlockN;
      const bool whole = range.whole(key, kBlockN);
      if (!whole) {
        partly = true;
        v_stages().wait(n + j);
        wild |= tame<Team>(v_tile(n + j), [&](int r) { return key + r < seq.k_len; });
        ptx::fence_proxy_async();
        Team::sync();
      }
      row_logits<kTile.features, 1, kBlockN / 8>(s, map, places, key, [](int, int, int, float) {});
      if (!whole) hide<1, kBlockN / 8>(s, places, key, seq.k_len, map.keys);
      softmax_step<1, kBlockN / 8>(s, result.sums,
                                   [&](int, int h, float factor) { kept[h] = factor; });
    };

    take_turn();
    k_stages().wait(n);
    ptx::wgmma_fence();
    issue_nt(s, q, row, k_tile(n));
    ptx::wgmma_commit();
    pass_turn();
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(flat<kBlockN / 8>(s));
    k_stages().release(n);
    weigh(0);
    pack_weights<T, kBlockN>(weights, s);

#pragma unroll 1
    for (int j = 1; j < count; ++j) {
      take_turn();
      k_stages().wait(n + j);
      ptx::wgmma_fence();
      issue_nt(s, q, row, k_tile(n + j));
      ptx::wgmma_commit();
      v_stages().wait(n + j - 1);
      ptx::wgmma_fence();
      issue_nn(result.out, weights, v_tile(n + j - 1));
      ptx::wgmma_commit();
      pass_turn();
      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(flat<kBlockN / 8>(s));
      k_stages().release(n + j);
      weigh(j);
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(flat<kValueDim / 8>(result.out));
      ptx::wgmma_pin(weights);
      v_stages().release(n + j - 1);
#pragma unroll
      for (int h = 0; h < 2; ++h) rescale<1, kValueDim / 8>(result.out, 0, h, kept[h]);
      pack_weights<T, kBlockN>(weights, s);
    }

    const int last = n + count - 1;
    v_stages().wait(last);
    ptx::wgmma_fence();
    issue_nn(result.out, weights, v_tile(last));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(flat<kValueDim / 8>(result.out));
    ptx::wgmma_pin(weights);
    v_stages().release(last);
    if (partly && Team::any(wild, scratch())) {
      add_hidden<T, 1, kValueDim / 8>(
          result.out, range, count, [&](int j) { return range.lo + j * kBlockN; }, kBlockN,
          row_ptr<const T>(params.v, seq.batch, seq.k_row, work.kv_head), params.v.seq_stride,
          static_cast<int>(p.v_head_dim), places, seq.k_len, map.keys);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) result.sums.total[0][h] = quad_sum(result.sums.total[0][h]);
  }
};

}  // namespace attnforge::cuda
