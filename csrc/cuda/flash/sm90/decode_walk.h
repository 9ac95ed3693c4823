// The loop of the decode for sm_90a: the rows of a KV head's group attend to a range of keys.
//
//   producer    one thread: K and V tiles by TMA, through stages
//   consumers   64 rows: S = Q K^T, softmax, O += P V, tile by tile. Two groups, where V has more
//               channels than the registers of one have room for, compute the same scores and have
//               half of the channels each; they meet only where a tile is partly hidden
//
// Which keys: RowWork::keys, which both roles have from row_work. Tiles hang over a sequence's end
// as those of the forward do (walk.h). A latent V is a part of K's tile: what is not finite there
// becomes 0 only when nobody needs K any more.
//
// Q comes by cp.async, row by row: a tile's rows are any 64 of a group's heads and queries, of any
// group size, which is more than a box can say.
#pragma once

#include "cuda/flash/schedule.h"
#include "cuda/flash/sm90/decode_tiles.h"
#include "cuda/flash/sm90/maps.h"
#include "cuda/tile/hidden.h"
#include "cuda/tile/pipeline.h"
#include "cuda/tile/softmax.h"
#include "cuda/tile/warpgroup.h"

namespace attnforge::cuda {

struct Sm90KeyMaps {
  TensorMap k, v;
};

template <class Case>
struct Sm90Decode {
  static constexpr Sm90DecodeTile kTile = Case::kTile;
  using T = typename ElementOf<kTile.dtype>::Type;
  using Team = Consumers<kTile.groups>;
  static constexpr int kRows = kSm90DecodeRows, kBlockN = kTile.block_n;
  static constexpr int kN = kBlockN / 8, kD = kTile.v_head_dim / kTile.groups / 8;
  using QTile = PanelTile<T, kRows, kTile.head_dim>;
  using KTile = PanelTile<T, kBlockN, kTile.head_dim>;
  using VTile = PanelTile<T, kBlockN, kTile.v_head_dim>;
  using VPart = PanelTile<T, kBlockN, 8 * kD>;  // the channels of one group: panels of VTile
  using Stages = Pipeline<kTile.stages>;
  using Output = Accumulators<1, kD>;
  // Layout: Q, stages of K and V, barriers, scratch.
  static constexpr uint32_t kStageBytes = KTile::kBytes + (kTile.latent ? 0 : VTile::kBytes);
  static constexpr uint32_t kTileBytes = QTile::kBytes + kTile.stages * kStageBytes;
  static constexpr uint32_t kSharedBytes = kTileBytes + Stages::kBytes + 4 * Team::kWarps;
  static_assert(kTile.stages >= 2 && kTile.blocks * (kSharedBytes + 1024) <= 228 * 1024);
  static_assert(VTile::kBytes == kTile.groups * VPart::kBytes);

  const FlashFwdParams& params;
  const Sm90KeyMaps& maps;
  const ScoreMap& map;
  const RowWork& work;
  uint32_t shared;

  AF_DEVICE QTile q_tile() const { return {shared}; }
  AF_DEVICE KTile k_tile(int j) const {
    return {shared + QTile::kBytes + static_cast<uint32_t>(Stages::stage(j)) * kStageBytes};
  }
  AF_DEVICE VTile v_tile(int j) const {
    return {k_tile(j).base + (kTile.latent ? 0 : KTile::kBytes)};
  }
  AF_DEVICE VPart v_part(int j) const { return {v_tile(j).base + Team::group() * VPart::kBytes}; }
  AF_DEVICE Stages stages() const { return {shared + kTileBytes}; }
  AF_DEVICE uint32_t scratch() const { return stages().base + Stages::kBytes; }

  AF_DEVICE static int first_row() { return Team::warp() % 4 * 16; }  // of this warp
  AF_DEVICE static int first_fragment() { return static_cast<int>(Team::group()) * kD; }
  AF_DEVICE int count() const { return work.keys.tiles(kBlockN); }
  AF_DEVICE int first_key(int j) const { return work.keys.lo + j * kBlockN; }

  // Row r of the tile in a tensor like q, or null if it does not exist.
  AF_DEVICE T* row_of(const TensorRef& t, int r) const {
    if (!work.rows.exists(r)) return nullptr;
    return row_ptr<T>(t, work.seq.batch, work.seq.q_row + work.rows.query(r), work.rows.head(r));
  }

  // By all threads of the block, before the roles part.
  AF_DEVICE void start() const {
    if (threadIdx.x == 0) {
      if (count() > 0) {  // else there may be no map
        ptx::prefetch_tensor_map(&maps.k);
        ptx::prefetch_tensor_map(&maps.v);
      }
      stages().init(Team::kWarps);
      ptx::fence_mbarrier_init();
    }
    ptx::sync_threads();
  }

  AF_DEVICE void produce() const {
    const auto load = [&](const auto& tile, const TensorMap& from, const TensorRef& t, int j) {
      load_panels(tile, from, stages().full(j), t.head_stride == 0 ? 0 : work.kv_head,
                  static_cast<int>(work.seq.k_row) + first_key(j),
                  t.batch_stride == 0 ? 0 : work.seq.batch);
    };
    const int tiles = count();
#pragma unroll 1
    for (int j = 0; j < tiles; ++j) {
      stages().acquire(j, kStageBytes);
      load(k_tile(j), maps.k, params.k, j);
      if constexpr (!kTile.latent) load(v_tile(j), maps.v, params.v, j);
    }
  }

  // A consumer: sums of its rows, and O of its group's channels, which must be zero before.
  AF_DEVICE void consume(RowSums<1>& sums, Output& out) const {
    const FlashProblem& p = params.problem;
    const Sequence& seq = work.seq;
    load_tile<Team>(q_tile(), static_cast<int>(p.head_dim),
                    [&](int r) -> const T* { return row_of(params.q, r); });
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::fence_proxy_async();
    Team::sync();

    const auto places = RowPlaces<1>::of(p, seq, work.rows, first_row());
    Accumulators<1, kN> s;
    Weights<kBlockN> weights;
    bool wild = false, partly = false;
    const int tiles = count();
#pragma unroll 1
    for (int j = 0; j < tiles; ++j) {
      const int key = first_key(j);
      const bool whole = work.keys.whole(key, kBlockN);
      stages().wait(j);
      ptx::wgmma_fence();
      issue_nt(s, q_tile(), 0, k_tile(j));
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(flat<kN>(s));
      if (!whole) {
        partly = true;
        if (kTile.latent) Team::sync();  // all scores of the tile are there
        wild |= tame<Team>(v_tile(j), [&](int r) { return key + r < seq.k_len; });
        ptx::fence_proxy_async();
        Team::sync();
      }
      row_logits<true, 1, kN>(s, map, places, key, [](int, int, int, float) {});
      if (!whole) hide<1, kN>(s, places, key, seq.k_len, map.keys);
      online_softmax<1, kN, kD>(s, sums, out);
      pack_weights<T, kBlockN>(weights, s);
      ptx::wgmma_fence();
      issue_nn(out, weights, v_part(j));
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(flat<kD>(out));
      ptx::wgmma_pin(weights);
      stages().release(j);
    }

    if (partly && Team::any(wild, scratch())) {
      const int first = 8 * first_fragment();
      add_hidden<T, 1, kD>(
          out, work.keys, tiles, [&](int j) { return first_key(j); }, kBlockN,
          row_ptr<const T>(params.v, seq.batch, seq.k_row, work.kv_head) + first,
          params.v.seq_stride, static_cast<int>(p.v_head_dim) - first, places, seq.k_len, map.keys);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) sums.total[0][h] = quad_sum(sums.total[0][h]);
  }
};

}  // namespace attnforge::cuda
