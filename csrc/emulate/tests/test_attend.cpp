// The loop of the forward kernels (csrc/cuda/tile/attend.h) alone, over a tensor of keys: rows that
// do not exist, a window, keys that nobody sees and hold NaN, warps that share rows or channels.
#include <limits>

#include "cuda/tile/attend.h"
#include "testing.h"

namespace attnforge::cuda {
namespace {

using emulate::testing::Random;
using emulate::testing::require_equal;
using emulate::testing::seeded;

constexpr int kWide = 32, kDim = 24;  // channels of a tile, and of Q and K
constexpr int kQueries = 13, kKeyCount = 75, kBack = 40;

template <class Team_, int kStages_>
struct LoopTraits {
  using T = BFloat16;
  using Team = Team_;
  using Mod = NoMod;
  using Keys = TensorKeys<T, 16, kWide, kWide>;
  static constexpr int kDim = kWide, kValueDim = kWide;
  static constexpr int kMTiles = 1, kBlockN = 16, kStages = kStages_;
  static constexpr bool kFeatures = false;
};

template <class Traits>
__global__ void loop(const __grid_constant__ FlashProblem p, const __grid_constant__ ScoreMap map,
                     const BFloat16* q, const BFloat16* k, const BFloat16* v, float* out,
                     float* lse) {
  using Walk = Attend<Traits>;
  const Sequence seq = sequence(p, 0);
  const RowTile rows = {0, seq.q_len, 1, 0};
  const TileRange range = seen_range(rows.first_query(), rows.last_query(Walk::kRows), seq.k_len,
                                     seq.offset(), map.keys, Walk::kBlockN);
  const NoMod mod;
  const Walk walk = {ptx::dynamic_shared_memory(),
                     p,
                     seq,
                     rows,
                     range,
                     {k, v, kWide, kWide, kDim, kWide},
                     RowPlaces<1>::of(p, seq, rows, Walk::first_row()),
                     map,
                     mod};
  RowSums<1> sums = RowSums<1>::none();
  typename Walk::Output acc;
  zero<1, Walk::kD>(acc);
  walk.run([&](int r) { return rows.exists(r) ? q + r * kWide : nullptr; }, sums, acc);
  for (int h = 0; h < 2; ++h) {
    const int r = fragment_row(Walk::first_row(), 0, h);
    if (!rows.exists(r)) continue;
    const RowEnd end = finish_row(sums.top[0][h], sums.total[0][h], -kInf);
    lse[r] = end.lse;  // of every lane and warp of the row, one number
    for (int d = 0; d < Walk::kD; ++d) {
      for (int i = 2 * h; i < 2 * h + 2; ++i) {
        const int column = fragment_column(Walk::first_fragment() + d, i);
        out[r * kWide + column] = acc[0][d][i] * end.scale;
      }
    }
  }
}

template <class Traits>
void check_loop() {
  Random random(7);
  std::vector<BFloat16> q(kQueries * kWide), k(kKeyCount * kWide), v(k);
  for (auto* x : {&q, &k, &v}) {
    for (BFloat16& e : *x) e = narrow<BFloat16>(random.unit());
  }
  // What is not read, or read and not seen: channels past the head dim, keys before all windows.
  const BFloat16 poison = narrow<BFloat16>(std::numeric_limits<float>::quiet_NaN());
  for (auto* x : {&q, &k}) {
    for (size_t row = 0; row < x->size() / kWide; ++row) {
      for (int c = kDim; c < kWide; ++c) (*x)[row * kWide + c] = poison;
    }
  }
  constexpr int kUnseen = kKeyCount - kQueries - kBack;
  static_assert(kUnseen % 16 != 0);  // a tile holds keys of both kinds
  for (int j = 0; j < kUnseen; ++j) {
    for (int c = 0; c < kWide; ++c) k[j * kWide + c] = v[j * kWide + c] = poison;
  }
  FlashProblem p;
  p.batch = p.heads_q = p.heads_k = 1;
  p.seqlen_q = kQueries, p.seqlen_k = kKeyCount;
  p.head_dim = kDim, p.v_head_dim = kWide;
  p.softmax_scale = 0.7f, p.window_left = kBack, p.window_right = 0;
  for (uint64_t seed = 0; seed < 4; ++seed) {
    std::vector<float> out(kQueries * kWide), lse(kQueries);
    emulate::set_options(seeded(seed));
    ATTNFORGE_LAUNCH((loop<Traits>), dim3(1), dim3(32 * Traits::Team::kWarps),
                     Attend<Traits>::kSharedBytes, nullptr, p, ScoreMap::of(p), q.data(), k.data(),
                     v.data(), out.data(), lse.data());
    for (int r = 0; r < kQueries; ++r) {
      const int last = r + kKeyCount - kQueries;
      double total = 0.0, sum[kWide] = {};
      for (int j = last - kBack; j <= last; ++j) {
        double dot = 0.0;
        for (int c = 0; c < kDim; ++c)
          dot += double{widen(q[r * kWide + c])} * widen(k[j * kWide + c]);
        const double weight = std::exp(0.7f * dot);
        total += weight;
        for (int c = 0; c < kWide; ++c) sum[c] += weight * widen(v[j * kWide + c]);
      }
      require_equal(lse[r], std::log(total), 1e-5, "lse");
      for (int c = 0; c < kWide; ++c) {
        require_equal(out[r * kWide + c], sum[c] / total, 0x1p-9, "out");  // weights in bf16
      }
    }
  }
}

EMULATOR_TEST(rows_attend_to_keys) {
  check_loop<LoopTraits<WarpTeam<1>, 2>>();
  check_loop<LoopTraits<WarpTeam<1>, 4>>();
}
EMULATOR_TEST(warps_share_rows_of_the_loop) {
  check_loop<LoopTraits<BlockTeam<2>, 3>>();
}
EMULATOR_TEST(warps_share_channels_of_the_loop) {
  check_loop<LoopTraits<ColumnTeam<2>, 3>>();
}

}  // namespace
}  // namespace attnforge::cuda
