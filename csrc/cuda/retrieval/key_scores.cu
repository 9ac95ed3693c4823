// Logits of every key: scale <q, k>, one number per row and key, in fp32.
//
//   block      64 keys of a KV head, 16 of a warp, stay in shared memory; the query rows of all
//              heads of the group pass by in tiles. S^T = K Q^T, so that keys are read once for any
//              number of rows, and the 8 keys of a column of fragments are a sector of the result
//   keys       by cp.async from a tensor or through a page table. Those that are not there are -inf
//   bytes      K once, Q once per 64 keys from L2, 4 per row and key of the result
//
// Limits: head dims up to 256, multiples of 8.
#include "cuda/flash/instances.h"
#include "cuda/retrieval/entries.h"
#include "cuda/retrieval/launch.h"
#include "cuda/retrieval/tiles.h"

namespace attnforge::cuda {

// How blocks are dealt: tiles of keys, KV heads, sequences.
struct ScoreGrid {
  int tiles, heads, batch;
  Divider slots;  // of a page

  unsigned blocks() const { return static_cast<unsigned>(int64_t{tiles} * heads * batch); }
};

template <DType kDType, int kDims>
struct KeyScoresCase {
  static constexpr ScoreTile kTile = score_tile(kDType, kScoreDims[kDims]);
};

template <class Case>
__global__ void __launch_bounds__(32 * Case::kTile.warps)
    key_scores_kernel(const __grid_constant__ KeyScoresParams params,
                      const __grid_constant__ ScoreGrid grid) {
  constexpr ScoreTile kTile = Case::kTile;
  constexpr int kStages = 2, kN = kTile.rows / 8, kKeys = 16 * kTile.warps;
  using T = typename ElementOf<kTile.dtype>::Type;
  using Team = BlockTeam<kTile.warps>;
  using Keys = SharedTile<T, kKeys, kTile.head_dim>;
  using Rows = SharedTile<T, kTile.rows, kTile.head_dim>;
  const FlashProblem& p = params.problem;
  int id = static_cast<int>(blockIdx.x);
  const int first = id % grid.tiles * kKeys;
  id /= grid.tiles;
  const int kv_head = id % grid.heads;
  const Sequence seq = sequence(p, id / grid.heads);
  const int pack = static_cast<int>(p.heads_q) / grid.heads, dim = static_cast<int>(p.head_dim);
  const RowTile rows = {0, seq.q_len * pack, pack, kv_head * pack};
  const KeyPlaces places = KeyPlaces::of(params.pool, grid.slots, seq.batch);
  const TensorRef& k = params.pool.table != nullptr ? params.pool.k : params.k;
  const auto place_of = [&](int key) {
    return key < seq.k_len ? places.at(key) : KeyPlaces::Place{-1, 0};
  };

  const uint32_t shared = ptx::dynamic_shared_memory();
  const Keys keys = {shared};
  const auto stage = [&](int j) {
    return Rows{shared + Keys::kBytes + static_cast<uint32_t>(j % kStages * Rows::kBytes)};
  };
  const auto load = [&](int j) {
    load_tile<Team>(stage(j), dim, [&](int r) -> const T* {
      r += j * kTile.rows;
      if (!rows.exists(r)) return nullptr;
      return row_ptr<const T>(params.q, seq.batch, rows.query(r), rows.head(r));
    });
  };
  load_tile<Team>(keys, dim, [&](int r) -> const T* {
    const KeyPlaces::Place at = place_of(first + r);
    return at.page < 0 ? nullptr : row_ptr<const T>(k, at.page, at.slot, kv_head);
  });
  load(0);
  ptx::cp_async_commit();

  const int own_row = 16 * warp_id();
  bool there[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) there[h] = place_of(first + fragment_row(own_row, 0, h)).page >= 0;
  const int count = ceil_div(rows.rows, kTile.rows);
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    ptx::cp_async_wait<0>();
    Team::sync();  // the tile is here, and nobody works on the one before
    if (j + 1 < count) load(j + 1);
    ptx::cp_async_commit();
    Accumulators<1, kN> s;
    zero<1, kN>(s);
    product_nt<1, kN>(s, keys, own_row, stage(j), 0);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = j * kTile.rows + fragment_column(n, i);
        if (!rows.exists(r)) continue;
        const int64_t row = (seq.batch * p.heads_q + rows.head(r)) * p.seqlen_q + rows.query(r);
        float* out = params.out + row * params.columns;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int key = first + fragment_row(own_row, 0, h);
          if (key < params.columns)
            out[key] = there[h] ? s[0][n][2 * h + i] * p.softmax_scale : -kInf;
        }
      }
    }
  }
  ptx::cp_async_wait<0>();
}

template <>
int key_scores<kThisDType>(const KeyScoresParams& params, void* stream) {
  const FlashProblem& p = params.problem;
  return with_index<kNumScoreDims>(score_dims_of(p.head_dim), [&]<int kDims>() {
    using Case = KeyScoresCase<kThisDType, kDims>;
    constexpr int kKeys = 16 * Case::kTile.warps;
    const ScoreGrid grid = {static_cast<int>((params.columns + kKeys - 1) / kKeys),
                            static_cast<int>(p.heads_k), static_cast<int>(p.batch),
                            Divider::by(params.pool.page_size)};
    if (grid.blocks() == 0) return 0;
    return ATTNFORGE_LAUNCH((key_scores_kernel<Case>), dim3(grid.blocks()),
                            dim3(32 * Case::kTile.warps), Case::kTile.shared_bytes(), stream,
                            params, grid);
  });
}

}  // namespace attnforge::cuda
