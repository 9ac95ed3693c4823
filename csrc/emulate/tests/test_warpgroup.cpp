// The vocabulary of warpgroups (csrc/cuda/tile/{panel_tile,pipeline,warpgroup}.h), each primitive
// alone: tiles by TMA, the two products, stages, turns, votes.
#include "cuda/tile/epilogue.h"
#include "cuda/tile/hidden.h"
#include "cuda/tile/pipeline.h"
#include "cuda/tile/warpgroup.h"
#include "testing.h"

namespace attnforge::cuda {
namespace {

using emulate::testing::expect_report;
using emulate::testing::Random;
using emulate::testing::require_equal;

template <class T>
std::vector<T> numbers(int count, uint32_t seed) {
  Random random(seed);
  std::vector<T> values;
  for (int i = 0; i < count; ++i) values.push_back(narrow<T>(random.unit()));
  return values;
}

// [rows, 1, 1, dim] with rows `stride` elements apart, in boxes for a tile.
template <class Tile>
TensorMap map_of(const std::vector<typename Tile::Element>& x, int rows, int dim, int stride) {
  constexpr auto kType =
      std::is_same_v<typename Tile::Element, Half> ? TensorType::kF16 : TensorType::kBf16;
  const auto bytes = static_cast<uint64_t>(2 * stride);
  TensorMap map;
  make_tensor_map(&map, {x.data(),
                         4,
                         {static_cast<uint64_t>(dim), 1, static_cast<uint64_t>(rows), 1},
                         {2, 16, bytes, 16},
                         {64, 1, Tile::kRows, 1},
                         kType,
                         TensorSwizzle::k128});
  return map;
}

// One thread fills a tile from row `first` on, all others see it.
template <class Tile>
AF_DEVICE void fill_tile(const Tile& tile, const TensorMap& map, uint32_t barrier, int first) {
  const Pipeline<1> stage = {barrier};
  if (threadIdx.x == 0) {
    stage.init(1);
    ptx::fence_mbarrier_init();
    stage.acquire(0, Tile::kBytes);
    load_panels(tile, map, stage.full(0), 0, first, 0);
  }
  ptx::sync_threads();
  stage.wait(0);
}

template <class Tile>
__global__ void copy_panels(const __grid_constant__ TensorMap map, int first,
                            typename Tile::Element* to) {
  const Tile tile = {ptx::dynamic_shared_memory()};
  fill_tile(tile, map, tile.base + Tile::kBytes, first);
  for (int n = static_cast<int>(threadIdx.x); n < Tile::kRows * Tile::kChunks; n += 32) {
    const int row = n / Tile::kChunks, c = n % Tile::kChunks;
    const auto chunk = ptx::load_shared<ptx::U32x4>(tile.chunk(row, c));
    __builtin_memcpy(to + (row * Tile::kChunks + c) * Tile::kPerChunk, &chunk, 16);
  }
}

template <class T, int kRows, int kDim>
void check_copy(int rows, int dim, int first) {
  using Tile = PanelTile<T, kRows, kDim>;
  constexpr int kWidth = Tile::kChunks * Tile::kPerChunk;
  const int stride = dim + 8;
  const auto from = numbers<T>(rows * stride, 3);
  std::vector<T> to(kRows * kWidth);
  ATTNFORGE_LAUNCH((copy_panels<Tile>), dim3(1), dim3(32), Tile::kBytes + 16, nullptr,
                   map_of<Tile>(from, rows, dim, stride), first, to.data());
  for (int row = 0; row < kRows; ++row) {
    for (int d = 0; d < kWidth; ++d) {
      const bool real = first + row < rows && d < dim;
      const float wanted = real ? widen(from[(first + row) * stride + d]) : 0.0f;
      REQUIRE(widen(to[row * kWidth + d]) == wanted);
    }
  }
}

EMULATOR_TEST(panels_hold_what_exists_and_zeros) {
  check_copy<BFloat16, 64, 64>(100, 64, 0);
  check_copy<BFloat16, 128, 128>(100, 72, 40);  // rows and columns out of the tensor
  check_copy<Half, 112, 192>(112, 192, 0);
  check_copy<BFloat16, 80, 96>(81, 8, 80);  // panels out of the tensor
}

// S = A B^T and O = S B of one warpgroup; A's rows from 64 on, so that a tile has two of them.
template <class T, int kKeys, int kDim>
__global__ void products(const __grid_constant__ TensorMap a_map,
                         const __grid_constant__ TensorMap b_map, float* s_out, float* o_out) {
  using TileA = PanelTile<T, 128, kDim>;
  using TileB = PanelTile<T, kKeys, kDim>;
  const TileA a = {ptx::dynamic_shared_memory()};
  const TileB b = {a.base + TileA::kBytes};
  const uint32_t barriers = b.base + TileB::kBytes;
  fill_tile(a, a_map, barriers, 0);
  fill_tile(b, b_map, barriers + 16, 0);
  const int row = 16 * warp_id();
  Accumulators<1, kKeys / 8> s;
  ptx::wgmma_fence();
  issue_nt(s, a, 64, b);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_pin(flat<kKeys / 8>(s));
  Accumulators<1, kDim / 8> o;
  fill<1, kDim / 8>(o, 0.5f);
  Weights<kKeys> p;
  pack_weights<T, kKeys>(p, s);
  ptx::wgmma_fence();
  issue_nn(o, p, b);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_pin(flat<kDim / 8>(o));
  store_pairs<1, kKeys / 8>(
      row, kKeys, [&](int m, int n, int i) { return s[m][n][i]; },
      [&](int r) { return s_out + r * kKeys; });
  store_pairs<1, kDim / 8>(
      row, kDim, [&](int m, int n, int i) { return o[m][n][i]; },
      [&](int r) { return o_out + r * kDim; });
}

template <class T, int kKeys, int kDim>
void check_products(double o_error) {
  using TileA = PanelTile<T, 128, kDim>;
  using TileB = PanelTile<T, kKeys, kDim>;
  const auto a = numbers<T>(128 * kDim, 1), b = numbers<T>(kKeys * kDim, 2);
  std::vector<float> s(64 * kKeys), o(64 * kDim);
  ATTNFORGE_LAUNCH((products<T, kKeys, kDim>), dim3(1), dim3(128),
                   TileA::kBytes + TileB::kBytes + 32, nullptr, map_of<TileA>(a, 128, kDim, kDim),
                   map_of<TileB>(b, kKeys, kDim, kDim), s.data(), o.data());
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < kKeys; ++j) {
      double sum = 0.0;
      for (int d = 0; d < kDim; ++d) {
        sum += double{widen(a[(64 + i) * kDim + d])} * widen(b[j * kDim + d]);
      }
      require_equal(s[i * kKeys + j], sum, 1e-4, "S");
    }
    for (int d = 0; d < kDim; ++d) {
      double sum = 0.5;
      for (int j = 0; j < kKeys; ++j) {
        sum += double{widen(narrow<T>(s[i * kKeys + j]))} * widen(b[j * kDim + d]);
      }
      require_equal(o[i * kDim + d], sum, o_error, "O");
    }
  }
}

EMULATOR_TEST(products_of_a_warpgroup) {
  check_products<BFloat16, 64, 64>(1e-3);
  check_products<BFloat16, 112, 96>(1e-3);  // half a panel
  check_products<Half, 80, 192>(1e-3);
  check_products<BFloat16, 48, 256>(1e-3);
}

// Numbers pass through stages: the producer loads row n of x, every consumer warp adds up what it
// sees, in two calls of a persistent kernel's loop.
enum class Slip { kNone, kNoWait, kNoRelease, kEarlyRelease };

template <Slip kSlip>
__global__ void pass_through(const float* x, int uses, float* sums) {
  using Team = Consumers<2>;
  const Pipeline<3> pipe = {ptx::dynamic_shared_memory()};
  const auto slot = [&](int n) { return pipe.base + 128 + 128 * pipe.stage(n); };
  if (threadIdx.x == 0) {
    pipe.init(Team::kWarps);
    ptx::fence_mbarrier_init();
  }
  ptx::sync_threads();
  if (Team::producing()) {
    if (threadIdx.x != 0) return;
    for (int n = 0; n < uses; ++n) {
      pipe.acquire(n, 128);
      ptx::bulk_load(slot(n), x + 32 * n, 128, pipe.full(n));
    }
    return;
  }
  float sum = 0.0f;
  for (int n = 0; n < uses; ++n) {
    if (kSlip != Slip::kNoWait) pipe.wait(n);
    if (kSlip == Slip::kEarlyRelease) pipe.release(n);
    sum += ptx::load_shared<float>(slot(n) + 4 * ptx::lane_id());
    ptx::sync_warp();
    if (kSlip == Slip::kNone || kSlip == Slip::kNoWait) pipe.release(n);
  }
  sums[Team::rank()] = sum;
}

template <Slip kSlip>
void run_pass_through() {
  constexpr int kUses = 11;
  const auto x = numbers<float>(32 * kUses + 4, 9);
  const float* aligned = x.data();
  while (reinterpret_cast<uintptr_t>(aligned) % 16) ++aligned;
  std::vector<float> sums(256);
  ATTNFORGE_LAUNCH(pass_through<kSlip>, dim3(1), dim3(384), 128 + 3 * 128, nullptr, aligned, kUses,
                   sums.data());
  for (int i = 0; i < 256; ++i) {
    float sum = 0.0f;
    for (int n = 0; n < kUses; ++n) sum += aligned[32 * n + i % 32];
    REQUIRE(sums[i] == sum);
  }
}

EMULATOR_TEST(stages_pass_every_use_once) {
  for (uint64_t n = 0; n < 3; ++n) {
    emulate::set_options(emulate::testing::seeded(n, 5));
    run_pass_through<Slip::kNone>();
  }
}

EMULATOR_TEST(stage_read_before_its_wait) {
  expect_report([] { run_pass_through<Slip::kNoWait>(); }, {"shared memory at byte"});
}

EMULATOR_TEST(stage_that_is_not_released) {
  expect_report([] { run_pass_through<Slip::kNoRelease>(); }, {"deadlock", "mbarrier_wait"});
}

EMULATOR_TEST(stage_released_before_its_last_read) {
  expect_report([] { run_pass_through<Slip::kEarlyRelease>(); }, {"shared memory at byte"});
}

// A stage with two parts: one thread loads the first, another warp stores the second.
template <bool kWaits>
__global__ void pass_parts_through(const float* x, int uses, float* sums) {
  using Team = Consumers<1>;
  const Pipeline<2> pipe = {ptx::dynamic_shared_memory()};
  const auto slot = [&](int n) { return pipe.base + 128 + 256 * pipe.stage(n); };
  if (threadIdx.x == 0) {
    pipe.init(Team::kWarps, 2);
    ptx::fence_mbarrier_init();
  }
  ptx::sync_threads();
  const uint32_t lane = ptx::lane_id();
  if (Team::producing()) {
    for (int n = 0; n < uses; ++n) {
      if (threadIdx.x == 0) {
        pipe.acquire(n, 128);
        ptx::bulk_load(slot(n), x + 32 * n, 128, pipe.full(n));
      } else if (warp_id() == 1) {
        if (kWaits) pipe.await_empty(n);
        ptx::store_shared(slot(n) + 128 + 4 * lane, x[32 * n + lane] + 1.0f);
        pipe.publish(n);
      }
    }
    return;
  }
  float sum = 0.0f;
  for (int n = 0; n < uses; ++n) {
    pipe.wait(n);
    sum += ptx::load_shared<float>(slot(n) + 4 * lane) +
           ptx::load_shared<float>(slot(n) + 128 + 4 * (31 - lane));
    ptx::sync_warp();
    pipe.release(n);
  }
  sums[Team::rank()] = sum;
}

template <bool kWaits>
void run_pass_parts_through() {
  constexpr int kUses = 7;
  const auto x = numbers<float>(32 * kUses + 4, 9);
  const float* aligned = x.data();
  while (reinterpret_cast<uintptr_t>(aligned) % 16) ++aligned;
  std::vector<float> sums(128);
  ATTNFORGE_LAUNCH(pass_parts_through<kWaits>, dim3(1), dim3(256), 128 + 2 * 256, nullptr, aligned,
                   kUses, sums.data());
  for (int i = 0; i < 128; ++i) {
    float sum = 0.0f;
    for (int n = 0; n < kUses; ++n) {
      sum += aligned[32 * n + i % 32] + (aligned[32 * n + 31 - i % 32] + 1.0f);
    }
    REQUIRE(sums[i] == sum);
  }
}

EMULATOR_TEST(stages_wait_for_every_producer) {
  for (uint64_t n = 0; n < 3; ++n) {
    emulate::set_options(emulate::testing::seeded(n, 5));
    run_pass_parts_through<true>();
  }
}

EMULATOR_TEST(stage_stored_into_while_it_is_read) {
  expect_report([] { run_pass_parts_through<false>(); }, {"shared memory at byte"});
}

template <int kGroups>
__global__ void take_turns(int turns, uint32_t* ticket, uint32_t* order) {
  using Team = Consumers<kGroups>;
  if (Team::producing()) return;
  const uint32_t group = Team::group();
  Turns<kGroups>::start(group);
  for (int i = 0; i < turns; ++i) {
    Turns<kGroups>::take(group);
    if (Team::rank() % 128 == 0) order[ptx::fetch_add_global(ticket, 1)] = group;
    Turns<kGroups>::pass(group);
  }
  Turns<kGroups>::finish(group);
}

template <int kGroups>
void check_turns() {
  constexpr int kTurns = 7;
  uint32_t ticket = 0;
  std::vector<uint32_t> order(kGroups * kTurns, 99);
  ATTNFORGE_LAUNCH(take_turns<kGroups>, dim3(1), dim3(Consumers<kGroups>::kBlockThreads), 0,
                   nullptr, kTurns, &ticket, order.data());
  for (uint32_t i = 0; i < order.size(); ++i) REQUIRE(order[i] == i % kGroups);
}

EMULATOR_TEST(warpgroups_take_turns) {
  check_turns<2>();
  check_turns<3>();
}

// Each group passes words through shared memory by its own barrier; then one thread's vote reaches
// all.
__global__ void meet_and_vote(int voter, uint32_t* seen, uint32_t* votes) {
  using Team = Consumers<2>;
  if (Team::producing()) return;
  const uint32_t scratch = ptx::dynamic_shared_memory(), words = scratch + 4 * Team::kWarps;
  const auto me = static_cast<uint32_t>(Team::rank());
  ptx::store_shared(words + 4 * me, 1000 + me);
  Team::sync_group();
  seen[me] = ptx::load_shared<uint32_t>(words + 4 * (me ^ 127));
  votes[me] = Team::any(Team::rank() == voter, scratch);
}

EMULATOR_TEST(consumers_meet_and_vote) {
  for (const int voter : {-1, 0, 255}) {
    std::vector<uint32_t> seen(256), votes(256);
    ATTNFORGE_LAUNCH(meet_and_vote, dim3(1), dim3(384), 4 * 8 + 4 * 256, nullptr, voter,
                     seen.data(), votes.data());
    for (uint32_t i = 0; i < 256; ++i) {
      REQUIRE(seen[i] == 1000 + (i ^ 127));
      REQUIRE(votes[i] == (voter >= 0));
    }
  }
}

// NaN of a tile that TMA brought become 0 for the next product; only rows in use say something.
template <bool kFence>
__global__ void tame_and_multiply(const __grid_constant__ TensorMap map, int rows, float* out,
                                  uint32_t* wild) {
  using Tile = PanelTile<BFloat16, 64, 64>;
  const Tile tile = {ptx::dynamic_shared_memory()};
  fill_tile(tile, map, tile.base + Tile::kBytes, 0);
  const bool found = tame<BlockTeam<4>>(tile, [&](int r) { return r < rows; });
  if (kFence) ptx::fence_proxy_async();
  wild[threadIdx.x] = BlockTeam<4>::any(found, tile.base + Tile::kBytes + 16);
  Accumulators<1, 8> s, o;
  zero<1, 8>(o);
  fill<1, 8>(s, 1.0f);
  Weights<64> p;
  pack_weights<BFloat16, 64>(p, s);
  ptx::wgmma_fence();
  issue_nn(o, p, tile);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  if (threadIdx.x == 0) out[0] = o[0][0][0];
}

template <bool kFence>
void run_tame(int bad_row, bool says) {
  auto x = numbers<BFloat16>(64 * 64, 4);
  float sum = 0.0f, out = 0.0f;
  for (int row = 0; row < 64; ++row) sum += row == bad_row ? 0.0f : widen(x[row * 64]);
  x[bad_row * 64] = narrow<BFloat16>(__builtin_nanf(""));
  std::vector<uint32_t> wild(128);
  using Tile = PanelTile<BFloat16, 64, 64>;
  ATTNFORGE_LAUNCH(tame_and_multiply<kFence>, dim3(1), dim3(128), Tile::kBytes + 32, nullptr,
                   map_of<Tile>(x, 64, 64, 64), 40, &out, wild.data());
  require_equal(out, sum, 1e-4, "a sum without its NaN");
  for (const uint32_t w : wild) REQUIRE(w == says);
}

EMULATOR_TEST(panels_are_tamed) {
  run_tame<true>(39, true);
  run_tame<true>(40, false);
}

EMULATOR_TEST(panels_tamed_without_the_proxy_fence) {
  expect_report([] { run_tame<false>(39, true); }, {"no fence.proxy.async stands between"});
}

}  // namespace
}  // namespace attnforge::cuda
