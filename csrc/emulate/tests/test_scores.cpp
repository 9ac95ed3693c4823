// What stands between products and softmax (csrc/cuda/tile/{rows,scores,mods}.h), each primitive
// alone against a plain loop: rows of packed heads, logits and their slope, what hides keys, and a
// caller's own scores and masks.
#include "cuda/tile/epilogue.h"
#include "cuda/tile/mods.h"
#include "cuda/tile/scores.h"
#include "testing.h"

namespace attnforge::cuda {
namespace {

using emulate::testing::Random;
using emulate::testing::require_equal;

constexpr int kRows = 16, kKeys = 16;

struct Tile {
  RowTile rows;
  int first_key;
};

// Products of a tile in, [kRows, kKeys]; out what each step makes of them.
struct Steps {
  const float* products;
  float *logits, *slopes, *hidden, *masked;
};

__global__ void steps(const __grid_constant__ FlashProblem p, const __grid_constant__ ScoreMap map,
                      const __grid_constant__ Tile tile, const __grid_constant__ Steps to) {
  const Sequence seq = sequence(p, 0);
  const auto places = RowPlaces<1>::of(p, seq, tile.rows, 0);
  const auto place = [](int n, int i) {
    return fragment_row(0, 0, i / 2) * kKeys + fragment_column(n, i);
  };
  Accumulators<1, 2> s;
  const auto store = [&](float* out) {
    store_pairs<1, 2>(
        0, kKeys, [&](int m, int n, int i) { return s[m][n][i]; },
        [&](int r) { return out + r * kKeys; });
  };
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) s[0][n][i] = to.products[place(n, i)];
  }
  row_logits<true, 1, 2>(s, map, places, tile.first_key,
                         [&](int, int n, int i, float slope) { to.slopes[place(n, i)] = slope; });
  store(to.logits);
  hide<1, 2>(s, places, tile.first_key, seq.k_len, map.keys);
  store(to.hidden);
  hide_by_mask<1, 2>(s, places, tile.first_key, p, seq);
  store(to.masked);
}

struct Case {
  int queries, keys, used, heads;  // heads of a group, which share a tile
  int first, first_key;
  int64_t back, ahead;
  float cap;
  bool sloped;
};

void check(const Case& c) {
  Random random(11);
  std::vector<float> products(kRows * kKeys), alibi(c.heads);
  for (float& x : products) x = 9.0f * random.unit();
  for (float& x : alibi) x = 0.5f + 0.5f * random.unit();
  const int tree = 4;  // the last keys have a mask
  std::vector<uint8_t> mask(c.queries * tree);
  for (uint8_t& x : mask) x = random.bits() % 2;
  const int32_t used = c.used;
  FlashProblem p;
  p.batch = 1;
  p.seqlen_q = c.queries, p.seqlen_k = c.keys;
  p.heads_q = c.heads, p.heads_k = 1;
  p.seqused_k = &used;
  p.softmax_scale = 0.3f, p.softcap = c.cap;
  p.window_left = c.back, p.window_right = c.ahead;
  p.alibi_slopes = c.sloped ? alibi.data() : nullptr;
  p.mods.mask = mask.data();
  p.mods.mask_row = p.mods.mask_keys = tree;
  std::vector<float> logits(products), slopes(products.size(), 1.0f), hidden(products),
      masked(products);
  const Tile tile = {{c.first, c.queries * c.heads, c.heads, 0}, c.first_key};
  ATTNFORGE_LAUNCH(
      steps, dim3(1), dim3(32), 0, nullptr, p, ScoreMap::of(p), tile,
      Steps{products.data(), logits.data(), slopes.data(), hidden.data(), masked.data()});
  const double log2e = 1.0 / std::log(2.0);
  for (int r = 0; r < kRows; ++r) {
    const int query = (c.first + r) / c.heads, head = (c.first + r) % c.heads;
    const int at = query + c.used - c.queries;
    for (int j = 0; j < kKeys; ++j) {
      const int n = r * kKeys + j, key = c.first_key + j;
      double x = 0.3f * static_cast<double>(products[n]), slope = 1.0;
      if (c.cap > 0.0f) {
        const double t = std::tanh(x / c.cap);
        x = c.cap * t, slope = 1.0 - t * t;
      }
      if (c.sloped) x -= alibi[head] * std::fabs(static_cast<double>(at - key));
      require_equal(logits[n], x * log2e, 4e-6 * (1.0 + std::fabs(x) * log2e), "logit");
      require_equal(slopes[n], slope, 1e-6, "slope");
      const bool seen = (c.back < 0 || key >= at - c.back) && (c.ahead < 0 || key <= at + c.ahead);
      REQUIRE(hidden[n] == (seen && key < c.used ? logits[n] : -kInf));
      const int column = key - (c.used - tree);
      const bool blocked = query < c.queries && column >= 0 && column < tree &&
                           mask[static_cast<size_t>(query * tree + column)] == 0;
      REQUIRE(masked[n] == (blocked ? -kInf : hidden[n]));
    }
  }
}

EMULATOR_TEST(scores_of_a_tile) {
  check({16, 40, 40, 1, 0, 16, -1, -1, 0.0f, false});
  check({16, 40, 33, 1, 0, 32, -1, 0, 0.0f, true});
  check({30, 30, 30, 1, 16, 16, 3, 0, 2.0f, true});  // the last rows do not exist
  check({7, 50, 40, 3, 16, 32, 20, 5, 1.5f, true});  // three heads, from inside of a query on
  check({5, 9, 4, 4, 0, 0, 0, 2, 0.0f, false});      // more queries than keys in use
  check({9, 20, 20, 2, 0, 8, int64_t{1} << 40, int64_t{1} << 40, 30.0f, false});
}

// A mod that says what it was asked, for rows of two heads and one key beyond either end.
struct Recorder {
  static constexpr bool kScores = true, kMasks = true;
  AF_DEVICE float score(float s, const Place& at) const {
    return s + static_cast<float>(1000 * at.batch + 100 * at.head + 10 * at.query + at.position);
  }
  AF_DEVICE bool sees(const Place& at) const { return at.key % 3 != at.query % 3; }
};

__global__ void ask(const __grid_constant__ FlashProblem p, const __grid_constant__ Tile tile,
                    float* out, uint32_t* seen) {
  const Sequence seq = sequence(p, 1);
  Accumulators<1, 2> s;
  fill<1, 2>(s, 2.0f * kLog2E);
  apply_mod<1, 2>(s, Recorder{}, seq, tile.rows, 0, tile.first_key);
  store_pairs<1, 2>(
      0, kKeys, [&](int m, int n, int i) { return s[m][n][i]; },
      [&](int r) { return out + r * kKeys; });
  for (int r = static_cast<int>(threadIdx.x); r < kRows; r += 32) {
    seen[r] = mod_sees(Recorder{}, seq, tile.rows, r, 4);
  }
}

EMULATOR_TEST(mods_are_asked_about_what_exists) {
  FlashProblem p;
  p.batch = 2;
  p.seqlen_q = 5, p.seqlen_k = 20;
  p.heads_q = 4, p.heads_k = 2;
  std::vector<float> out(kRows * kKeys);
  std::vector<uint32_t> seen(kRows);
  ATTNFORGE_LAUNCH(ask, dim3(1), dim3(32), 0, nullptr, p, Tile{{0, 10, 2, 2}, 8}, out.data(),
                   seen.data());
  for (int r = 0; r < kRows; ++r) {
    const int row = at_most(r, 9), query = row / 2, head = 2 + row % 2;
    REQUIRE(seen[r] == (4 % 3 != query % 3));
    for (int j = 0; j < kKeys; ++j) {
      const int key = at_most(8 + j, 19);
      const float wanted = 1002.0f + static_cast<float>(100 * head + 10 * query + query + 15);
      const float found = out[r * kKeys + j];
      if (key % 3 == query % 3) {
        REQUIRE(found == -kInf);
      } else {
        require_equal(found, wanted * kLog2E, 1e-3, "score");
      }
    }
  }
}

}  // namespace
}  // namespace attnforge::cuda
