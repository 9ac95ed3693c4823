// SimHash codes: signs of a product with random planes, never stored as numbers.
//
// kTileRows rows of x, centred and widened, against panels of planes packed once per call; the
// signs of a panel go as bits into a string per row, out of which the codes are cut. Both the keys
// and the queries of an index come through here, so that they are rounded alike.
//
//   flops   2 D bits tables per row       bytes   2 tables per row of output
#include "cpu/flash/problem.h"
#include "cpu/kernels.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kTileRows = 48;  // a multiple of every kMR
constexpr int64_t kPanels = 8;     // of one product: 48 x 256 floats of signs stay in cache
constexpr int64_t kLdc = kPanels * kNR;
constexpr int64_t kLdx = 256 + 16;  // dims go up to 256; off the power of two

struct Scratch {
  float* x;        // [kTileRows][kLdx]
  float* product;  // [kTileRows][kLdc]
  uint8_t* bits;   // [kTileRows][bit_bytes]
};

struct Layout {
  int64_t dim, columns, panels, bit_bytes;
};

AF_INLINE Layout layout_of(const LshEncodeParams& params) {
  const int64_t columns = params.bits * params.tables;
  // Codes are read as 32 bits from any byte: room for the last one.
  return {params.dim, columns, ceil_div(columns, kNR), round_up(columns, kNR) / 8 + 8};
}

AF_INLINE Scratch take_scratch(Arena& a, const Layout& y) {
  Scratch w;
  w.x = a.take<float>(kTileRows * kLdx);
  w.product = a.take<float>(kTileRows * kLdc);
  w.bits = a.take<uint8_t>(kTileRows * y.bit_bytes);
  return w;
}

AF_INLINE int64_t scratch_bytes(const Layout& y) {
  Arena a{nullptr};
  take_scratch(a, y);
  return a.used;
}

// planes [dim][columns] as panels [dim][kNR], zeros behind the last column.
AF_INLINE void pack_planes(const LshEncodeParams& params, const Layout& y, float* packed) {
  for (int64_t panel = 0; panel < y.panels; ++panel) {
    float* dst = packed + panel * y.dim * kNR;
    const int64_t n = min64(kNR, y.columns - panel * kNR);
    for (int64_t d = 0; d < y.dim; ++d) {
      for (int64_t c = 0; c < kNR; ++c) {
        dst[d * kNR + c] = c < n ? params.planes[d * y.columns + panel * kNR + c] : 0.0f;
      }
    }
  }
}

AF_INLINE void put_bits(uint8_t* bits, int64_t at, uint32_t value) {
  if constexpr (kLanes == 16) {
    const uint16_t x = static_cast<uint16_t>(value);
    __builtin_memcpy(bits + at / 8, &x, 2);
  } else if constexpr (kLanes == 8) {
    bits[at / 8] = static_cast<uint8_t>(value);
  } else {
    uint8_t& byte = bits[at / 8];
    byte = static_cast<uint8_t>(at % 8 ? byte | value << 4 : value);
  }
}

template <class T>
AF_INLINE void encode_tile(const LshEncodeParams& params, const Layout& y, const float* packed,
                           int64_t batch, int64_t head, int64_t row0, int64_t rows,
                           const Scratch& w) {
  const float* mean = params.mean;
  if (mean) mean += (batch * params.heads + head) * y.dim;
  for (int64_t r = 0; r < round_up(rows, kMR); ++r) {
    const T* src = row_ptr<const T>(params.x, batch, row0 + min64(r, rows - 1), head);
    for (int64_t d = 0; d < y.dim; d += kLanes) {
      const int64_t n = min64(kLanes, y.dim - d);
      VecF v = load_partial(src + d, n);
      if (mean) v -= load_partial(mean + d, n);
      store(w.x + r * kLdx + d, v);
    }
  }
  for (int64_t panel = 0; panel < y.panels; panel += kPanels) {
    const int64_t n = min64(kPanels, y.panels - panel);
    gemm<kLdx, 1>(rows, 2 * n, y.dim, w.x, kLdx, packed + panel * y.dim * kNR, y.dim * kNR,
                  w.product, kLdc, false);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < n * kNR; c += kLanes) {
        const VecF sign = load(w.product + r * kLdc + c);
        put_bits(w.bits + r * y.bit_bytes, panel * kNR + c, lane_bits(sign > splat(0.0f)));
      }
    }
  }
  const uint32_t mask = (1u << params.bits) - 1;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = (batch * params.heads + head) * params.seqlen + row0 + r;
    uint16_t* codes = params.codes + row * params.tables;
    for (int64_t t = 0; t < params.tables; ++t) {
      uint32_t word;
      __builtin_memcpy(&word, w.bits + r * y.bit_bytes + t * params.bits / 8, 4);
      codes[t] = static_cast<uint16_t>(word >> t * params.bits % 8 & mask);
    }
  }
}

}  // namespace

int64_t lsh_encode_workspace(const LshEncodeParams& params, int64_t num_threads) {
  const Layout y = layout_of(params);
  Arena a{nullptr};
  a.take<float>(y.panels * y.dim * kNR);
  return a.used + scratch_bytes(y) * num_threads;
}

void lsh_encode(const LshEncodeParams& params, const Workers& workers) {
  const Layout y = layout_of(params);
  Arena a{static_cast<char*>(params.workspace)};
  float* packed = a.take<float>(y.panels * y.dim * kNR);
  pack_planes(params, y, packed);
  char* scratch = a.base + a.used;
  const int64_t tiles = ceil_div(params.seqlen, kTileRows);
  dispatch_dtype(params.dtype, [&](auto element) {
    parallel_tasks(workers, params.batch * params.heads * tiles, [&](int64_t task, int64_t worker) {
      Arena own{scratch + worker * scratch_bytes(y)};
      const int64_t row0 = task % tiles * kTileRows, unit = task / tiles;
      encode_tile<decltype(element)>(params, y, packed, unit / params.heads, unit % params.heads,
                                     row0, min64(kTileRows, params.seqlen - row0),
                                     take_scratch(own, y));
    });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
