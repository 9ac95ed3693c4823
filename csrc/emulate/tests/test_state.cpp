// The rest of the vocabulary (csrc/cuda/tile/{scan,state_product,listed,team}.h), each primitive
// alone: sums over a block, products of a state in registers, streams of listed blocks, votes.
#include "cuda/tile/epilogue.h"
#include "cuda/tile/listed.h"
#include "cuda/tile/scan.h"
#include "cuda/tile/state_product.h"
#include "testing.h"

namespace attnforge::cuda {
namespace {

using emulate::testing::Random;
using emulate::testing::require_equal;
using emulate::testing::seeded;

constexpr int kThreads = 96;

__global__ void scan(const uint32_t* in, uint32_t* before, uint32_t* all, uint64_t* wide,
                     uint32_t* most, float* sums) {
  const Block block = {kThreads / 32, ptx::dynamic_shared_memory()};
  const uint32_t n = threadIdx.x;
  before[n] = block.sum_before(in[n], all[n]);
  uint64_t total = 0;
  wide[n] = block.sum_before(uint64_t{in[n]} << 30, total);
  most[n] = block.over(in[n], [](uint32_t a, uint32_t b) { return a > b ? a : b; });
  sums[n] = warp_sum(static_cast<float>(in[n]));
}

EMULATOR_TEST(sums_of_a_block) {
  Random random(1);
  std::vector<uint32_t> in(kThreads), before(kThreads), all(kThreads), most(kThreads);
  std::vector<uint64_t> wide(kThreads);
  std::vector<float> sums(kThreads);
  for (uint32_t& x : in) x = random.bits() % 10000;
  for (uint64_t seed = 0; seed < 4; ++seed) {
    emulate::set_options(seeded(seed));
    ATTNFORGE_LAUNCH(scan, dim3(1), dim3(kThreads), 8 * kThreads / 32, nullptr, in.data(),
                     before.data(), all.data(), wide.data(), most.data(), sums.data());
    uint32_t total = 0, top = 0;
    for (int n = 0; n < kThreads; ++n) {
      REQUIRE(before[n] == total && wide[n] == uint64_t{total} << 30);
      total += in[n], top = top > in[n] ? top : in[n];
    }
    for (int n = 0; n < kThreads; ++n) {
      float warp = 0.0f;
      for (int lane = 0; lane < 32; ++lane) warp += static_cast<float>(in[n / 32 * 32 + lane]);
      REQUIRE(all[n] == total && most[n] == top && sums[n] == warp);
    }
  }
}

constexpr int kLeft = 16, kInner = 32, kRight = 48;

// L [16, 32] with B [48, 32] along its rows and C [32, 48] across them; L itself across D [32, 16].
// Results: along, across and D^T B^T, each [16, 48]; scaled: L with columns times (k, i), plus L.
template <class P, class T>
__global__ void state_products(const float* l, const T* b, const T* c, const T* d, float* along,
                               float* across, float* turned, float* scaled) {
  using Team = WarpTeam<1>;
  using Along = SharedTile<T, kRight, kInner>;
  using Across = SharedTile<T, kInner, kRight>;
  using Turned = SharedTile<T, kInner, kLeft>;
  const Along right = {ptx::dynamic_shared_memory()};
  const Across rows = {right.base + Along::kBytes};
  const Turned columns = {rows.base + Across::kBytes};
  load_rows<Team>(right, b, kInner, kRight, kInner);
  load_rows<Team>(rows, c, kRight, kInner, kRight);
  load_rows<Team>(columns, d, kLeft, kInner, kLeft);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  Team::sync();
  Fragments<kInner / 8> left, other;
  for (int k = 0; k < kInner / 8; ++k) {
    for (int i = 0; i < 4; ++i) {
      left[k][i] = l[fragment_row(0, 0, i / 2) * kInner + fragment_column(k, i)];
    }
  }
  const auto store = [](const auto& x, int width, float* to) {
    for (int n = 0; n < width / 8; ++n) {
      for (int i = 0; i < 4; ++i) {
        to[fragment_row(0, 0, i / 2) * width + fragment_column(n, i)] = x[n][i];
      }
    }
  };
  Fragments<kRight / 8> acc;
  zero_fragments<kRight / 8>(acc);
  product_along<P, kRight / 8, kInner / 8>(acc, left, right);
  store(acc, kRight, along);
  zero_fragments<kRight / 8>(acc);
  product_across<P, kRight / 8, kInner / 8>(acc, left, rows);
  store(acc, kRight, across);
  left_across<kInner / 8>(other, columns, 0);
  zero_fragments<kRight / 8>(acc);
  product_along<P, kRight / 8, kInner / 8>(acc, other, right);
  store(acc, kRight, turned);
  zero_fragments<kInner / 8>(other);
  add_fragments<kInner / 8>(other, left, -2.0f);
  scale_columns<kInner / 8>(other,
                            [](int k, int i) { return static_cast<float>(fragment_column(k, i)); });
  store(other, kInner, scaled);
}

template <class P, class T>
void check_products(double error) {
  Random random(2);
  std::vector<float> l(kLeft * kInner);
  std::vector<T> b(kRight * kInner), c(kInner * kRight), d(kInner * kLeft);
  for (float& x : l) x = random.unit();
  for (auto* tile : {&b, &c, &d}) {
    for (T& x : *tile) x = narrow<T>(random.unit());
  }
  std::vector<float> along(kLeft * kRight), across(along), turned(along), scaled(l);
  constexpr uint32_t kBytes = (2 * kRight + kLeft) * kInner * sizeof(T);
  ATTNFORGE_LAUNCH((state_products<P, T>), dim3(1), dim3(32), kBytes, nullptr, l.data(), b.data(),
                   c.data(), d.data(), along.data(), across.data(), turned.data(), scaled.data());
  for (int r = 0; r < kLeft; ++r) {
    for (int n = 0; n < kRight; ++n) {
      double first = 0.0, second = 0.0, third = 0.0;
      for (int k = 0; k < kInner; ++k) {
        const double x = l[r * kInner + k], y = widen(b[n * kInner + k]);
        first += x * y;
        second += x * widen(c[k * kRight + n]);
        third += y * widen(d[k * kLeft + r]);
      }
      require_equal(along[r * kRight + n], first, error, "along");
      require_equal(across[r * kRight + n], second, error, "across");
      require_equal(turned[r * kRight + n], third, 1e-5, "turned");  // tf32 holds both sides
    }
    for (int k = 0; k < kInner; ++k) {
      REQUIRE(scaled[r * kInner + k] == -2.0f * l[r * kInner + k] * static_cast<float>(k));
    }
  }
}

EMULATOR_TEST(state_products_of_16_bit) {
  check_products<StateProduct<BFloat16>, BFloat16>(kInner * 0x1p-12);  // L rounded to 11 bits
  check_products<StateProduct<Half>, Half>(kInner * 0x1p-12);
  check_products<FineProduct<BFloat16>, BFloat16>(1e-5);
  check_products<FineProduct<Half>, Half>(1e-5);
}

EMULATOR_TEST(state_products_of_fp32_are_fp32) {
  check_products<StateProduct<float>, float>(1e-5);
}

__global__ void walk_stream(const int32_t* numbers, int count, const __grid_constant__ Divider size,
                            const __grid_constant__ TileRange range, int places, int32_t* at,
                            TileRange* found) {
  const Stream stream = {numbers, count, size};
  const TileRange mine = stream.places(range);
  if (threadIdx.x == 0) *found = mine;
  for (int n = static_cast<int>(threadIdx.x); n < places; n += 32) at[n] = stream.at(n);
}

EMULATOR_TEST(streams_of_listed_blocks) {
  for (const int size : {1, 5, 16}) {
    std::vector<int32_t> numbers, positions;
    for (int32_t n = 1; n < 90; n += 1 + n % 3) numbers.push_back(n);
    for (const int32_t n : numbers) {
      for (int i = 0; i < size; ++i) positions.push_back(n * size + i);
    }
    const int places = static_cast<int>(positions.size());
    const TileRange range = {7 * size, 7 * size + 3, 50 * size + 1, 61 * size};
    std::vector<int32_t> at(places + 5);
    TileRange found = {};
    ATTNFORGE_LAUNCH(walk_stream, dim3(1), dim3(32), 0, nullptr, numbers.data(),
                     static_cast<int>(numbers.size()), Divider::by(size), range, places + 5,
                     at.data(), &found);
    for (int n = 0; n < places + 5; ++n) REQUIRE(at[n] == (n < places ? positions[n] : kNowhere));
    const auto below = [&](int bound) {
      int count = 0;
      for (const int32_t x : positions) count += x < bound;
      return count;
    };
    REQUIRE(found.lo == below(range.lo) && found.whole_lo == below(range.whole_lo));
    REQUIRE(found.whole_hi == below(range.whole_hi) && found.hi == below(range.hi));
  }
}

// Each team of a block votes; one thread says yes.
template <class Team>
__global__ void vote(int yes, uint32_t* said) {
  const auto me = static_cast<int>(threadIdx.x);
  said[me] = Team::any(me == yes, ptx::dynamic_shared_memory());
}

template <class Team>
void check_votes(int threads) {
  for (const int yes : {-1, 0, 37, threads - 1}) {
    std::vector<uint32_t> said(threads);
    ATTNFORGE_LAUNCH((vote<Team>), dim3(1), dim3(threads), 16, nullptr, yes, said.data());
    for (int n = 0; n < threads; ++n) {
      REQUIRE(said[n] == (yes >= 0 && n / Team::kThreads == yes / Team::kThreads));
    }
  }
}

EMULATOR_TEST(teams_vote) {
  check_votes<BlockTeam<4>>(128);
  check_votes<ColumnTeam<4>>(128);
  check_votes<WarpTeam<4>>(128);
}

}  // namespace
}  // namespace attnforge::cuda
