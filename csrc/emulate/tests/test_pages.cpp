// What the paged kernels compute with: codes in both directions, division by the page size, tiles
// of keys gathered through a table.
#include <cmath>
#include <limits>

#include "cuda/paged/encode.h"
#include "cuda/tile/pages.h"
#include "testing.h"

namespace attnforge::emulate {
namespace {

using namespace attnforge::cuda;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

EMULATOR_TEST(e4m3_without_the_instruction) {
  for (uint32_t code = 0; code < 256; ++code) {
    const float value = from_e4m3(code), wanted = e4m3_value(code);
    REQUIRE(value == wanted || (std::isnan(value) && std::isnan(wanted)));
    if (!std::isnan(value)) REQUIRE(to_e4m3(value) == code);
  }
  testing::Random random(3);
  for (int n = 0; n < 20000; ++n) {
    const float x = std::ldexp(random.unit(), static_cast<int>(random.bits() % 24) - 12);
    REQUIRE(to_e4m3(x) == e4m3_bits(x));
  }
  REQUIRE(to_e4m3(1e30f) == 0x7eu && to_e4m3(-kInfinity) == 0xfeu);
  REQUIRE((to_e4m3(std::nanf("")) & 0x7fu) == 0x7fu);
}

EMULATOR_TEST(whole_codes) {
  for (int n = -128; n < 128; ++n) REQUIRE(from_int8(static_cast<uint8_t>(n)) == n);
  for (int n = 0; n < 16; ++n) REQUIRE(from_int4(n) == n - 8);
  const ptx::U32x4 raw = {0x76543210u, 0xfedcba98u, 0u, 0x80000001u};
  for (int n = 0; n < 16; ++n) REQUIRE(code_of<PageType::kInt4>(raw, n) == n - 8);
  REQUIRE(code_of<PageType::kInt8>(raw, 12) == 1 && code_of<PageType::kInt8>(raw, 15) == -128);
  const auto code = [](PageType type, float x, float scale, float zero) {
    return encoded(type, x, scale, zero).code;
  };
  REQUIRE(code(PageType::kInt8, 1.25f, 0.5f, 0.0f) == 2);  // ties to even
  REQUIRE(code(PageType::kInt8, 1.75f, 0.5f, 0.0f) == 4);
  REQUIRE(code(PageType::kInt8, -kInfinity, 1.0f, 0.0f) == 0x80u);
  REQUIRE(code(PageType::kInt4, std::nanf(""), 1.0f, 8.0f) == 8);
  REQUIRE(code(PageType::kInt4, 100.0f, 1.0f, 8.0f) == 15);
  REQUIRE(encoded(PageType::kInt4, 1.0f, 0.5f, 8.0f).value == 1.0f);
}

EMULATOR_TEST(division_by_a_page_size) {
  for (int64_t by : {1, 2, 3, 5, 7, 16, 19, 64, 100, 255, 256, 4097, 1 << 20, (1 << 29) - 1}) {
    const Divider divider = Divider::by(by);
    testing::Random random(static_cast<uint32_t>(by));
    for (int n = 0; n < 2000; ++n) {
      const int x = static_cast<int>(random.bits() >> (1 + n % 28));
      REQUIRE(divider.quotient(x) == x / by);
    }
    for (int64_t x : {int64_t{0}, by - 1, by, 2 * by - 1, int64_t{0x7fffffff}}) {
      REQUIRE(divider.quotient(static_cast<int>(x)) == static_cast<int>(x) / by);
    }
  }
}

// ---- PageKeys alone: 16 keys from `first` on of one head, settled, as fp32 [16][32] ----

constexpr int kKeys = 16, kWide = 32, kSlots = 5, kHeads = 2, kPages = 3, kDim = 24;
using ptx::U32x4;

struct Landed {
  float k[kKeys][kWide], v[kKeys][kWide];
  float scale[2][kKeys], zero[2][kKeys];
  float logit[2][kKeys];  // of rows 0 and 8 of 1, what is missing hidden
};

template <class Keys>
__global__ void land(const __grid_constant__ PageSource source, const int32_t* table, int head,
                     int first, int rows, Landed* out) {
  using Team = WarpTeam<1>;
  const uint32_t stage = ptx::dynamic_shared_memory(), work = stage + Keys::kStageBytes;
  const Keys keys = {source, table, head, kDim, kDim};
  keys.template load<Team>(stage, first, rows);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  Team::sync();
  keys.template settle<Team>(stage, work, true);
  Team::sync();
  const int lane = Team::rank();
  const auto read = [&](const auto& tile, float (&to)[kKeys][kWide]) {
    using Tile = std::remove_cvref_t<decltype(tile)>;
    for (int n = lane; n < kKeys * Tile::kChunks; n += 32) {
      const int row = n / Tile::kChunks, c = n % Tile::kChunks;
      const auto chunk = ptx::load_shared<U32x4>(tile.chunk(row, c));
      for (int i = 0; i < Tile::kPerChunk; ++i) {
        to[row][c * Tile::kPerChunk + i] = unpack<BFloat16>(chunk.v[i / 2], i % 2);
      }
    }
  };
  read(Keys::k_tile(stage, work), out->k);
  read(Keys::v_tile(stage, work), out->v);
  if constexpr (Keys::kCodes) {
    for (int side = 0; side < 2; ++side) {
      if (lane >= kKeys) break;
      const auto two = ptx::load_shared<ptx::U32x2>(Keys::pairs(stage, side == 0) + 8 * lane);
      out->scale[side][lane] = ptx::float_from_bits(two.v[0]);
      out->zero[side][lane] = ptx::float_from_bits(two.v[1]);
    }
  }
  Accumulators<1, kKeys / 8> s;
  fill<1, kKeys / 8>(s, 1.0f);
  keys.template hide_missing<1, kKeys / 8>(s, stage);
  if (lane >= 4) return;  // row 0, and row 8 in the other half of a fragment
  for (int n = 0; n < kKeys / 8; ++n) {
    for (int i = 0; i < 4; ++i) out->logit[i / 2][fragment_column(n, i)] = s[0][n][i];
  }
}

// Key j is slot j % kSlots of entry j / kSlots: pages 2, none, 0, none, 1.
constexpr int32_t kTable[] = {2, 7, 0, -1, 1};

template <class Keys, class Stored, class Value>
void check_landing(PagePool pool, const std::vector<Stored>& k, const std::vector<Stored>& v,
                   int64_t row, bool chunks, const Value& value) {
  pool.pages = kPages, pool.page_size = kSlots;
  const auto placed = [&](const std::vector<Stored>& x) {
    return TensorRef{const_cast<Stored*>(x.data()), kSlots * kHeads * row, kHeads * row, row};
  };
  pool.k = placed(k), pool.v = placed(v);
  PageSource source = PageSource::of(pool, kHeads);
  REQUIRE(source.chunks == chunks);
  constexpr uint32_t kBytes = Keys::kStageBytes + Keys::kWorkBytes;
  for (uint64_t seed = 0; seed < 4; ++seed) {
    const int head = static_cast<int>(seed % kHeads), first = 3, rows = 14;
    emulate::set_options(testing::seeded(seed));
    Landed out;
    ATTNFORGE_LAUNCH((land<Keys>), dim3(1), dim3(32), kBytes, nullptr, source, kTable, head, first,
                     rows, &out);
    for (int j = 0; j < kKeys; ++j) {
      const int page = j < rows ? kTable[(first + j) / kSlots] : -1;
      const bool real = page >= 0 && page < kPages;
      for (int half = 0; half < 2; ++half) {
        REQUIRE(out.logit[half][j] == (real ? 1.0f : -kInfinity));
      }
      const int64_t code = real ? (page * kSlots + (first + j) % kSlots) * kHeads + head : 0;
      for (int c = 0; c < kWide; ++c) {
        const bool there = real && c < kDim;
        REQUIRE(out.k[j][c] == (there ? value(k, code * row, c) : value(k, -1, c)));
        REQUIRE(out.v[j][c] == (there ? value(v, code * row, c) : value(v, -1, c)));
      }
      for (int side = 0; side < 2 && Keys::kCodes; ++side) {
        const float* scales = side == 0 ? pool.k_scale : pool.v_scale;
        const float* zeros = side == 0 ? pool.k_zero : pool.v_zero;
        REQUIRE(out.scale[side][j] == (real ? scales[code] : 0.0f));
        REQUIRE(out.zero[side][j] == (real ? zeros[code] : 0.0f));
      }
    }
  }
}

EMULATOR_TEST(keys_of_pages_land) {
  using Keys = PageKeys<BFloat16, false, false, kKeys, kWide, kWide>;
  for (const bool chunks : {true, false}) {  // rows of 24 start at 16 bytes, rows of 25 do not
    const int64_t row = chunks ? kDim : kDim + 1;
    testing::Random random(5);
    std::vector<BFloat16> k(kPages * kSlots * kHeads * row), v(k);
    for (auto* x : {&k, &v}) {
      for (BFloat16& e : *x) e = narrow<BFloat16>(random.unit());
    }
    PagePool pool;
    pool.type = PageType::kBFloat16;
    check_landing<Keys>(pool, k, v, row, chunks,
                        [](const std::vector<BFloat16>& x, int64_t at, int c) {
                          return at < 0 ? 0.0f : widen(x[at + c]);
                        });
  }
}

EMULATOR_TEST(codes_of_pages_land) {
  using Keys = PageKeys<BFloat16, true, false, kKeys, kWide, kWide>;
  for (const bool chunks : {true, false}) {
    const int64_t row = chunks ? 32 : kDim + 1;
    testing::Random random(6);
    std::vector<int8_t> k(kPages * kSlots * kHeads * row), v(k);
    std::vector<float> scales(kPages * kSlots * kHeads), zeros(scales);
    for (auto* x : {&k, &v}) {
      for (int8_t& e : *x) e = static_cast<int8_t>(random.bits());
    }
    for (float& x : scales) x = random.unit() + 2.0f;
    for (float& x : zeros) x = random.unit();
    PagePool pool;
    pool.type = PageType::kInt8;
    pool.k_scale = scales.data(), pool.v_scale = scales.data();
    pool.k_zero = zeros.data(), pool.v_zero = zeros.data();
    pool.code_page = kSlots * kHeads, pool.code_slot = kHeads;
    check_landing<Keys>(pool, k, v, row, chunks,
                        [](const std::vector<int8_t>& x, int64_t at, int c) {
                          return at < 0 ? 0.0f : static_cast<float>(x[at + c]);
                        });
  }
}

}  // namespace
}  // namespace attnforge::emulate
