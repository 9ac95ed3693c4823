// The tile vocabulary (csrc/cuda/tile/), each primitive alone: loads and swizzles, products,
// softmax, masks, NaN behind masks, ranges, stores.
#include "cuda/tile/epilogue.h"
#include "cuda/tile/hidden.h"
#include "cuda/tile/scores.h"
#include "cuda/tile/softmax.h"
#include "testing.h"

namespace attnforge::cuda {
namespace {

using emulate::testing::Random;
using emulate::testing::require_equal;

constexpr int kRows = 32;

template <class T>
std::vector<T> numbers(int count, uint32_t seed) {
  Random random(seed);
  std::vector<T> values;
  for (int i = 0; i < count; ++i) values.push_back(narrow<T>(random.unit()));
  return values;
}

// Loads [kRows, dim] of which `rows` exist, reads it back through chunk addresses.
template <class Team, class Tile>
__global__ void copy_tile(const typename Tile::Element* from, int64_t stride, int rows, int dim,
                          typename Tile::Element* to) {
  const Tile tile = {ptx::dynamic_shared_memory()};
  load_rows<Team>(tile, from, stride, rows, dim);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  Team::sync();
  for (int n = Team::rank(); n < Tile::kRows * Tile::kChunks; n += Team::kThreads) {
    const int row = n / Tile::kChunks, c = n % Tile::kChunks;
    const auto chunk = ptx::load_shared<ptx::U32x4>(tile.chunk(row, c));
    __builtin_memcpy(to + row * Tile::kDim + c * Tile::kPerChunk, &chunk, 16);
  }
}

template <class Team, class T, int kDim>
void check_copy(int dim, int rows) {
  using Tile = SharedTile<T, kRows, kDim>;
  const int stride = kDim + 16;
  const auto from = numbers<T>(kRows * stride, 3);
  std::vector<T> to(kRows * kDim);
  ATTNFORGE_LAUNCH((copy_tile<Team, Tile>), dim3(1), dim3(Team::kThreads), Tile::kBytes, nullptr,
                   from.data(), int64_t{stride}, rows, dim, to.data());
  for (int row = 0; row < kRows; ++row) {
    for (int d = 0; d < kDim; ++d) {
      const float wanted = row < rows && d < dim ? widen(from[row * stride + d]) : 0.0f;
      REQUIRE(widen(to[row * kDim + d]) == wanted);
    }
  }
}

EMULATOR_TEST(tile_load_fills_what_does_not_exist_with_zeros) {
  check_copy<BlockTeam<4>, BFloat16, 64>(64, 32);
  check_copy<BlockTeam<4>, BFloat16, 96>(72, 29);
  check_copy<BlockTeam<2>, Half, 128>(8, 1);
  check_copy<BlockTeam<4>, float, 64>(40, 31);
  check_copy<WarpTeam<1>, BFloat16, 192>(192, 17);
  check_copy<WarpTeam<1>, float, 96>(96, 0);
}

// Eight rows of an ldmatrix at one chunk lie in eight different groups of four banks.
template <class Tile>
void check_banks() {
  const Tile tile = {0};
  for (int first = 0; first < Tile::kRows; first += 8) {
    for (int c = 0; c < Tile::kChunks; ++c) {
      uint32_t groups = 0;
      for (int row = first; row < first + 8; ++row) groups |= 1u << (tile.chunk(row, c) / 16 % 8);
      REQUIRE(groups == 0xffu);
    }
  }
}

EMULATOR_TEST(tile_swizzle_spreads_rows_over_all_banks) {
  check_banks<SharedTile<BFloat16, 32, 64>>();
  check_banks<SharedTile<BFloat16, 32, 80>>();
  check_banks<SharedTile<BFloat16, 32, 96>>();
  check_banks<SharedTile<BFloat16, 32, 112>>();
  check_banks<SharedTile<BFloat16, 32, 128>>();
  check_banks<SharedTile<BFloat16, 32, 192>>();
  check_banks<SharedTile<float, 32, 96>>();
  check_banks<SharedTile<float, 32, 256>>();
}

EMULATOR_TEST(tile_addresses_follow_from_one_home) {
  using Tile = SharedTile<BFloat16, 48, 96>;
  const Tile tile = {1024};
  for (int row = 0; row < 16; ++row) {
    for (int first = 0; first < 2; ++first) {
      for (int c = 0; c < Tile::kChunks; c += 2) {
        const uint32_t home = tile.chunk(row, first);
        REQUIRE(Tile::from(home, 32, c) == tile.chunk(row + 32, first + c));
      }
    }
  }
}

// S = A B^T, then O = S B, of two warps with 16 rows each.
template <class T, int kDim>
__global__ void two_products(const T* a, const T* b, float* s_out, float* o_out) {
  using Team = BlockTeam<2>;
  using Tile = SharedTile<T, kRows, kDim>;
  const Tile left = {ptx::dynamic_shared_memory()}, right = {left.base + Tile::kBytes};
  load_rows<Team>(left, a, kDim, kRows, kDim);
  load_rows<Team>(right, b, kDim, kRows, kDim);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  Team::sync();
  const int row = 16 * warp_id();
  Accumulators<1, kRows / 8> s;
  zero<1, kRows / 8>(s);
  product_nt<1, kRows / 8>(s, left, row, right, 0);
  Accumulators<1, kDim / 8> o;
  zero<1, kDim / 8>(o);
  product_nn<1, kRows / 8, kDim / 8>(o, s, right, 0);
  store_pairs<1, kRows / 8>(
      row, kRows, [&](int m, int n, int i) { return s[m][n][i]; },
      [&](int r) { return s_out + r * kRows; });
  store_pairs<1, kDim / 8>(
      row, kDim, [&](int m, int n, int i) { return o[m][n][i]; },
      [&](int r) { return o_out + r * kDim; });
}

template <class T, int kDim>
void check_products(double s_error, double o_error) {
  const auto a = numbers<T>(kRows * kDim, 1), b = numbers<T>(kRows * kDim, 2);
  std::vector<float> s(kRows * kRows), o(kRows * kDim);
  ATTNFORGE_LAUNCH((two_products<T, kDim>), dim3(1), dim3(64),
                   2 * SharedTile<T, kRows, kDim>::kBytes, nullptr, a.data(), b.data(), s.data(),
                   o.data());
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kRows; ++j) {
      double sum = 0.0;
      for (int d = 0; d < kDim; ++d) {
        sum += static_cast<double>(widen(a[i * kDim + d])) * widen(b[j * kDim + d]);
      }
      require_equal(s[i * kRows + j], sum, s_error, "S");
    }
    for (int d = 0; d < kDim; ++d) {
      double sum = 0.0;
      for (int j = 0; j < kRows; ++j) {
        sum += static_cast<double>(s[i * kRows + j]) * widen(b[j * kDim + d]);
      }
      require_equal(o[i * kDim + d], sum, o_error, "O");
    }
  }
}

EMULATOR_TEST(tile_products_of_16_bit) {
  check_products<BFloat16, 64>(1e-4, 0.3);  // S is rounded to 8 bits for the second product
  check_products<Half, 80>(1e-4, 0.05);
  check_products<Half, 96>(1e-4, 0.05);
}

EMULATOR_TEST(tile_products_of_fp32_are_fp32) {
  check_products<float, 64>(1e-5, 1e-4);  // plain tf32 would be off by 1e-2
  check_products<float, 96>(1e-5, 1e-4);
}

// Two steps of the softmax of one warp's 16 rows over 2 x 16 logits; out counts weights.
__global__ void softmax_steps(const float* logits, float* top, float* total, float* out) {
  RowSums<1> sums = RowSums<1>::none();
  Accumulators<1, 2> acc;
  zero<1, 2>(acc);
  for (int step = 0; step < 2; ++step) {
    Accumulators<1, 2> s;
    for (int n = 0; n < 2; ++n) {
      for (int i = 0; i < 4; ++i) {
        const int row = fragment_row(0, 0, i / 2), column = fragment_column(n, i);
        s[0][n][i] = logits[row * 32 + 16 * step + column];
      }
    }
    online_softmax<1, 2, 2>(s, sums, acc);
    for (int n = 0; n < 2; ++n) {
      for (int i = 0; i < 4; ++i) acc[0][n][i] += s[0][n][i];
    }
  }
  for (int h = 0; h < 2; ++h) {
    const int row = fragment_row(0, 0, h);
    const float sum = quad_sum(sums.total[0][h]);
    if (fragment_column(0, 0) == 0) top[row] = sums.top[0][h], total[row] = sum;
  }
  store_pairs<1, 2>(
      0, 16, [&](int m, int n, int i) { return acc[m][n][i]; },
      [&](int r) { return out + r * 16; });
}

EMULATOR_TEST(tile_online_softmax) {
  std::vector<float> logits(16 * 32), top(16), total(16), out(16 * 16);
  Random random(5);
  for (float& x : logits) x = 20.0f * random.unit();
  for (int j = 0; j < 32; ++j) logits[3 * 32 + j] = -kInf;  // sees nothing
  for (int j = 0; j < 16; ++j) logits[4 * 32 + j] = -kInf;  // nothing at first
  logits[5 * 32 + 20] = __builtin_nanf("");                 // is not swallowed
  for (int j = 0; j < 32; ++j) logits[6 * 32 + j] = j == 7 ? 3e38f : -3e38f;
  ATTNFORGE_LAUNCH(softmax_steps, dim3(1), dim3(32), 0, nullptr, logits.data(), top.data(),
                   total.data(), out.data());
  for (int row = 0; row < 16; ++row) {
    double max = -kInf, sum = 0.0;
    for (int j = 0; j < 32; ++j) max = std::fmax(max, logits[row * 32 + j]);
    for (int j = 0; j < 32; ++j) {
      if (max > -kInf) sum += std::exp2(static_cast<double>(logits[row * 32 + j]) - max);
    }
    REQUIRE(top[row] == static_cast<float>(max));
    if (row == 5) {
      REQUIRE(total[row] != total[row]);
      continue;
    }
    require_equal(total[row], sum, 1e-5 * sum, "total");
    for (int c = 0; c < 16; ++c) {
      double weight = 0.0;
      for (int j = c; j < 32; j += 16) {
        if (max > -kInf) weight += std::exp2(static_cast<double>(logits[row * 32 + j]) - max);
      }
      require_equal(out[row * 16 + c], weight, 1e-5, "weight");
    }
  }
}

EMULATOR_TEST(tile_end_of_a_row) {
  const double ln2 = std::log(2.0);
  const RowEnd plain = finish_row(3.0f, 2.0f, -kInf);
  require_equal(plain.lse, 4.0 * ln2, 1e-6, "lse");
  require_equal(plain.scale, 0.5, 0.0, "scale");
  const RowEnd nothing = finish_row(-kInf, 0.0f, -kInf);
  REQUIRE(nothing.scale == 0.0f && nothing.lse == -kInf);
  const RowEnd sink = finish_row(-kInf, 0.0f, 1.5f);
  REQUIRE(sink.scale == 0.0f);
  require_equal(sink.lse, 1.5, 1e-6, "lse of a sink alone");
  const RowEnd both = finish_row(0.0f, 1.0f, 0.0f);
  require_equal(both.scale, 0.5, 1e-6, "scale beside a sink");
  require_equal(both.lse, ln2, 1e-6, "lse beside a sink");
  const RowEnd all = finish_row(2.0f, 1.0f, kInf);
  REQUIRE(all.scale == 0.0f && all.lse == kInf);
}

// seen_range against the definition of a window, for many tiles.
EMULATOR_TEST(tile_range_is_what_is_seen) {
  const int sizes[] = {0, 1, 5, 30, kFar};
  for (int rows : {1, 7, 40}) {
    for (int keys : {0, 1, 33, 70}) {
      for (int back : sizes) {
        for (int ahead : sizes) {
          const Window w = {back, ahead};
          const int shift = keys - rows, block = 16;
          for (int first = 0; first < rows; first += 8) {
            const int last = at_most(first + 8, rows) - 1;
            const TileRange r = seen_range(first, last, keys, shift, w, block);
            REQUIRE(r.lo % block == 0 && r.lo <= r.hi);
            for (int key = 0; key < keys; ++key) {
              bool some = false, all = true;
              for (int row = first; row <= last; ++row) {
                const bool seen = sees(row + shift, key, keys, w);
                some |= seen, all &= seen;
              }
              REQUIRE(!some || (key >= r.lo && key < r.hi));
              if (r.whole(key / block * block, block)) REQUIRE(all);
            }
          }
        }
      }
    }
  }
}

// A tile with NaN and infinities: tamed, and added back where seen.
template <class T>
__global__ void tame_and_add(const T* from, T* tamed, float* out, uint32_t* found) {
  using Team = BlockTeam<1>;
  using Tile = SharedTile<T, 16, 64>;
  const Tile tile = {ptx::dynamic_shared_memory()};
  load_rows<Team>(tile, from, 64, 16, 64);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  const bool wild = tame<Team>(tile);
  Team::sync();
  *found = Team::any(wild, tile.base + Tile::kBytes);
  for (int n = Team::rank(); n < 16 * 64; n += 32) {
    tamed[n] = ptx::load_shared<T>(tile.element(n / 64, n % 64));
  }
  Accumulators<1, 8> acc;
  zero<1, 8>(acc);
  for (int key = 0; key < 16; ++key) {
    add_wild<T, 1, 8>(acc, from + 64 * key, 64,
                      [&](int m, int h) { return fragment_row(0, m, h) >= key; });
  }
  store_pairs<1, 8>(
      0, 64, [&](int m, int n, int i) { return acc[m][n][i]; },
      [&](int r) { return out + r * 64; });
}

template <class T>
void check_tame() {
  auto from = numbers<T>(16 * 64, 9);
  from[3 * 64 + 5] = narrow<T>(kInf);
  from[7 * 64 + 6] = narrow<T>(-kInf);
  from[9 * 64 + 63] = narrow<T>(__builtin_nanf(""));
  std::vector<T> tamed(16 * 64);
  std::vector<float> out(16 * 64);
  uint32_t found = 0;
  ATTNFORGE_LAUNCH((tame_and_add<T>), dim3(1), dim3(32), SharedTile<T, 16, 64>::kBytes + 4, nullptr,
                   from.data(), tamed.data(), out.data(), &found);
  REQUIRE(found == 1);
  for (int n = 0; n < 16 * 64; ++n) {
    const float x = widen(from[n]);
    REQUIRE(widen(tamed[n]) == (std::isfinite(x) ? x : 0.0f));
    const int row = n / 64, column = n % 64;
    const float added = out[n];
    if (column == 5) {
      REQUIRE(added == (row >= 3 ? kInf : 0.0f));
    } else if (column == 6) {
      REQUIRE(added == (row >= 7 ? -kInf : 0.0f));
    } else if (column == 63) {
      REQUIRE(row >= 9 ? added != added : added == 0.0f);
    } else {
      REQUIRE(added == 0.0f);
    }
  }
}

EMULATOR_TEST(tile_tames_what_is_not_finite) {
  check_tame<float>();
  check_tame<Half>();
  check_tame<BFloat16>();
}

// Rows of accumulators through shared memory, the second row missing, 40 of 64 columns.
template <class T>
__global__ void store_tile(T* to) {
  using Tile = SharedTile<T, 32, 64>;
  const Tile tile = {ptx::dynamic_shared_memory()};
  const int row = 16 * warp_id();
  store_rows<1, 8>(
      tile, row, 40,
      [&](int m, int n, int i) {
        return static_cast<float>(fragment_row(row, m, i / 2) * 2 + fragment_column(n, i)) / 4;
      },
      [&](int r) -> T* { return r == 1 ? nullptr : to + r * 64; });
}

template <class T>
void check_store() {
  std::vector<T> to(32 * 64, narrow<T>(-1.0f));
  ATTNFORGE_LAUNCH((store_tile<T>), dim3(1), dim3(64), SharedTile<T, 32, 64>::kBytes, nullptr,
                   to.data());
  for (int row = 0; row < 32; ++row) {
    for (int d = 0; d < 64; ++d) {
      const bool written = row != 1 && d < 40;
      REQUIRE(widen(to[row * 64 + d]) == (written ? static_cast<float>(row * 2 + d) / 4 : -1.0f));
    }
  }
}

EMULATOR_TEST(tile_stores_rows_that_exist) {
  check_store<float>();
  check_store<Half>();
  check_store<BFloat16>();
}

EMULATOR_TEST(tile_softcap_and_its_slope) {
  for (float x : {-30.0f, -2.0f, -0.01f, 0.0f, 0.5f, 3.0f, 50.0f}) {
    const float t = tanh_of_exp2(2.0f * kLog2E * x);
    require_equal(t, std::tanh(static_cast<double>(x)), 2e-7, "tanh");
  }
}

}  // namespace
}  // namespace attnforge::cuda
