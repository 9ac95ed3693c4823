// Codes of vectors: bit j of the code of table l is <x - mean, planes[:, l bits + j]> > 0. The
// projections are never stored as numbers.
//
//   block      64 rows of all heads of a sequence, which share the planes, times the columns of as
//              many tables as 128 columns hold. Both operands pass through shared memory in fp32,
//              32 channels at a time, whatever the dtype of x is, so that keys and queries are
//              rounded alike; planes are transposed on the way
//   products   mma.sync in three parts of tf32 (tile/element.h): 22 bits, where bf16 would flip a
//   bit
//              in a thousand
//   pack       a quad of lanes joins the signs of a row to words; codes are cut from the words
//   flops      2 D bits tables per row, three times. bytes: x and planes once per block, from L2
#include "cuda/flash/launch.h"
#include "cuda/launch.h"
#include "cuda/retrieval/launch.h"
#include "cuda/tile/product.h"
#include "cuda/tile/rows.h"

namespace attnforge::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps;
constexpr int kColumns = 128, kWords = kColumns / 32, kN = kColumns / 8;
constexpr int kChannels = 32, kStages = 2;
using RowsTile = SharedTile<float, kRows, kChannels>;
using PlanesTile = SharedTile<float, kColumns, kChannels>;
constexpr int kStageBytes = RowsTile::kBytes + PlanesTile::kBytes;
// Signs of a row: its words and one more, which the last code may look into.
constexpr int kSignBytes = 4 * (kWords + 1);
constexpr int kSharedBytes = kStages * kStageBytes + kRows * kSignBytes;

struct EncodeGrid {
  int table_tiles, row_tiles, tables;  // tables: of a tile
};

// Rows are numbered as codes lie: head by head.
struct Rows {
  const LshEncodeParams& p;
  int batch;
  int64_t first, count;

  AF_DEVICE bool exists(int r) const { return first + r < count; }
  template <class T>
  AF_DEVICE float widened(int r, int channel) const {
    const int64_t n = first + r;
    const int head = static_cast<int>(n / p.seqlen);
    const float x = widen(row_ptr<const T>(p.x, batch, n % p.seqlen, head)[channel]);
    return p.mean == nullptr ? x : x - p.mean[(batch * p.heads + head) * p.dim + channel];
  }
  template <class T>
  AF_DEVICE void load(const RowsTile& tile, int first_channel) const {
    const int c = static_cast<int>(ptx::lane_id()), channel = first_channel + c;
    for (int r = warp_id(); r < kRows; r += kWarps) {
      const bool real = exists(r) && channel < p.dim;
      ptx::store_shared(tile.element(r, c), real ? widened<T>(r, channel) : 0.0f);
    }
  }
};

__global__ void __launch_bounds__(kThreads)
    lsh_encode_kernel(const __grid_constant__ LshEncodeParams p,
                      const __grid_constant__ EncodeGrid grid) {
  int id = static_cast<int>(blockIdx.x);
  const int first_table = id % grid.table_tiles * grid.tables;
  id /= grid.table_tiles;
  const Rows rows = {p, id / grid.row_tiles, int64_t{id % grid.row_tiles} * kRows,
                     p.heads * p.seqlen};
  const int bits = static_cast<int>(p.bits), lane = static_cast<int>(ptx::lane_id());
  const int tables = at_most(grid.tables, static_cast<int>(p.tables) - first_table);
  const int64_t all = p.bits * p.tables, first_column = first_table * p.bits;
  const uint32_t shared = ptx::dynamic_shared_memory();
  const auto rows_at = [&](int j) {
    return RowsTile{shared + static_cast<uint32_t>(j % kStages * kStageBytes)};
  };
  const auto planes_at = [&](int j) {
    return PlanesTile{rows_at(j).base + static_cast<uint32_t>(RowsTile::kBytes)};
  };
  const auto load = [&](int j) {
    // A warp takes 8 columns of 4 channels at a time: sectors of memory, and all banks.
    const PlanesTile planes = planes_at(j);
    for (int n = warp_id(); n < kColumns / 8 * (kChannels / 4); n += kWarps) {
      const int column = n % (kColumns / 8) * 8 + lane % 8;
      const int c = n / (kColumns / 8) * 4 + lane / 8, channel = j * kChannels + c;
      const bool real = channel < p.dim && column < tables * bits;
      ptx::cp_async_4(planes.element(column, c),
                      p.planes + (real ? channel * all + first_column + column : 0), real ? 4 : 0);
    }
    if (p.dtype == DType::kFloat32) rows.load<float>(rows_at(j), j * kChannels);
    if (p.dtype == DType::kFloat16) rows.load<Half>(rows_at(j), j * kChannels);
    if (p.dtype == DType::kBFloat16) rows.load<BFloat16>(rows_at(j), j * kChannels);
  };
  Accumulators<1, kN> s;
  zero<1, kN>(s);
  const int count = static_cast<int>((p.dim + kChannels - 1) / kChannels);
  load(0);
  ptx::cp_async_commit();
#pragma unroll 1
  for (int j = 0; j < count; ++j) {
    ptx::cp_async_wait<0>();
    ptx::sync_threads();  // the stage is here, and nobody works on the other one
    if (j + 1 < count) load(j + 1);
    ptx::cp_async_commit();
    product_nt<1, kN>(s, rows_at(j), 16 * warp_id(), planes_at(j), 0);
  }

  // Bit 8 n + 2 t + i of the signs is element i of fragment n in lane t of a quad.
  const uint32_t signs = shared + kStages * kStageBytes;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t row = signs + kSignBytes * fragment_row(16 * warp_id(), 0, h);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t word = 0;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float (&x)[4] = s[0][4 * w + n];
        const uint32_t pair = uint32_t{x[2 * h] > 0.0f} | uint32_t{x[2 * h + 1] > 0.0f} << 1;
        word |= pair << (8 * n + 2 * (lane % 4));
      }
      word |= ptx::shuffle_xor(word, 1);
      word |= ptx::shuffle_xor(word, 2);
      if (lane % 4 == w) ptx::store_shared(row + 4 * w, word);
    }
    if (lane % 4 == 0) ptx::store_shared(row + 4 * kWords, uint32_t{0});
  }
  ptx::sync_threads();
  const uint32_t mask = (1u << bits) - 1;
  for (int n = static_cast<int>(threadIdx.x); n < kRows * tables; n += kThreads) {
    const int r = n / tables, table = n % tables, bit = table * bits;
    if (!rows.exists(r)) continue;
    const uint32_t at = signs + static_cast<uint32_t>(kSignBytes * r + bit / 32 * 4);
    const uint64_t words =
        uint64_t{ptx::load_shared<uint32_t>(at + 4)} << 32 | ptx::load_shared<uint32_t>(at);
    const int64_t row = rows.batch * rows.count + rows.first + r;
    p.codes[row * p.tables + first_table + table] =
        static_cast<uint16_t>(static_cast<uint32_t>(words >> bit % 32) & mask);
  }
}

}  // namespace

int lsh_encode(const LshEncodeParams& params, void* stream) {
  EncodeGrid grid;
  grid.tables = static_cast<int>(kColumns / params.bits);
  grid.table_tiles = static_cast<int>((params.tables + grid.tables - 1) / grid.tables);
  grid.row_tiles = static_cast<int>((params.heads * params.seqlen + kRows - 1) / kRows);
  const auto blocks =
      static_cast<unsigned>(int64_t{grid.table_tiles} * grid.row_tiles * params.batch);
  if (blocks == 0) return 0;
  return ATTNFORGE_LAUNCH((lsh_encode_kernel), dim3(blocks), dim3(kThreads), kSharedBytes, stream,
                          params, grid);
}

}  // namespace attnforge::cuda
