// What the two products of a tile of rows are made of, S = Q K^T and O += P V: fp32 panels and FMAs
// (micro/gemm.h), or bf16 on matrix tiles (micro/tile_gemm.h) on the levels that have them.
//
// A level with tiles serves what they can: Q, K and V in bf16, not turned at load, for a rotated
// row is not bf16 any more. The build gives it the level below (ATTNFORGE_BELOW) for the rest.
//
// With tiles Q is multiplied as it stands, for a scaled row is not bf16 either: the scale meets the
// scores. S is fp32, P is rounded to bf16 in the place of S, and sums are of P before rounding.
#pragma once

#include "cpu/flash/mods.h"
#include "cpu/micro/pack.h"
#include "cpu/simd/float8.h"
#ifdef ATTNFORGE_BELOW
#include "cpu/micro/tile_pack.h"
#include "cpu/micro/tile_softmax.h"
#endif

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int64_t kBlockN = 256;            // keys of a block; also the most: S has room for it
constexpr int64_t kMaxSpan = kBlockN + 96;  // a window of kBlockN keys, as a whole tile sees it
constexpr int64_t kLds = kMaxSpan + 16;     // off the power of two: rows do not share L1 sets

#ifdef ATTNFORGE_BELOW

struct Operands {
  using Element = BFloat16;
  using Scope = TileScope;  // stands around scores and add_values
  static constexpr bool kTiles = true;
  static constexpr int64_t kBlockM = 128;         // +14% over 64 where K and V exceed L2
  static constexpr int64_t kWaveBytes = 1 << 20;  // half of a 2 MiB L2
  static constexpr int64_t kRowStep = kTileRows;  // rows that are computed at once or not at all
  static constexpr int64_t kRowsAtOnce = 64;      // their Q, and P or a panel, stay in L1
  static constexpr int64_t kRowGroup = 2 * kTileRows;  // rows that share a product

  AF_INLINE_MEMBER static int64_t depth(int64_t channels) { return tile_depth(channels); }
  AF_INLINE_MEMBER static BFloat16* weights(float* s) { return reinterpret_cast<BFloat16*>(s); }

  template <class Row>
  AF_INLINE_MEMBER static void pack_keys(const Row& row, int64_t keys, int64_t dim,
                                         BFloat16* panel) {
    pack_key_tiles(row, keys, dim, panel);
  }
  template <class Row, class Value>
  AF_INLINE_MEMBER static bool pack_values(const Row& row, const Value&, int64_t rows, int64_t dim,
                                           BFloat16* panels, int64_t panel_stride) {
    return pack_value_tiles(row, rows, dim, panels, panel_stride);
  }

  AF_INLINE_MEMBER static void scores(int64_t rows, int64_t vectors, int64_t depth,
                                      const BFloat16* q, const BFloat16* k, float* s) {
    tile_gemm(rows, vectors, depth, q, depth, k, depth * kNR, s, kLds, false);
  }
  // s: the rows of P from their first column on, of which [c, c + n) are multiplied.
  AF_INLINE_MEMBER static void add_values(int64_t rows, int64_t vectors, float* s, int64_t c,
                                          int64_t n, const BFloat16* v, int64_t panel_stride,
                                          float* o, int64_t ldo) {
    tile_gemm(rows, vectors, n, weights(s) + c, 2 * kLds, v, panel_stride, o, ldo, true);
  }

  // The same for rows of Q that are picked one by one, row_stride elements apart. `soon` is what
  // the next product reads, which FMAs ask for.
  template <class T>
  AF_INLINE_MEMBER static void load_query(const T* src, int64_t dim, float, BFloat16* row) {
    for (int64_t d = 0; d < dim; d += kTileDepth) store_raw(row + d, load_pairs(src + d, dim - d));
  }
  AF_INLINE_MEMBER static int64_t row_stride(int64_t depth) { return depth; }
  AF_INLINE_MEMBER static void row_scores(int64_t rows, int64_t vectors, int64_t depth,
                                          const BFloat16* q, const BFloat16* k, float* s,
                                          LinesSoon&) {
    scores(rows, vectors, depth, q, k, s);
  }
  // One column panel of P V, which is added to o or takes its place.
  AF_INLINE_MEMBER static void row_values(int64_t rows, int64_t vectors, float* s, int64_t c,
                                          int64_t n, const BFloat16* v, float* o, int64_t ldo,
                                          bool accumulate, LinesSoon&) {
    tile_gemm(rows, vectors, n, weights(s) + c, 2 * kLds, v, 0, o, ldo, accumulate);
  }

  // One row over the keys that it sees, as add_values would where the others are finite.
  template <class Seen>
  AF_INLINE_MEMBER static void add_seen_values(const Seen& seen, float* s, int64_t c, int64_t n,
                                               const BFloat16* v, int64_t panel_stride,
                                               int64_t vectors, float* o) {
    const BFloat16* p = weights(s) + c;
    for (int64_t k0 = 0; k0 < n; k0 += kTileDepth) {
      bool keep[kTileDepth];
      for (int64_t k = 0; k < kTileDepth; ++k) keep[k] = k0 + k < n && seen(c + k0 + k);
      for (int64_t x = 0; x < vectors; ++x) {
        const BFloat16* tile = v + x / 2 * panel_stride + k0 * kNR + x % 2 * kTileSize;
        VecF even{}, odd{};
        for (int64_t k = 0; k < kTileDepth; k += 2) {
          const VecU pair = load_raw<VecU>(tile + k * kTileRows);
          const VecF v0 = bits_to_float(pair << 16), v1 = bits_to_float(pair & 0xffff0000u);
          if (keep[k]) even = fma(splat(to_float(p[k0 + k])), v0, even);
          if (keep[k + 1]) odd = fma(splat(to_float(p[k0 + k + 1])), v1, odd);
        }
        store(o + x * kLanes, load(o + x * kLanes) + (even + odd));
      }
    }
  }

  // Columns [c, c + n) of scores to weights: softmax where that is all, else it was done in fp32.
  AF_INLINE_MEMBER static float softmax(float* s, int64_t c, int64_t n, float scale, float& m,
                                        float& l) {
    return softmax_row_rounded(s + c, n, scale, weights(s) + c, m, l);
  }
  AF_INLINE_MEMBER static void round_weights(float* s, int64_t c, int64_t n) {
    for (int64_t end = c + n; c < end; c += kNR) {
      store_rounded(weights(s) + c, load(s + c), load(s + c + kLanes));
    }
  }
};

AF_INLINE bool served_by_tiles(const FlashProblem& p) {
  return p.dtype == DType::kBFloat16 && p.q_dtype == DType::kBFloat16 && !p.mods.rope_cos;
}
AF_INLINE bool served_by_tiles(const FlashFwdParams& params) {
  return served_by_tiles(params.problem);
}
// Calls f with a value of the element type of K and V; plain: never fp8.
template <class F>
AF_INLINE void dispatch_operands(DType, const F& f) {
  f(BFloat16{});
}
template <class F>
AF_INLINE void dispatch_plain_operands(DType, const F& f) {
  f(BFloat16{});
}
#else

struct Operands {
  using Element = float;
  struct Scope {
    AF_INLINE_MEMBER ~Scope() {}
  };
  static constexpr bool kTiles = false;
  static constexpr int64_t kBlockM = 48;
  static constexpr int64_t kWaveBytes = 8 << 20;  // a quarter of a 32 MiB L3
  static constexpr int64_t kRowStep = 12;         // a multiple of every kMR
  static constexpr int64_t kRowGroup = kMR;
  static constexpr int64_t kRowsAtOnce = 1 << 20;  // all rows of a tile

  AF_INLINE_MEMBER static int64_t depth(int64_t channels) { return channels; }

  template <class Row>
  AF_INLINE_MEMBER static void pack_keys(const Row& row, int64_t keys, int64_t dim, float* panel) {
    pack_key_rows(row, keys, dim, panel);
  }
  template <class Row, class Value>
  AF_INLINE_MEMBER static bool pack_values(const Row& row, const Value& value, int64_t rows,
                                           int64_t dim, float* panels, int64_t panel_stride) {
    return pack_value_rows(row, value, rows, dim, panels, panel_stride);
  }

  AF_INLINE_MEMBER static void scores(int64_t rows, int64_t vectors, int64_t depth, const float* q,
                                      const float* k, float* s) {
    gemm<1, kMR>(rows, vectors, depth, q, depth, k, depth * kNR, s, kLds, false);
  }
  AF_INLINE_MEMBER static void add_values(int64_t rows, int64_t vectors, float* s, int64_t c,
                                          int64_t n, const float* v, int64_t panel_stride, float* o,
                                          int64_t ldo) {
    gemm<kLds, 1>(rows, vectors, n, s + c, kLds, v, panel_stride, o, ldo, true);
  }

  template <class T>
  AF_INLINE_MEMBER static void load_query(const T* src, int64_t dim, float scale, float* row) {
    for (int64_t d = 0; d < dim; d += kLanes)
      store_partial(row + d, load_partial(src + d, dim - d) * splat(scale), dim - d);
  }
  AF_INLINE_MEMBER static int64_t row_stride(int64_t) { return kLds; }
  AF_INLINE_MEMBER static void row_scores(int64_t rows, int64_t vectors, int64_t depth,
                                          const float* q, const float* k, float* s,
                                          LinesSoon& soon) {
    gemm<kLds, 1>(rows, vectors, depth, q, kLds, k, depth * kNR, s, kLds, false, soon);
  }
  AF_INLINE_MEMBER static void row_values(int64_t rows, int64_t vectors, const float* s, int64_t c,
                                          int64_t n, const float* v, float* o, int64_t ldo,
                                          bool accumulate, LinesSoon& soon) {
    gemm<kLds, 1>(rows, vectors, n, s + c, kLds, v, 0, o, ldo, accumulate, soon);
  }

  template <class Seen>
  AF_INLINE_MEMBER static void add_seen_values(const Seen& seen, const float* s, int64_t c,
                                               int64_t n, const float* v, int64_t panel_stride,
                                               int64_t vectors, float* o) {
    for (int64_t k = 0; k < n; ++k) {
      if (!seen(c + k)) continue;
      const VecF weight = splat(s[c + k]);
      for (int64_t d = 0; d < vectors * kLanes; d += kLanes) {
        const float* value = v + d / kNR * panel_stride + k * kNR + d % kNR;
        store(o + d, fma(weight, load(value), load(o + d)));
      }
    }
  }

  AF_INLINE_MEMBER static float softmax(float* s, int64_t c, int64_t n, float, float& m, float& l) {
    return softmax_row(s + c, n, m, l);
  }
  AF_INLINE_MEMBER static void round_weights(float*, int64_t, int64_t) {}
};

template <class F>
AF_INLINE void dispatch_operands(DType dtype, const F& f) {
  dispatch_input(dtype, f);
}
template <class F>
AF_INLINE void dispatch_plain_operands(DType dtype, const F& f) {
  dispatch_dtype(dtype, f);
}
#endif

}  // namespace attnforge::cpu::ATTNFORGE_ISA
