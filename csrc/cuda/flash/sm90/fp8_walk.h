// The loop of the fp8 forward for sm_90a: both products in e4m3, at twice the rate of 16 bits.
//
//   loader       one thread: Q of each piece of work and its K and V tiles by TMA, through stages
//   transposers  the three other warps of its group: V as wgmma wants it (tile/transpose.h)
//   consumers    64 rows per warpgroup: S = Q K^T, softmax, O += P V, tile by tile. One group's
//                softmax runs under the products of the other
//
// P is the sum of two e4m3 numbers, two products, so that weights are as exact as those of a bf16
// call. A tile's part of O is summed on its own and added to O in registers: the accumulators of
// e4m3 products keep fewer bits than fp32, which a sum over all keys would show.
//
// Which keys: RowWork::keys, asked by all three roles. What lies behind a mask: as walk.h has it,
// and e4m3 has NaN alone.
#pragma once

#include "cuda/flash/sm90/fp8_tiles.h"
#include "cuda/flash/sm90/maps.h"
#include "cuda/flash/sm90/schedule.h"
#include "cuda/tile/hidden.h"
#include "cuda/tile/pipeline.h"
#include "cuda/tile/softmax.h"
#include "cuda/tile/transpose.h"
#include "cuda/tile/warpgroup.h"

namespace attnforge::cuda {

// Issues acc = P B^T for all keys of P and kColumns rows of B from `first` on.
template <int kColumns, int kK, class TileB>
AF_DEVICE void issue_e4m3(Accumulators<1, kColumns / 8>& acc, const WeightsE4m3<kK>& p,
                          const TileB& b, int first AF_SITE) {
  static_assert(TileB::kDim == kK);
  const uint64_t right = b.along_rows(first);
  auto& d = flat<kColumns / 8>(acc);
#pragma unroll
  for (int k = 0; k < kK / 32; ++k) {
    ptx::wgmma_e4m3<kColumns>(d, p.high[k], right + TileB::columns_on(k), k > 0 AF_PASS_SITE);
    ptx::wgmma_e4m3<kColumns>(d, p.low[k], right + TileB::columns_on(k), true AF_PASS_SITE);
  }
}

template <class Case>
struct Sm90Fp8Walk {
  static constexpr Sm90Fp8Tile kTile = Case::kTile;
  using T = Float8;
  using Team = Consumers<kTile.groups>;
  static constexpr int kBlockM = 64 * kTile.groups, kBlockN = kTile.block_n;
  static constexpr int kN = kBlockN / 8, kD = kTile.head_dim / 8, kTransposers = 3;
  using QTile = PanelTile<T, kBlockM, kTile.head_dim>;
  using KTile = PanelTile<T, kBlockN, kTile.head_dim>;
  using VTile = PanelTile<T, kTile.head_dim, kBlockN>;  // transposed
  using Stages = Pipeline<kTile.stages>;
  // Layout: Q, stages of K, of V as it comes, of V transposed; barriers of each; scratch.
  static constexpr uint32_t kTileBytes =
      QTile::kBytes + kTile.stages * (2 * KTile::kBytes + VTile::kBytes);
  static constexpr uint32_t kSharedBytes =
      kTileBytes + Pipeline<1>::kBytes + 3 * Stages::kBytes + 4 * Team::kWarps;
  static_assert(kSharedBytes <= kMostSharedSm90);

  const FlashFwdParams& params;
  const Sm90Maps& maps;
  const Sm90Schedule& schedule;
  uint32_t shared;

  AF_DEVICE QTile q_tile() const { return {shared}; }
  AF_DEVICE KTile k_tile(int n) const { return {slot<KTile>(shared + QTile::kBytes, n)}; }
  AF_DEVICE KTile loaded_v(int n) const {
    return {slot<KTile>(shared + QTile::kBytes + kTile.stages * KTile::kBytes, n)};
  }
  AF_DEVICE VTile v_tile(int n) const {
    return {slot<VTile>(shared + QTile::kBytes + 2 * kTile.stages * KTile::kBytes, n)};
  }
  AF_DEVICE Pipeline<1> q_stage() const { return {shared + kTileBytes}; }
  AF_DEVICE Stages k_stages() const { return {q_stage().base + Pipeline<1>::kBytes}; }
  AF_DEVICE Stages loaded_stages() const { return {k_stages().base + Stages::kBytes}; }
  AF_DEVICE Stages v_stages() const { return {loaded_stages().base + Stages::kBytes}; }
  AF_DEVICE uint32_t scratch() const { return v_stages().base + Stages::kBytes; }

  // By all threads of the block, before the roles part.
  AF_DEVICE void start() const {
    if (threadIdx.x == 0) {
      ptx::prefetch_tensor_map(&maps.q);
      ptx::prefetch_tensor_map(&maps.k);
      ptx::prefetch_tensor_map(&maps.v);
      q_stage().init(Team::kWarps);
      k_stages().init(Team::kWarps);
      loaded_stages().init(kTransposers);
      v_stages().init(Team::kWarps, kTransposers);
      ptx::fence_mbarrier_init();
    }
    if (schedule.rows < kBlockM) {  // what no box fills has to be numbers
      clear_rows(q_tile(), schedule.rows, static_cast<int>(threadIdx.x), Team::kBlockThreads);
      ptx::fence_proxy_async();
    }
    ptx::sync_threads();
  }

  AF_DEVICE void load() const {
    int n = 0, piece = 0;  // key tiles and pieces of work so far
    each([&](const RowWork& work) {
      const int count = work.keys.tiles(kBlockN), batch = work.seq.batch;
      const auto load_keys = [&](const KTile& tile, const Stages& stages, const TensorMap& map,
                                 const TensorRef& t, int j) {
        stages.acquire(n + j, KTile::kBytes);
        load_panels(tile, map, stages.full(n + j), t.head_stride == 0 ? 0 : work.kv_head,
                    static_cast<int>(work.seq.k_row) + work.keys.lo + j * kBlockN,
                    t.batch_stride == 0 ? 0 : batch);
      };
#pragma unroll 1
      for (int j = 0; j < count; ++j) {
        load_keys(k_tile(n + j), k_stages(), maps.k, params.k, j);
        if (j == 0) load_rows(work, piece);
        load_keys(loaded_v(n + j), loaded_stages(), maps.v, params.v, j);
      }
      if (count == 0) load_rows(work, piece);
      ++piece;
      n += count;
    });
  }

  AF_DEVICE void transpose() const {
    int n = 0;
    each([&](const RowWork& work) {
      const int end = n + work.keys.tiles(kBlockN);
#pragma unroll 1
      for (; n < end; ++n) {
        v_stages().await_empty(n);
        loaded_stages().wait(n);
        transpose_bytes(loaded_v(n), v_tile(n), warp_id() - 1, kTransposers);
        ptx::fence_proxy_async();
        ptx::sync_warp();
        loaded_stages().release(n);
        v_stages().publish(n);
      }
    });
  }

  // A consumer: finish(work, sums, out) has this group's rows, O times kE4m3Scale.
  template <class Finish>
  AF_DEVICE void consume(const Finish& finish) const {
    int n = 0, piece = 0;
    each([&](const RowWork& work) {
      RowSums<1> sums = RowSums<1>::none();
      Accumulators<1, kD> out;
      zero<1, kD>(out);
      q_stage().wait(piece);
      attend(work, n, sums, out);
      ptx::sync_warp();
      q_stage().release(piece);
      finish(work, sums, out);
      ++piece;
      n += work.keys.tiles(kBlockN);
    });
  }

 private:
  template <class Tile>
  AF_DEVICE static uint32_t slot(uint32_t base, int n) {
    return base + static_cast<uint32_t>(Stages::stage(n) * Tile::kBytes);
  }
  template <class F>
  AF_DEVICE void each(const F& f) const {
    schedule.each(params.problem, kBlockN, f);
  }
  AF_DEVICE void load_rows(const RowWork& work, int piece) const {
    q_stage().acquire(piece, static_cast<uint32_t>(schedule.rows * QTile::kRowBytes));
    load_panels(q_tile(), maps.q, q_stage().full(piece),
                params.q.head_stride == 0 ? 0 : work.rows.first_head,
                static_cast<int>(work.seq.q_row) + work.rows.first_query(),
                params.q.batch_stride == 0 ? 0 : work.seq.batch);
  }
  // The map of scores of a KV head, whose products have a scale of their own.
  AF_DEVICE ScoreMap score_map(const RowWork& work) const {
    ScoreMap map = schedule.grid.map;
    const FlashProblem& p = params.problem;
    if (p.mods.qk_descale != nullptr) {
      const float factor = p.mods.qk_descale[work.seq.batch * p.heads_k + work.kv_head];
      map.scale *= factor;
      map.gain *= factor;
    }
    return map;
  }

  AF_DEVICE void attend(const RowWork& work, int n, RowSums<1>& sums,
                        Accumulators<1, kD>& out) const {
    const FlashProblem& p = params.problem;
    const Sequence& seq = work.seq;
    const TileRange& range = work.keys;
    const ScoreMap map = score_map(work);
    const auto places = RowPlaces<1>::of(p, seq, work.rows, 16 * Team::warp());
    const int row = 64 * static_cast<int>(Team::group()), count = range.tiles(kBlockN);
    const auto first_key = [&](int j) { return range.lo + j * kBlockN; };
    bool wild = false, partly = false;
#pragma unroll 1
    for (int j = 0; j < count; ++j, ++n) {
      const int key = first_key(j);
      const bool whole = range.whole(key, kBlockN);
      Accumulators<1, kN> s;
      k_stages().wait(n);
      ptx::wgmma_fence();
      issue_nt(s, q_tile(), row, k_tile(n));
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(flat<kN>(s));
      k_stages().release(n);
      if (!whole) {
        partly = true;
        v_stages().wait(n);
        wild |= tame<Team>(v_tile(n));
        ptx::fence_proxy_async();
        Team::sync();
      }
      row_logits<true, 1, kN>(s, map, places, key, [](int, int, int, float) {});
      if (!whole) hide<1, kN>(s, places, key, seq.k_len, map.keys);
      float kept[2];
      softmax_step<1, kN>(s, sums, [&](int, int h, float factor) { kept[h] = factor; });
      WeightsE4m3<kBlockN> weights;
      pack_weights_e4m3<kBlockN>(weights, s);
      v_stages().wait(n);
#pragma unroll
      for (int first = 0; first < kTile.head_dim; first += kTile.columns) {
        Accumulators<1, kTile.columns / 8> part;
        ptx::wgmma_fence();
        issue_e4m3<kTile.columns>(part, weights, v_tile(n), first);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(flat<kTile.columns / 8>(part));
        ptx::wgmma_pin(weights.high);
        ptx::wgmma_pin(weights.low);
#pragma unroll
        for (int d = 0; d < kTile.columns / 8; ++d) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& o = out[0][first / 8 + d][i];
            o = ptx::fma(o, kept[i / 2], part[0][d][i]);
          }
        }
      }
      v_stages().release(n);
    }
    if (partly && Team::any(wild, scratch())) add_hidden(work, places, out);
#pragma unroll
    for (int h = 0; h < 2; ++h) sums.total[0][h] = quad_sum(sums.total[0][h]);
  }

  // As hidden.h has it, for the order of channels in O.
  AF_DEVICE void add_hidden(const RowWork& work, const RowPlaces<1>& places,
                            Accumulators<1, kD>& out) const {
    const TileRange& range = work.keys;
    const Sequence& seq = work.seq;
    const auto* v = row_ptr<const T>(params.v, seq.batch, seq.k_row, work.kv_head);
    for (int first = range.lo; first < range.hi; first += kBlockN) {
      if (range.whole(first, kBlockN)) continue;
      for (int key = first; key < at_most(first + kBlockN, range.hi); ++key) {
        const auto value = [&](int row) {
          const int channel = e4m3_channel(row);
          return channel < params.problem.v_head_dim ? widen(v[key * params.v.seq_stride + channel])
                                                     : 0.0f;
        };
        add_wild_of<1, kD>(out, value, 0, [&](int, int h) {
          return sees(places.at[0][h], key, seq.k_len, schedule.grid.map.keys);
        });
      }
    }
  }
};

}  // namespace attnforge::cuda
