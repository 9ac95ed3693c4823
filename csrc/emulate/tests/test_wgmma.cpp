// wgmma against plain loops: every layout of shared memory, both homes of A, and the rules of being
// asynchronous.
#include <algorithm>
#include <cstring>

#include "cuda/ptx/math.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/ptx/sync.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"
#include "testing.h"

namespace attnforge::emulate {
namespace {

using ptx::MatrixSwizzle;
using testing::expect_report;
using testing::Random;

// Where 16-byte chunk `chunk` of row `row` of a swizzled tile goes, rows `width` bytes wide.
uint32_t flipped(uint32_t chunk, uint32_t row, uint32_t width) {
  switch (width) {
    case 128:
      return chunk ^ row % 8;
    case 64:
      return chunk ^ row / 2 % 4;
    case 32:
      return chunk ^ row / 4 % 2;
    default:
      return chunk;
  }
}

MatrixSwizzle swizzle_of(uint32_t width) {
  return width == 128  ? MatrixSwizzle::k128
         : width == 64 ? MatrixSwizzle::k64
         : width == 32 ? MatrixSwizzle::k32
                       : MatrixSwizzle::kNone;
}

// A tile [rows, K] of `bytes`-wide elements in one of the canonical layouts, K = 32 / bytes.
struct Tile {
  std::vector<unsigned char> memory;  // as it lies in shared memory
  uint32_t leading, stride, width;

  // Each row's 32 bytes at once. Groups of 8 rows follow each other, 64 bytes padding between them.
  void k_major(uint32_t rows, uint32_t width_, const std::vector<uint32_t>& codes, int bytes) {
    width = width_;
    const uint32_t group = width == 16 ? 8 * 16 : 8 * width;
    leading = width == 16 ? rows / 8 * group + 1024 : 16;
    stride = group + (width == 16 ? 64 : 0);  // swizzled groups stay on their period
    memory.assign(2 * leading + rows / 8 * stride + 4096, 0xff);
    const uint32_t depth = 32 / bytes;
    for (uint32_t row = 0; row < rows; ++row) {
      for (uint32_t k = 0; k < depth; ++k) {
        const uint32_t byte = k * bytes, chunk = byte / 16;
        uint32_t at = row / 8 * stride + byte % 16;
        if (width == 16) {
          at += row % 8 * 16 + chunk * leading;
        } else {
          at += row % 8 * width + flipped(chunk, row % 8, width) * 16;
        }
        put(at, codes[row * depth + k], bytes);
      }
    }
  }

  // 16-bit only: row k holds `width` bytes of n.
  void mn_major(uint32_t rows, uint32_t width_, const std::vector<uint32_t>& codes) {
    width = width_;
    const uint32_t across = width / 2;  // elements of n in one row
    const uint32_t blocks = (rows + across - 1) / across;
    if (width == 16) {
      stride = 128 + 32;               // to the next 8 n
      leading = blocks * stride + 64;  // to k = 8..15
    } else {
      stride = 8 * width;                // to k = 8..15
      leading = 2 * stride + 8 * width;  // to the next `across` of n
    }
    memory.assign((blocks + 2) * (leading + stride), 0xff);
    for (uint32_t n = 0; n < rows; ++n) {
      for (uint32_t k = 0; k < 16; ++k) {
        uint32_t at = n % 8 * 2;
        if (width == 16) {
          at += n / 8 * stride + k / 8 * leading + k % 8 * 16;
        } else {
          at += n / across * leading + k / 8 * stride + k % 8 * width +
                flipped(n % across / 8, k % 8, width) * 16;
        }
        put(at, codes[n * 16 + k], 2);
      }
    }
  }

 private:
  void put(uint32_t at, uint32_t code, int bytes) {
    for (int i = 0; i < bytes; ++i) memory[at + i] = static_cast<unsigned char>(code >> 8 * i);
  }
};

enum class Kind { kBf16, kF16, kE4m3 };

uint32_t code_of(Kind kind, float x) {
  return kind == Kind::kBf16  ? ptx::bf16_from_float(x)
         : kind == Kind::kF16 ? ptx::f16_from_float(x)
                              : ptx::pack_e4m3x2(x, 0) & 0xffu;
}

struct Operands {
  const unsigned char* a;  // tiles as they lie
  const unsigned char* b;
  uint32_t a_bytes, b_bytes, b_start;
  uint64_t a_descriptor, b_descriptor;  // of shared address 0
  const uint32_t* a_registers;          // [128, 4]
  float* d;                             // [128, N / 2]
};

__device__ void copy_in(uint32_t shared, const unsigned char* from, uint32_t bytes) {
  for (uint32_t i = 4 * threadIdx.x; i < bytes; i += 4 * blockDim.x) {
    uint32_t word;
    memcpy(&word, from + i, 4);
    ptx::store_shared(shared + i, word);
  }
}

template <Kind kKind, int kN, bool kRegisters, bool kMnA, bool kMnB>
__global__ void multiply(Operands o) {
  const uint32_t shared = ptx::dynamic_shared_memory();
  copy_in(shared, o.a, o.a_bytes);
  copy_in(shared + o.b_start, o.b, o.b_bytes);
  ptx::fence_proxy_async();
  ptx::sync_threads();
  const uint64_t a_descriptor = o.a_descriptor + (shared >> 4);
  const uint64_t b_descriptor = o.b_descriptor + ((shared + o.b_start) >> 4);
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = o.a_registers[4 * threadIdx.x + i];
  float d[kN / 2];  // the first product does not look at it
  ptx::wgmma_fence();
  for (int twice = 0; twice < 2; ++twice) {
    if constexpr (kKind == Kind::kE4m3) {
      if constexpr (kRegisters) {
        ptx::wgmma_e4m3<kN>(d, a, b_descriptor, twice);
      } else {
        ptx::wgmma_e4m3<kN>(d, a_descriptor, b_descriptor, twice);
      }
    } else if constexpr (kRegisters) {
      if constexpr (kKind == Kind::kBf16) ptx::wgmma_bf16<kN, kMnB>(d, a, b_descriptor, twice);
      if constexpr (kKind == Kind::kF16) ptx::wgmma_f16<kN, kMnB>(d, a, b_descriptor, twice);
    } else {
      if constexpr (kKind == Kind::kBf16) {
        ptx::wgmma_bf16<kN, kMnA, kMnB>(d, a_descriptor, b_descriptor, twice);
      }
      if constexpr (kKind == Kind::kF16) {
        ptx::wgmma_f16<kN, kMnA, kMnB>(d, a_descriptor, b_descriptor, twice);
      }
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) o.d[threadIdx.x * (kN / 2) + i] = d[i];
}

// D = 2 A B by two products into the same registers, one of which adds.
template <Kind kKind, int kN, bool kRegisters = false, bool kMnA = false, bool kMnB = false>
void check(uint32_t a_width, uint32_t b_width) {
  constexpr int bytes = kKind == Kind::kE4m3 ? 1 : 2;
  constexpr int depth = 32 / bytes, per = 4 / bytes;
  Random random(kN + a_width + b_width);
  std::vector<float> a(64 * depth), b(kN * depth);
  std::vector<uint32_t> a_codes, b_codes, a_registers(128 * 4);
  for (float& x : a) x = std::round(random.unit() * 8) / 8;
  for (float& x : b) x = std::round(random.unit() * 8) / 8;
  for (float x : a) a_codes.push_back(code_of(kKind, x));
  for (float x : b) b_codes.push_back(code_of(kKind, x));
  Tile a_tile, b_tile;
  if (kMnA) {
    a_tile.mn_major(64, a_width, a_codes);
  } else {
    a_tile.k_major(64, a_width, a_codes, bytes);
  }
  if (kMnB) {
    b_tile.mn_major(kN, b_width, b_codes);
  } else {
    b_tile.k_major(kN, b_width, b_codes, bytes);
  }
  for (int thread = 0; thread < 128; ++thread) {
    const int group = thread % 32 / 4, part = thread % 4;
    for (int r = 0; r < 4; ++r) {
      const int row = thread / 32 * 16 + group + r % 2 * 8;
      for (int i = 0; i < per; ++i) {
        const int k = (part + r / 2 * 4) * per + i;
        a_registers[thread * 4 + r] |= a_codes[row * depth + k] << 8 * bytes * i;
      }
    }
  }
  std::vector<float> d(128 * kN / 2);
  const auto a_bytes = static_cast<uint32_t>(a_tile.memory.size()) / 4 * 4;
  const auto b_bytes = static_cast<uint32_t>(b_tile.memory.size()) / 4 * 4;
  const uint32_t b_start = (a_bytes + 1023) / 1024 * 1024;
  const Operands operands{
      a_tile.memory.data(),
      b_tile.memory.data(),
      a_bytes,
      b_bytes,
      b_start,
      ptx::wgmma_descriptor(0, a_tile.leading, a_tile.stride, swizzle_of(a_width)),
      ptx::wgmma_descriptor(0, b_tile.leading, b_tile.stride, swizzle_of(b_width)),
      a_registers.data(),
      d.data()};
  ATTNFORGE_LAUNCH((multiply<kKind, kN, kRegisters, kMnA, kMnB>), dim3(1), dim3(128),
                   b_start + b_bytes, nullptr, operands);
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < kN / 2; ++i) {
      // The manual: row 16 (thread / 32) + lane / 4, and + 8 for the second pair of each four.
      const int row = thread / 32 * 16 + thread % 32 / 4 + (i % 4 < 2 ? 0 : 8);
      const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      double sum = 0;
      for (int k = 0; k < depth; ++k) sum += double{a[row * depth + k]} * b[column * depth + k];
      testing::require_equal(d[thread * (kN / 2) + i], 2 * sum, 0, "an element of the product");
    }
  }
}

EMULATOR_TEST(wgmma_k_major_of_every_swizzle) {
  for (uint32_t width : {16, 32, 64, 128}) {
    check<Kind::kBf16, 64>(width, width);
    check<Kind::kF16, 16>(128, width);
    check<Kind::kE4m3, 32>(width, width);
  }
}

EMULATOR_TEST(wgmma_mn_major_of_every_swizzle) {
  for (uint32_t width : {16, 32, 64, 128}) {
    check<Kind::kBf16, 64, false, false, true>(128, width);
    check<Kind::kBf16, 128, false, false, true>(128, width);
    check<Kind::kF16, 64, false, true, false>(width, 128);
  }
}

EMULATOR_TEST(wgmma_with_a_in_registers) {
  check<Kind::kBf16, 64, true>(128, 128);
  check<Kind::kF16, 8, true>(128, 64);
  check<Kind::kBf16, 128, true, false, true>(128, 128);
  check<Kind::kE4m3, 64, true>(128, 128);
}

EMULATOR_TEST(wgmma_of_unusual_n) {
  check<Kind::kBf16, 8>(128, 128);
  check<Kind::kBf16, 80>(128, 128);
  check<Kind::kF16, 176>(128, 128);
  check<Kind::kBf16, 256>(128, 128);
}

// A tile that TMA has loaded is read as it lies, 32 bytes further for each next k. And the planted
// bugs of what is asynchronous.
enum class Bug {
  kNone,
  kWrongSwizzle,   // of the descriptor
  kNoFence,        // wgmma_fence
  kNoProxyFence,   // st.shared, then wgmma
  kNoWait,         // reads the accumulators in flight
  kTouches,        // writes them
  kOverwrites,     // writes shared memory in flight
  kUnaligned,      // a tile beside the swizzle's period
  kDivergentLane,  // one lane has another descriptor
};

template <Bug kBug>
__global__ void square(const __grid_constant__ cuda::TensorMap map, float* out) {
  const uint32_t shared = ptx::dynamic_shared_memory();
  const uint32_t tile = shared + 1024 + (kBug == Bug::kUnaligned ? 128 : 0), barrier = shared;
  if (kBug == Bug::kNoProxyFence) {
    for (uint32_t i = threadIdx.x; i < 2048; i += 128) ptx::store_shared(tile + 4 * i, 0u);
  } else if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(barrier, 8192);
    ptx::tma_load_2d(tile, &map, barrier, 0, 0);
  }
  ptx::sync_threads();
  if (kBug != Bug::kNoProxyFence) ptx::mbarrier_wait(barrier, 0);
  float d[32];
  if (kBug != Bug::kNoFence) ptx::wgmma_fence();
  for (uint32_t k = 0; k < 4; ++k) {
    uint32_t start = tile + 32 * k;
    if (kBug == Bug::kDivergentLane && threadIdx.x == 9) start += 32;
    const uint64_t descriptor = ptx::wgmma_descriptor(
        start, 16, kBug == Bug::kWrongSwizzle ? 512 : 1024,
        kBug == Bug::kWrongSwizzle ? MatrixSwizzle::k64 : MatrixSwizzle::k128);
    ptx::wgmma_bf16<64>(d, descriptor, descriptor, k > 0);
  }
  ptx::wgmma_commit();
  if (kBug == Bug::kTouches) d[5] = 0;
  if (kBug == Bug::kOverwrites && threadIdx.x == 0) ptx::store_shared(tile + 8, 0u);
  if (kBug == Bug::kNoWait) {
    for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = d[i];
  }
  ptx::wgmma_wait<0>();
  if (kBug == Bug::kNoWait) return;
  for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = d[i];
}

template <Bug kBug>
void run_square() {
  Random random(3);
  alignas(16) static uint16_t x[64][64];
  for (auto& row : x) {
    for (uint16_t& element : row) {
      element = ptx::bf16_from_float(std::round(random.unit() * 8) / 8);
    }
  }
  cuda::TensorMap map;
  make_tensor_map(
      &map,
      {x, 2, {64, 64}, {2, 128}, {64, 64}, cuda::TensorType::kBf16, cuda::TensorSwizzle::k128});
  std::vector<float> out(128 * 32);
  ATTNFORGE_LAUNCH((square<kBug>), dim3(1), dim3(128), 1024 + 8192 + 1024, nullptr, map,
                   out.data());
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < 32; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + (i % 4 < 2 ? 0 : 8);
      const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      double sum = 0;
      for (int k = 0; k < 64; ++k) {
        sum += double{ptx::float_from_bf16(x[row][k])} * ptx::float_from_bf16(x[column][k]);
      }
      testing::require_equal(out[thread * 32 + i], sum, 0, "an element of the product");
    }
  }
}

// A bug that gives wrong values rather than a report.
void expect_wrong(void (*run)()) {
  bool wrong = false;
  try {
    run();
  } catch (const std::runtime_error&) {
    wrong = true;
  }
  if (!wrong) throw std::runtime_error("the bug was not noticed");
}

EMULATOR_TEST(wgmma_reads_what_tma_loaded) {
  run_square<Bug::kNone>();
}

EMULATOR_TEST(wrong_swizzle) {
  expect_wrong(run_square<Bug::kWrongSwizzle>);
}

EMULATOR_TEST(missing_wgmma_fence) {
  expect_report(run_square<Bug::kNoFence>, {"no wgmma_fence", "test_wgmma.cpp"});
}

EMULATOR_TEST(missing_proxy_fence_before_wgmma) {
  expect_report(run_square<Bug::kNoProxyFence>,
                {"through the async proxy", "no fence.proxy.async stands between"});
}

EMULATOR_TEST(accumulators_read_in_flight) {
  expect_wrong(run_square<Bug::kNoWait>);
}

EMULATOR_TEST(accumulators_written_in_flight) {
  expect_report(run_square<Bug::kTouches>, {"accumulator 5", "was written while the product"});
}

EMULATOR_TEST(operands_overwritten_in_flight) {
  expect_report(run_square<Bug::kOverwrites>,
                {"which an asynchronous operation in flight may still read"});
}

EMULATOR_TEST(tile_beside_the_period_of_its_swizzle) {
  expect_report(run_square<Bug::kUnaligned>, {"the descriptor of A starts at byte 1152"});
}

EMULATOR_TEST(descriptor_that_lanes_disagree_on) {
  expect_report(run_square<Bug::kDivergentLane>, {"has another descriptor"});
}

__global__ void half_a_warpgroup(int) {
  ptx::wgmma_fence();
}

EMULATOR_TEST(wgmma_needs_a_whole_warpgroup) {
  expect_report([] { ATTNFORGE_LAUNCH(half_a_warpgroup, dim3(1), dim3(64), 0, nullptr, 0); },
                {"no whole warpgroup"});
}

__global__ void move_registers(int* out) {
  if (threadIdx.x < 128) {
    ptx::lower_registers<24>();
  } else {
    ptx::raise_registers<240>();
    out[threadIdx.x - 128] = 1;
  }
}

EMULATOR_TEST(registers_move_between_warpgroups) {
  std::vector<int> out(128);
  ATTNFORGE_LAUNCH(move_registers, dim3(1), dim3(256), 0, nullptr, out.data());
  REQUIRE(std::count(out.begin(), out.end(), 1) == 128);
}

}  // namespace
}  // namespace attnforge::emulate
