// The loop of the forward kernels: rows of a tile attend to a range of keys (FlashAttention-2
// order, Dao 2023). Each key tile: S = Q K^T, logits, online softmax, O += P V; K and V tiles
// stream through kStages slots of shared memory, from a store of keys (tile/keys.h).
//
// Pipeline: one cp.async group per key tile, K and V together. At tile j a thread waits for its own
// part of it, then the team syncs once: now everybody's part is there, and nobody works on tile
// j - 1 any more, whose slot takes tile j + kStages - 1. A store that converts tiles syncs once
// more, before it overwrites the converted one.
//
// Which keys: TileRange, from the one function of sequence.h, for loads and products alike. Keys at
// or past the sequence's length are zeros and never read. A store of lists walks places of a list.
#pragma once

#include "cuda/tile/keys.h"
#include "cuda/tile/mods.h"
#include "cuda/tile/softmax.h"

namespace attnforge::cuda {

// kTraits: T, Keys, kDim, kValueDim, kFeatures, kMTiles (fragments of 16 rows per warp), kBlockN,
// kStages, Team, Mod (tile/mods.h).
template <class Traits>
struct Attend {
  using T = typename Traits::T;
  using Team = typename Traits::Team;
  using Keys = typename Traits::Keys;
  using Mod = typename Traits::Mod;
  static constexpr int kM = Traits::kMTiles;
  static constexpr int kBlockN = Traits::kBlockN, kStages = Traits::kStages;
  static constexpr int kN = kBlockN / 8, kD = Traits::kValueDim / 8 / Team::kColumnWarps;
  static constexpr int kRows = 16 * kM * Team::kRowWarps;
  using QTile = SharedTile<T, kRows, Traits::kDim>;
  static constexpr int kTeamBytes = kStages * Keys::kStageBytes + Keys::kWorkBytes;
  static constexpr int kStreamBytes = Team::kTeams * kTeamBytes;
  // Scores of a column team's warps, before they are added up.
  static constexpr int kPartBytes = Team::kColumnWarps > 1 ? 16 * 32 * kM * kN : 0;
  static constexpr int kScratchBytes = 4 * Team::kWarps + Team::kWarps * kPartBytes;
  // Layout: Q, then the stages of each team, then scratch.
  static constexpr int kSharedBytes = QTile::kBytes + kStreamBytes + kScratchBytes;

  using Scores = Accumulators<kM, kN>;
  using Output = Accumulators<kM, kD>;

  uint32_t shared;
  const FlashProblem& p;
  Sequence seq;
  RowTile rows;
  TileRange range;
  Keys keys;
  RowPlaces<kM> places;
  const ScoreMap& map;
  const Mod& mod;

  AF_DEVICE QTile q_tile() const { return {shared}; }
  AF_DEVICE uint32_t stream() const { return shared + QTile::kBytes; }
  AF_DEVICE uint32_t stage(int slot) const {
    return stream() + Team::index() * kTeamBytes + slot * Keys::kStageBytes;
  }
  AF_DEVICE uint32_t work() const { return stage(kStages); }
  AF_DEVICE uint32_t parts() const { return stream() + kStreamBytes; }
  AF_DEVICE uint32_t scratch() const { return parts() + Team::kWarps * kPartBytes; }

  AF_DEVICE static int first_row() { return Team::row_warp() * 16 * kM; }
  AF_DEVICE static int first_fragment() { return Team::column_warp() * kD; }  // of the output
  // Key tiles are dealt to the teams of a block in turn.
  AF_DEVICE int tiles() const {
    const int all = range.tiles(kBlockN);
    return at_least(0, all - Team::index() + Team::kTeams - 1) / Team::kTeams;
  }
  AF_DEVICE int first_key(int j) const {
    return range.lo + (j * Team::kTeams + Team::index()) * kBlockN;
  }
  // Whether all rows see a whole tile; a mask of the caller's own may hide any key.
  AF_DEVICE bool whole(int first) const { return !Mod::kMasks && range.whole(first, kBlockN); }
  AF_DEVICE void load_keys(int j) const {
    const int first = first_key(j);
    keys.template load<Team>(stage(j % kStages), first, seq.k_len - first);
  }

  // S = Q K^T; a column team sums over the channels of its warps in their order.
  template <class KTile>
  AF_DEVICE void products(Scores& s, const KTile& k) const {
    zero<kM, kN>(s);
    if constexpr (Team::kColumnWarps == 1) {
      product_nt<kM, kN>(s, q_tile(), first_row(), k, 0);
    } else {
      constexpr int kChunks = QTile::kChunks / Team::kColumnWarps;
      product_nt<kM, kN, QTile, KTile, kChunks>(s, q_tile(), first_row(), k, 0,
                                                Team::column_warp() * kChunks);
      each_part([&](int m, int n, uint32_t at) {
        const ptx::U32x4 part = {ptx::bits_of_float(s[m][n][0]), ptx::bits_of_float(s[m][n][1]),
                                 ptx::bits_of_float(s[m][n][2]), ptx::bits_of_float(s[m][n][3])};
        ptx::store_shared(at + Team::column_warp() * kPartBytes, part);
      });
      Team::sync();
      zero<kM, kN>(s);
      each_part([&](int m, int n, uint32_t at) {
        for (int w = 0; w < Team::kColumnWarps; ++w) {
          const auto part = ptx::load_shared<ptx::U32x4>(at + w * kPartBytes);
#pragma unroll
          for (int i = 0; i < 4; ++i) s[m][n][i] += ptx::float_from_bits(part.v[i]);
        }
      });
    }
  }
  template <class F>
  AF_DEVICE void each_part(const F& f) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        f(m, n, parts() + 16 * ((m * kN + n) * 32 + static_cast<int>(ptx::lane_id())));
      }
    }
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
    [[maybe_unused]] typename Keys::template RowState<kM> state;
    if constexpr (Keys::kCodes) {
      keys.begin(state, q_tile(), first_row(), first_key(0), range.hi);
    }

    bool wild = false;
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      const int key = first_key(j);
      const uint32_t landed = stage(j % kStages);
      const bool whole = this->whole(key);
      ptx::cp_async_wait<kStages - 2>();
      if constexpr (Keys::kWorkBytes > 0) Team::sync();
      wild |= keys.template settle<Team>(landed, work(), whole);
      Team::sync();
      if (j + kStages - 1 < count) load_keys(j + kStages - 1);
      ptx::cp_async_commit();

      Scores s;
      products(s, Keys::k_tile(landed, work()));
      if (Keys::kShared && !whole) {  // nobody needs K any more
        wild |= tame<Team>(Keys::v_tile(landed, work()));
        Team::sync();
      }
      if constexpr (Keys::kCodes) keys.template decode_scores<kM, kN>(s, landed, state);
      const auto columns = keys.columns(landed, key);
      row_logits<Traits::kFeatures, kM, kN>(s, map, places, columns, [](int, int, int, float) {});
      if constexpr (Mod::kScores || Mod::kMasks) {
        apply_mod<kM, kN>(s, mod, seq, rows, first_row(), key);
      }
      if (!whole) hide<kM, kN>(s, places, columns, seq.k_len, map.keys);
      if constexpr (Keys::kPages) {
        if (!whole) hide_by_mask<kM, kN>(s, places, key, p, seq);
        keys.template hide_missing<kM, kN>(s, landed);
      }
      float kept[kM][2];
      softmax_step<kM, kN>(s, sums, [&](int m, int h, float factor) {
        kept[m][h] = factor;
        rescale<kM, kD>(out, m, h, factor);
      });
      if constexpr (Keys::kCodes) keys.template decode_weights<kM, kN>(s, landed, kept, state);
      product_nn<kM, kN, kD>(out, s, Keys::v_tile(landed, work()), 0, first_fragment());
    }
    ptx::cp_async_wait<0>();
    if constexpr (Keys::kCodes) keys.template finish<kM, kD>(out, state);
    if (Team::any(wild, scratch())) add_hidden(out);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) sums.total[m][h] = quad_sum(sums.total[m][h]);
    }
  }

  AF_DEVICE void add_hidden(Output& out) const {
    for (int j = 0; j < tiles(); ++j) {
      const int first = first_key(j);
      if (whole(first)) continue;
      for (int place = first; place < at_most(first + kBlockN, range.hi); ++place) {
        const int key = keys.key_at(place);
        const auto seen = [&](int m, int h) {
          return sees(places.at[m][h], key, seq.k_len, map.keys) &&
                 !(Keys::kPages && masked(p, seq, places.at[m][h], key)) &&
                 mod_sees(mod, seq, rows, fragment_row(first_row(), m, h), key);
        };
        keys.template add_wild<kM, kD>(out, key, 8 * first_fragment(), seen);
      }
    }
  }
};

}  // namespace attnforge::cuda
