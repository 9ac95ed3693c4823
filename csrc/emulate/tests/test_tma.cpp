// TMA: boxes, fill, swizzles, stores, and the proxy fence.
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/sync.h"
#include "cuda/ptx/tma.h"
#include "testing.h"

namespace attnforge::emulate {
namespace {

using cuda::make_tensor_map;
using cuda::TensorMap;
using cuda::TensorShape;
using cuda::TensorSwizzle;
using cuda::TensorType;
using testing::expect_report;

constexpr uint32_t kBox = 1024;  // where the box lies in shared memory; the mbarrier is at 0

// Loads one box and copies shared memory out as it lies.
template <int kRank>
__global__ void load_box(const __grid_constant__ TensorMap map, const int32_t* at, uint32_t bytes,
                         uint16_t* out) {
  const uint32_t barrier = ptx::dynamic_shared_memory(), box = barrier + kBox;
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&map);
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(barrier, bytes);
    if constexpr (kRank == 2) ptx::tma_load_2d(box, &map, barrier, at[0], at[1]);
    if constexpr (kRank == 3) ptx::tma_load_3d(box, &map, barrier, at[0], at[1], at[2]);
    if constexpr (kRank == 4) ptx::tma_load_4d(box, &map, barrier, at[0], at[1], at[2], at[3]);
    if constexpr (kRank == 5) {
      ptx::tma_load_5d(box, &map, barrier, at[0], at[1], at[2], at[3], at[4]);
    }
  }
  ptx::sync_threads();
  ptx::mbarrier_wait(barrier, 0);
  for (uint32_t i = threadIdx.x; i < bytes / 2; i += 32) {
    out[i] = ptx::load_shared<uint16_t>(box + 2 * i);
  }
}

struct Case {
  uint64_t extent[5] = {1, 1, 1, 1, 1};
  uint32_t box[5] = {1, 1, 1, 1, 1};
  int32_t at[5] = {};
};

// Element (i0, i1, ...) of the tensor is its linear index + 1; what lies outside must load as 0.
template <int kRank>
void check_load(const Case& c, TensorSwizzle swizzle) {
  uint64_t strides[5] = {2}, elements[5] = {1}, size = 1;
  for (int d = 0; d < kRank; ++d) {
    elements[d] = size;
    strides[d] = 2 * size;
    size *= c.extent[d];
  }
  std::vector<uint16_t> tensor(size + 8);
  uint16_t* base = tensor.data();
  while (reinterpret_cast<uintptr_t>(base) % 16) ++base;
  for (uint64_t i = 0; i < size; ++i) base[i] = static_cast<uint16_t>(i + 1);
  TensorShape shape{base, kRank, {}, {}, {}, TensorType::kBf16, swizzle};
  uint32_t count = 1;
  for (int d = 0; d < kRank; ++d) {
    shape.extent[d] = c.extent[d];
    shape.stride[d] = strides[d];
    shape.box[d] = c.box[d];
    count *= c.box[d];
  }
  TensorMap map;
  REQUIRE(make_tensor_map(&map, shape) == 0);
  std::vector<uint16_t> out(count);
  ATTNFORGE_LAUNCH((load_box<kRank>), dim3(1), dim3(32), kBox + 2 * count, nullptr, map, c.at,
                   2 * count, out.data());
  const uint32_t row_chunks = c.box[0] / 8;  // of 16 bytes
  for (uint32_t i = 0; i < count; ++i) {
    uint64_t wanted = 1;
    bool inside = true;
    for (uint32_t d = 0, rest = i; d < kRank; ++d) {
      const int64_t index = c.at[d] + static_cast<int64_t>(rest % c.box[d]);
      rest /= c.box[d];
      inside &= 0 <= index && index < static_cast<int64_t>(c.extent[d]);
      wanted += static_cast<uint64_t>(index) * elements[d];
    }
    // Rows as wide as the swizzle: chunk j of row r lies where chunk j ^ f(r) would.
    const uint32_t row = i / c.box[0], chunk = i % c.box[0] / 8;
    uint32_t flip = 0;
    if (swizzle == TensorSwizzle::k128) flip = row % 8;
    if (swizzle == TensorSwizzle::k64) flip = row / 2 % 4;
    if (swizzle == TensorSwizzle::k32) flip = row / 4 % 2;
    const uint32_t place = (row * row_chunks + (chunk ^ flip)) * 8 + i % 8;
    REQUIRE(out[place] == (inside ? wanted : 0));
  }
}

EMULATOR_TEST(tma_loads_boxes_of_every_rank) {
  check_load<2>({{24, 10}, {8, 4}, {8, 3}}, TensorSwizzle::kNone);
  check_load<3>({{16, 5, 4}, {8, 2, 3}, {8, 1, 1}}, TensorSwizzle::kNone);
  check_load<4>({{8, 4, 3, 3}, {8, 2, 2, 1}, {0, 1, 1, 2}}, TensorSwizzle::kNone);
  check_load<5>({{8, 3, 3, 3, 2}, {8, 2, 1, 2, 2}, {0, 1, 2, 0, 0}}, TensorSwizzle::kNone);
}

EMULATOR_TEST(tma_fills_with_zeros) {
  check_load<2>({{24, 10}, {16, 8}, {16, 7}}, TensorSwizzle::kNone);   // beyond the end
  check_load<2>({{24, 10}, {16, 8}, {-8, -3}}, TensorSwizzle::kNone);  // before the start
  check_load<2>({{24, 10}, {8, 8}, {64, 64}}, TensorSwizzle::kNone);   // all outside
  check_load<3>({{8, 6, 5}, {8, 4, 4}, {0, 4, 3}}, TensorSwizzle::kNone);
}

EMULATOR_TEST(tma_swizzles) {
  check_load<2>({{64, 40}, {64, 24}, {0, 3}}, TensorSwizzle::k128);
  check_load<2>({{40, 40}, {32, 24}, {0, 3}}, TensorSwizzle::k64);
  check_load<2>({{24, 40}, {16, 24}, {8, 20}}, TensorSwizzle::k32);
}

EMULATOR_TEST(tensor_maps_are_checked) {
  alignas(16) static const uint16_t memory[64 * 64] = {};
  const TensorShape good{
      memory, 2, {64, 64}, {2, 128}, {64, 64}, TensorType::kBf16, TensorSwizzle::k128};
  TensorMap map;
  make_tensor_map(&map, good);
  const auto report = [&](auto change, const char* part) {
    TensorShape bad = good;
    change(bad);
    expect_report([&] { make_tensor_map(&map, bad); }, {"make_tensor_map", part});
  };
  report([](TensorShape& s) { s.base = memory + 1; }, "not 16-byte aligned");
  report([](TensorShape& s) { s.stride[1] = 130; }, "stride 130 of dimension 1");
  report([](TensorShape& s) { s.box[1] = 257; }, "box 257 of dimension 1");
  report([](TensorShape& s) { s.box[0] = 4; }, "a multiple of 16 is needed");
  report([](TensorShape& s) { s.swizzle = TensorSwizzle::k64; }, "the swizzle spans 64");
  report([](TensorShape& s) { s.rank = 1; }, "rank 1");
  report([](TensorShape& s) { s.extent[0] = 0; }, "extent 0");
}

// Every thread writes a row; one thread stores the box.
enum class Bug { kNone, kNoFence, kNoSync, kNoWait, kOverwrites };

template <Bug kBug, bool kAdd>
__global__ void store_box(const __grid_constant__ TensorMap map, int32_t x, int32_t y) {
  const uint32_t box = ptx::dynamic_shared_memory();
  for (uint32_t i = 0; i < 4; ++i) {
    ptx::store_shared(box + 16 * threadIdx.x + 4 * i, static_cast<float>(threadIdx.x * 4 + i + 1));
  }
  if (kBug != Bug::kNoFence) ptx::fence_proxy_async();
  if (kBug != Bug::kNoSync) ptx::sync_threads();
  if (threadIdx.x == 0) {
    if constexpr (kAdd) {
      ptx::tma_add_2d(&map, box, x, y);
    } else {
      ptx::tma_store_2d(&map, box, x, y);
    }
    ptx::bulk_commit();
    if (kBug == Bug::kOverwrites) ptx::store_shared(box, 0.0f);
    if (kBug != Bug::kNoWait) ptx::bulk_wait_read<0>();
  }
}

template <Bug kBug, bool kAdd>
void run_store_box() {
  alignas(16) float tensor[10][12];
  for (auto& row : tensor) {
    for (float& x : row) x = 1000;
  }
  TensorMap map;
  make_tensor_map(&map,
                  {tensor, 2, {12, 10}, {4, 48}, {4, 8}, TensorType::kF32, TensorSwizzle::kNone});
  ATTNFORGE_LAUNCH((store_box<kBug, kAdd>), dim3(1), dim3(8), 128, nullptr, map, 4, 5);
  for (int y = 0; y < 10; ++y) {
    for (int x = 0; x < 12; ++x) {
      const bool inside = 4 <= x && x < 8 && y >= 5;  // the box hangs over by three rows
      const float value = inside ? static_cast<float>((y - 5) * 4 + x - 4 + 1) : 0;
      REQUIRE(tensor[y][x] == (!inside ? 1000 : kAdd ? 1000 + value : value));
    }
  }
}

EMULATOR_TEST(tma_stores_and_adds) {
  run_store_box<Bug::kNone, false>();
  run_store_box<Bug::kNone, true>();
}

EMULATOR_TEST(missing_proxy_fence) {
  expect_report(run_store_box<Bug::kNoFence, false>,
                {"through the async proxy", "no fence.proxy.async stands between"});
}

EMULATOR_TEST(store_before_the_writers_are_done) {
  expect_report(run_store_box<Bug::kNoSync, false>, {"shared memory at byte"});
}

EMULATOR_TEST(store_not_waited_for) {
  expect_report(run_store_box<Bug::kNoWait, false>, {"left the kernel before bulk_wait_read"});
}

EMULATOR_TEST(store_whose_source_is_overwritten) {
  expect_report(run_store_box<Bug::kOverwrites, false>,
                {"which an asynchronous operation in flight may still read"});
}

template <int kRank, bool kAdd>
__global__ void store_any_rank(const __grid_constant__ TensorMap map) {
  const uint32_t box = ptx::dynamic_shared_memory();
  for (uint32_t i = 0; i < 16; ++i) ptx::store_shared(box + 4 * i, static_cast<float>(i));
  ptx::fence_proxy_async();
  if constexpr (kRank == 3 && !kAdd) ptx::tma_store_3d(&map, box, 0, 1, 0);
  if constexpr (kRank == 4 && !kAdd) ptx::tma_store_4d(&map, box, 0, 1, 0, 0);
  if constexpr (kRank == 5 && !kAdd) ptx::tma_store_5d(&map, box, 0, 1, 0, 0, 0);
  if constexpr (kRank == 3 && kAdd) ptx::tma_add_3d(&map, box, 0, 1, 0);
  if constexpr (kRank == 4 && kAdd) ptx::tma_add_4d(&map, box, 0, 1, 0, 0);
  if constexpr (kRank == 5 && kAdd) ptx::tma_add_5d(&map, box, 0, 1, 0, 0, 0);
  ptx::bulk_commit();
  ptx::bulk_wait<0>();
}

template <int kRank>
void check_store_rank() {
  alignas(16) float tensor[2][3][4] = {};  // the outer dimension is the last of the rank
  TensorShape shape{tensor,
                    kRank,
                    {4, 3, 1, 1, 1},
                    {4, 16, 96, 96, 96},
                    {4, 2, 1, 1, 1},
                    TensorType::kF32,
                    TensorSwizzle::kNone};
  shape.extent[kRank - 1] = 2;
  shape.stride[kRank - 1] = 48;
  shape.box[kRank - 1] = 2;
  TensorMap map;
  make_tensor_map(&map, shape);
  ATTNFORGE_LAUNCH((store_any_rank<kRank, false>), dim3(1), dim3(1), 64, nullptr, map);
  ATTNFORGE_LAUNCH((store_any_rank<kRank, true>), dim3(1), dim3(1), 64, nullptr, map);
  for (int z = 0; z < 2; ++z) {
    for (int y = 0; y < 3; ++y) {
      for (int x = 0; x < 4; ++x) {
        REQUIRE(tensor[z][y][x] == static_cast<float>(y ? 2 * (z * 8 + (y - 1) * 4 + x) : 0));
      }
    }
  }
}

EMULATOR_TEST(tma_stores_of_every_rank) {
  check_store_rank<3>();
  check_store_rank<4>();
  check_store_rank<5>();
}

// A generic write into a stage, then a bulk copy over it: the writes go through two proxies.
template <bool kFence>
__global__ void overwrite_by_copy(const float* in, float* out) {
  const uint32_t barrier = ptx::dynamic_shared_memory(), data = barrier + 128;
  ptx::store_shared(data, 7.0f);
  ptx::mbarrier_init(barrier, 1);
  ptx::fence_mbarrier_init();
  if (kFence) ptx::fence_proxy_async();
  ptx::mbarrier_arrive_expect(barrier, 16);
  ptx::bulk_load(data, in, 16, barrier);
  ptx::mbarrier_wait(barrier, 0);
  *out = ptx::load_shared<float>(data);
}

EMULATOR_TEST(copy_over_a_generic_write) {
  alignas(16) const float in[4] = {3, 3, 3, 3};
  float out = 0;
  ATTNFORGE_LAUNCH((overwrite_by_copy<true>), dim3(1), dim3(1), 256, nullptr, in, &out);
  REQUIRE(out == 3);
  expect_report(
      [&] {
        ATTNFORGE_LAUNCH((overwrite_by_copy<false>), dim3(1), dim3(1), 256, nullptr, in, &out);
      },
      {"writes through the async proxy", "no fence.proxy.async stands between"});
}

}  // namespace
}  // namespace attnforge::emulate
