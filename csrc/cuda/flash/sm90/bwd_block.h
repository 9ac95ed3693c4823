// What the two kernels of the backward for sm_90a have in common: a block owns two tiles of one
// side (keys with values, or queries with output gradients) and streams two tiles of the other past
// them. Tiles are named a and b: a is of Q or K, b of dO or V.
//
//   producers   one thread: the owned tiles, then streamed ones through stages, by TMA. A stage of
//               rows has their statistics too, which another warp puts there
//   consumers   64 owned rows per warpgroup; S and dP come into their registers, whose weights are
//               the left operands of the products that give gradients
//
// Tiles hang over a sequence's end into whatever lies there. Weights of hidden pairs are set to 0,
// and in partly hidden tiles what is not finite in the right operand of a gradient's product
// (hidden.h), so that neither reaches a sum.
#pragma once

#include "cuda/flash/bwd_kernel.h"
#include "cuda/flash/sm90/bwd_tiles.h"
#include "cuda/flash/sm90/maps.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/tile/hidden.h"
#include "cuda/tile/pipeline.h"
#include "cuda/tile/scores.h"
#include "cuda/tile/warpgroup.h"

namespace attnforge::cuda {

// The kernels' one template argument, as FwdCase is.
template <DType kDType, int kDims, bool kFeatures, Gradient kGradient>
struct Sm90BwdCase {
  static constexpr Sm90BwdTile kTile =
      sm90_bwd_tile(kDType, kHeadDims[kDims], kFeatures, kGradient);
};

struct Sm90BwdMaps {
  TensorMap q, dout, k, v;
};

// A statistic of the four elements of a fragment: of their two rows, or of their two columns.
struct Four {
  float x[4];
};
AF_DEVICE Four by_row(const float (&x)[2]) {
  return {x[0], x[0], x[1], x[1]};
}
AF_DEVICE Four by_column(uint32_t shared, int n) {
  const auto pair =
      ptx::load_shared<FloatPair>(shared + static_cast<uint32_t>(4 * fragment_column(n, 0)));
  return {pair.x, pair.y, pair.x, pair.y};
}

template <Sm90BwdTile kTile>
struct Sm90BwdBlock {
  using T = typename ElementOf<kTile.dtype>::Type;
  using Team = Consumers<kTile.groups>;
  static constexpr int kOwned = kTile.owned(), kStreamed = kTile.streamed, kDim = kTile.head_dim;
  static constexpr int kN = kStreamed / 8, kD = kDim / 8;
  static constexpr bool kOwnsKeys = kTile.gradient == Gradient::kKeysValues;
  using Own = PanelTile<T, kOwned, kDim>;
  using Stream = PanelTile<T, kStreamed, kDim>;
  using Stages = Pipeline<kTile.stages>;
  using Scores = Accumulators<1, kN>;
  using Gradients = Accumulators<1, kD>;
  // Layout: owned tiles, stages of streamed ones, statistics of each stage, barriers, scratch.
  static constexpr uint32_t kOwnBytes = 2 * Own::kBytes, kStageBytes = 2 * Stream::kBytes;
  static constexpr uint32_t kTileBytes = kOwnBytes + Stages::kStages * kStageBytes;
  static constexpr uint32_t kStatBytes = kOwnsKeys ? 2 * 4 * kStreamed : 0;
  static constexpr uint32_t kSharedBytes = kTileBytes + Stages::kStages * kStatBytes +
                                           Pipeline<1>::kBytes + Stages::kBytes + 4 * Team::kWarps;
  static_assert(kSharedBytes <= kMostSharedSm90);

  uint32_t shared;

  AF_DEVICE Own own_a() const { return {shared}; }
  AF_DEVICE Own own_b() const { return {shared + Own::kBytes}; }
  AF_DEVICE Stream stream_a(int j) const {
    return {shared + kOwnBytes + static_cast<uint32_t>(Stages::stage(j) * kStageBytes)};
  }
  AF_DEVICE Stream stream_b(int j) const { return {stream_a(j).base + Stream::kBytes}; }
  AF_DEVICE uint32_t stats(int j) const {
    return shared + kTileBytes + static_cast<uint32_t>(Stages::stage(j) * kStatBytes);
  }
  AF_DEVICE Pipeline<1> own_stage() const {
    return {shared + kTileBytes + Stages::kStages * kStatBytes};
  }
  AF_DEVICE Stages stages() const { return {own_stage().base + Pipeline<1>::kBytes}; }
  AF_DEVICE uint32_t scratch() const { return stages().base + Stages::kBytes; }

  // First owned row of this warpgroup, and of this warp.
  AF_DEVICE static int group_row() { return 64 * static_cast<int>(Team::group()); }
  AF_DEVICE static int warp_row() { return 16 * Team::warp(); }

  // By all threads of the block, before the roles part.
  AF_DEVICE void start(const Sm90BwdMaps& maps) const {
    if (threadIdx.x == 0) {
      ptx::prefetch_tensor_map(&maps.q);
      ptx::prefetch_tensor_map(&maps.dout);
      ptx::prefetch_tensor_map(&maps.k);
      ptx::prefetch_tensor_map(&maps.v);
      own_stage().init(Team::kWarps);
      stages().init(Team::kWarps, kOwnsKeys ? 2 : 1);
      ptx::fence_mbarrier_init();
    }
    ptx::sync_threads();
  }

  // The producer of tiles, one thread, for `count` stages: load_own(barrier) and load(j, barrier)
  // start copies of two tiles.
  template <class LoadOwn, class Load>
  AF_DEVICE void produce(int count, const LoadOwn& load_own, const Load& load) const {
    if (count == 0) return;
    own_stage().acquire(0, kOwnBytes);
    load_own(own_stage().full(0));
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      stages().acquire(j, kStageBytes);
      load(j, stages().full(j));
    }
  }

  // The producer of statistics, a warp, where rows are streamed: row_of(j) is the first row of
  // stage j in memory, left_of(j) how many exist from there on. The others have no probabilities.
  template <class HeadOf, class RowOf, class LeftOf>
  AF_DEVICE void produce_stats(int count, const FlashBwdParams& params, int batch,
                               const HeadOf& head_of, const RowOf& row_of,
                               const LeftOf& left_of) const {
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      const float* lse = stat_ptr(params.lse, batch, row_of(j), head_of(j));
      const float* delta = stat_ptr(params.delta, batch, row_of(j), head_of(j));
      const int left = left_of(j);
      stages().await_empty(j);
#pragma unroll
      for (int i = 0; i < kStreamed / 32; ++i) {
        const int r = 32 * i + static_cast<int>(ptx::lane_id());
        const bool real = r < left;
        ptx::store_shared(stats(j) + 4 * r, base2_lse(real ? lse[r] : -kInf));
        ptx::store_shared(stats(j) + 4 * (kStreamed + r), real ? delta[r] : 0.0f);
      }
      stages().publish(j);
    }
  }

  // A consumer: stage j is there. partly: only some pairs of it are seen, so right operands of
  // gradients lose what is not finite: a, and b too where keys are owned. counts(r): row r of the
  // stage exists. Says whether an existing row lost something.
  template <class Counts>
  AF_DEVICE bool await(int j, bool partly, const Counts& counts) const {
    stages().wait(j);
    if (!partly) return false;
    bool wild = tame<Team>(stream_a(j), counts);
    if (kOwnsKeys) wild |= tame<Team>(stream_b(j), counts);
    ptx::fence_proxy_async();
    Team::sync();
    return wild;
  }

  // S of stage j, issued behind the gradients' products of stage j - 1, then dP. done() pins the
  // registers of the former, whose stage is released. Afterwards S is there and dP in flight.
  template <class Done>
  AF_DEVICE void scores(Scores& s, Scores& dp, int j, const Done& done) const {
    ptx::wgmma_fence();
    issue_nt(s, own_a(), group_row(), stream_a(j));
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    done();
    if (kStatBytes > 0) ptx::sync_warp();  // of reads of statistics
    if (j > 0) stages().release(j - 1);
    ptx::wgmma_fence();
    issue_nt(dp, own_b(), group_row(), stream_b(j));
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    ptx::wgmma_pin(flat<kN>(s));
  }

  // Statistics of the streamed rows that are the columns of fragment n. LSE is in base 2.
  AF_DEVICE Four lse_of_columns(int j, int n) const { return by_column(stats(j), n); }
  AF_DEVICE Four delta_of_columns(int j, int n) const {
    return by_column(stats(j) + 4 * kStreamed, n);
  }

  // P = 2^(S - LSE), in place of base-2 logits.
  template <class Lse>
  AF_DEVICE static void to_weights(Scores& s, const Lse& lse) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const Four base = lse(n);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[0][n][i] = ptx::exp2_approx(s[0][n][i] - base.x[i]);
    }
  }
  // dS = P (dP - delta), in place of dP; times the slopes of logits where there are features.
  template <class Delta>
  AF_DEVICE static void to_gradients(Scores& dp, const Scores& p, const Scores& slope,
                                     const Delta& delta) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const Four base = delta(n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = dp[0][n][i];
        x = p[0][n][i] * (x - base.x[i]);
        if (kTile.features) x *= slope[0][n][i];
      }
    }
  }
  // 0 for pairs that are not seen, whatever was there. seen(h, column).
  template <class Seen>
  AF_DEVICE static void clear_hidden(Scores& x, const Seen& seen) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!seen(i / 2, fragment_column(n, i))) x[0][n][i] = 0.0f;
      }
    }
  }
};

// Maps of a problem for boxes of so many rows of queries and of keys.
inline int map_problem(Sm90BwdMaps* maps, const FlashBwdParams& params, int rows, int keys) {
  const FlashProblem& p = params.problem;
  const int64_t rows_q = p.cu_seqlens_q == nullptr ? p.seqlen_q : p.total_q;
  const int64_t rows_k = p.cu_seqlens_k == nullptr ? p.seqlen_k : p.total_k;
  const Sm90Box q_box = {1, rows}, k_box = {1, keys};
  int error = map_rows(&maps->q, params.q, p, p.head_dim, p.heads_q, rows_q, q_box);
  if (error == 0) {
    error = map_rows(&maps->dout, params.dout, p, p.v_head_dim, p.heads_q, rows_q, q_box);
  }
  if (rows_k == 0) {  // nothing will be loaded, but a map needs memory
    maps->k = maps->v = maps->q;
    return error;
  }
  if (error == 0) error = map_rows(&maps->k, params.k, p, p.head_dim, p.heads_k, rows_k, k_box);
  if (error == 0) error = map_rows(&maps->v, params.v, p, p.v_head_dim, p.heads_k, rows_k, k_box);
  return error;
}

// Starts the copy of the tile of rows from `row` on of a tensor whose map it is.
template <class Tile>
AF_DEVICE void load_rows_of(const Tile& tile, const TensorMap& map, const TensorRef& t,
                            const Sequence& seq, int head, int64_t row, uint32_t barrier) {
  load_panels(tile, map, barrier, t.head_stride == 0 ? 0 : head, static_cast<int>(row),
              t.batch_stride == 0 ? 0 : seq.batch);
}

// f.template operator()<kDims, kFeatures>() for the kernel that serves the problem.
template <class F>
int with_sm90_bwd(const FlashProblem& p, const F& f) {
  const auto dims = [&]<int kDims>() {
    return has_features(p) ? f.template operator()<kDims, true>()
                           : f.template operator()<kDims, false>();
  };
  const int64_t width = p.head_dim > p.v_head_dim ? p.head_dim : p.v_head_dim;
  if (width <= kHeadDims[kSm90BwdDims[0]].qk) return dims.template operator()<kSm90BwdDims[0]>();
  if (width <= kHeadDims[kSm90BwdDims[1]].qk) return dims.template operator()<kSm90BwdDims[1]>();
  return kNoKernel;
}

}  // namespace attnforge::cuda
