// The loop of the forward kernels: rows of a tile attend to a range of keys (FlashAttention-2
// order, Dao 2023). Each key tile: S = Q K^T, logits, online softmax, O += P V; K and V tiles
// stream through kStages slots of shared memory.
//
// Pipeline: one cp.async group per key tile, K and V together. At tile j a thread waits for its own
// part of it, then the team syncs once: now everybody's part is there, and nobody works on tile
// j - 1 any more, whose slot takes tile j + kStages - 1.
//
// Which keys: TileRange, from the one function of sequence.h, for loads and products alike. Keys at
// or past the sequence's length are zeros and never read.
#pragma once

#include "cuda/tile/hidden.h"
#include "cuda/tile/scores.h"
#include "cuda/tile/softmax.h"

namespace attnforge::cuda {

// kTraits: T, kDim, kValueDim, kFeatures, kMTiles (fragments of 16 rows per warp), kBlockN,
// kStages, Team.
template <class Traits>
struct Attend {
  using T = typename Traits::T;
  using Team = typename Traits::Team;
  static constexpr int kM = Traits::kMTiles;
  static constexpr int kBlockN = Traits::kBlockN, kStages = Traits::kStages;
  static constexpr int kRows = 16 * kM * (Team::kTeams == 1 ? Team::kWarps : 1);
  using QTile = SharedTile<T, kRows, Traits::kDim>;
  using KTile = SharedTile<T, kBlockN, Traits::kDim>;
  using VTile = SharedTile<T, kBlockN, Traits::kValueDim>;
  static constexpr int kStageBytes = KTile::kBytes + VTile::kBytes;
  static constexpr int kStreamBytes = Team::kTeams * kStages * kStageBytes;
  static constexpr int kScratchBytes = 4 * Team::kWarps;
  // Layout: Q, then the stages of each team, then scratch.
  static constexpr int kSharedBytes = QTile::kBytes + kStreamBytes + kScratchBytes;

  using Output = Accumulators<kM, Traits::kValueDim / 8>;

  uint32_t shared;
  const FlashProblem& p;
  Sequence seq;
  RowTile rows;
  TileRange range;
  const T *k, *v;  // first key of the KV head
  int64_t k_stride, v_stride;
  RowPlaces<kM> places;
  const ScoreMap& map;

  AF_DEVICE QTile q_tile() const { return {shared}; }
  AF_DEVICE uint32_t stage(int slot) const {
    return shared + QTile::kBytes + (Team::index() * kStages + slot) * kStageBytes;
  }
  AF_DEVICE KTile k_tile(int slot) const { return {stage(slot)}; }
  AF_DEVICE VTile v_tile(int slot) const { return {stage(slot) + KTile::kBytes}; }
  AF_DEVICE uint32_t stream() const { return shared + QTile::kBytes; }
  AF_DEVICE uint32_t scratch() const { return stream() + kStreamBytes; }

  AF_DEVICE static int first_row() { return Team::row_warp() * 16 * kM; }
  // Key tiles are dealt to the teams of a block in turn.
  AF_DEVICE int tiles() const {
    const int all = range.tiles(kBlockN);
    return at_least(0, all - Team::index() + Team::kTeams - 1) / Team::kTeams;
  }
  AF_DEVICE int first_key(int j) const {
    return range.lo + (j * Team::kTeams + Team::index()) * kBlockN;
  }

  AF_DEVICE void load_keys(int j) const {
    const int slot = j % kStages, first = first_key(j), rows_left = seq.k_len - first;
    load_rows<Team>(k_tile(slot), k + first * k_stride, k_stride, rows_left,
                    static_cast<int>(p.head_dim));
    load_rows<Team>(v_tile(slot), v + first * v_stride, v_stride, rows_left,
                    static_cast<int>(p.v_head_dim));
  }

  // q_row(r): row r of the tile, or null. out must be zero.
  template <class QRow>
  AF_DEVICE void run(const QRow& q_row, RowSums<kM>& sums, Output& out) const {
    using Block = BlockTeam<Team::kWarps>;
    load_tile<Block>(q_tile(), static_cast<int>(p.head_dim), q_row);
    ptx::cp_async_commit();
    const int count = tiles();
#pragma unroll
    for (int j = 0; j < kStages - 1; ++j) {
      if (j < count) load_keys(j);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<kStages - 1>();  // Q
    Block::sync();

    bool wild = false;
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      const int slot = j % kStages, key = first_key(j);
      const bool whole = range.whole(key, kBlockN);
      ptx::cp_async_wait<kStages - 2>();
      if (!whole) wild |= tame<Team>(v_tile(slot));
      Team::sync();
      if (j + kStages - 1 < count) load_keys(j + kStages - 1);
      ptx::cp_async_commit();

      Accumulators<kM, kBlockN / 8> s;
      zero<kM, kBlockN / 8>(s);
      product_nt<kM, kBlockN / 8>(s, q_tile(), first_row(), k_tile(slot), 0);
      row_logits<Traits::kFeatures, kM, kBlockN / 8>(s, map, places, key,
                                                     [](int, int, int, float) {});
      if (!whole) hide<kM, kBlockN / 8>(s, places, key, seq.k_len, map.keys);
      online_softmax<kM, kBlockN / 8, Traits::kValueDim / 8>(s, sums, out);
      product_nn<kM, kBlockN / 8, Traits::kValueDim / 8>(out, s, v_tile(slot), 0);
    }
    ptx::cp_async_wait<0>();
    if (Team::any(wild, scratch())) {
      add_hidden<T, kM, Traits::kValueDim / 8>(
          out, range, tiles(), [&](int j) { return first_key(j); }, kBlockN, v, v_stride,
          static_cast<int>(p.v_head_dim), places, seq.k_len, map.keys);
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) sums.total[m][h] = quad_sum(sums.total[m][h]);
    }
  }
};

}  // namespace attnforge::cuda
