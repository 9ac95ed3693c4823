// Listed keys on matrix tiles: bf16 rows of K and V as they lie in memory, kTileRows at a time
// where they lie a fixed way apart, as those of a page do; others are copied side by side first.
//
//   S^T = K Q^T   K is A, the rows of a unit are the 16 columns of B. S is S^T turned by 16 x 16
//   O += P V      V is B, though B takes pairs of rows: a row of V is read as 16 pairs of channels,
//                 one key deep. A has (p, 0) in its upper half and (0, p) in the lower, so the
//                 upper half of C sums even channels and the lower odd ones: half of the products
//                 are by 0, on rows that a few queries would leave idle
//   prefetch      the next chunk's rows between products, by rounds (flash/keys.h)
//
// P is rounded to bf16, sums are of P before rounding. As 0 * NaN is NaN, a channel that is not
// finite spoils its neighbour: such results are computed anew by FMAs.
#pragma once

#include "cpu/micro/tile_pack.h"
#include "cpu/micro/tile_softmax.h"
#include "cpu/retrieval/indexed_layout.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kTileKeys = 64;
constexpr int64_t kTileGroups = kTileKeys / kTileRows;
constexpr int64_t kTileLds = kTileKeys + 16;  // off the power of two
constexpr int64_t kHalfRows = kTileRows / 2;  // rows of one A of P
constexpr int64_t kSquare = kTileRows * kTileRows;

struct ListTiles {
  BFloat16* q;     // B: [depth / 32][two tiles], the second one unused
  BFloat16* rows;  // copies: K [kTileKeys][depth], behind them V [kTileKeys][width]
  float* turned;   // S^T [kTileKeys][16]
  float* s;        // S, then P in its place: [16][kTileLds]
  uint32_t* p;     // A: [half][group][16][16 pairs]
  float* o;        // C: [half][width / 32][16][16]
  int64_t depth, width;

  AF_INLINE_MEMBER int64_t tiles() const { return width / kTileDepth; }  // of C
};

AF_INLINE ListTiles take_list_tiles(Arena& a, int64_t dim, int64_t v_dim) {
  ListTiles w;
  w.depth = tile_depth(dim), w.width = tile_depth(v_dim);
  w.q = a.take<BFloat16>(w.depth * kNR);
  w.rows = a.take<BFloat16>(kTileKeys * (w.depth + w.width));
  w.turned = a.take<float>(kTileKeys * kTileRows);
  w.s = a.take<float>(kTileRows * kTileLds);
  w.p = a.take<uint32_t>(2 * kTileGroups * kSquare);
  w.o = a.take<float>(2 * w.tiles() * kSquare);
  return w;
}

// Rows of a tile in memory.
struct TileSource {
  const BFloat16* rows;
  int64_t bytes;  // from one to the next
};

// n rows of `dim` elements at `at`, as whole tiles.
AF_INLINE TileSource tile_source(const BFloat16* first, const int64_t* at, int64_t n, int64_t dim,
                                 BFloat16* copy) {
  const int64_t step = n > 1 ? at[1] - at[0] : 0, depth = tile_depth(dim);
  bool even = n == kTileRows && dim == depth;
  for (int64_t j = 2; j < n; ++j) even &= at[j] - at[j - 1] == step;
  if (even) return {first + at[0], step * static_cast<int64_t>(sizeof(BFloat16))};
  for (int64_t j = 0; j < kTileRows; ++j) {
    for (int64_t d = 0; d < depth; d += kTileDepth)
      store_raw(copy + j * depth + d, j < n ? load_pairs(first + at[j] + d, dim - d) : VecU{});
  }
  return {copy, depth * static_cast<int64_t>(sizeof(BFloat16))};
}

// S^T of one or two groups of keys; soon() after each step.
template <bool kTwo, class Soon>
AF_INLINE void score_groups(const ListTiles& w, const TileSource* k, float* turned,
                            const Soon& soon) {
  Tiles t;
  t.zero<0>();
  if constexpr (kTwo) t.zero<1>();
  for (int64_t d = 0; d < w.depth; d += kTileDepth) {
    t.load<6>(w.q + d / kTileDepth * 2 * kTileSize, 64);
    t.load<4>(k[0].rows + d, k[0].bytes);
    t.dot<0, 4, 6>();
    soon();
    if constexpr (kTwo) {
      t.load<5>(k[1].rows + d, k[1].bytes);
      t.dot<1, 5, 6>();
      soon();
    }
  }
  t.store<0>(turned, 64);
  if constexpr (kTwo) t.store<1>(turned + kSquare, 64);
}

// S of `rows` rows from S^T of whole groups of keys; what is past n is not seen.
AF_INLINE void turn_scores(const ListTiles& w, int64_t rows, int64_t n, int64_t keys) {
  for (int64_t c = 0; c < keys; c += kLanes) {
    VecU x[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) x[i] = load_raw<VecU>(w.turned + (c + i) * kTileRows);
    transpose_pairs(x);
    for (int64_t r = 0; r < rows; ++r) store_raw(w.s + r * kTileLds + c, x[r]);
  }
  for (int64_t r = 0; r < rows && n < keys; ++r) mask_row(w.s + r * kTileLds, keys, 0, n, -kInf);
}

// S to P, as A of its products; O is brought under the new maximum. `keys`: whole panels.
AF_INLINE void weigh_listed(const ListTiles& w, int64_t rows, int64_t keys, float scale, float* m,
                            float* l) {
  for (int64_t r = 0; r < rows; ++r) {
    float* s = w.s + r * kTileLds;
    BFloat16* weights = reinterpret_cast<BFloat16*>(s);
    const float alpha = softmax_row_rounded(s, keys, scale, weights, m[r], l[r]);
    const int64_t half = r / kHalfRows, row = r % kHalfRows * kTileRows;
    for (int64_t c = 0; c < keys; c += kTileRows) {
      uint32_t* p = w.p + (half * kTileGroups + c / kTileRows) * kSquare + row;
      const VecU odd = float_to_bits(load(weights + c));
      store_raw(p, odd >> 16);
      store_raw(p + kSquare / 2, odd);
    }
    if (alpha == 1.0f) continue;
    float* o = w.o + half * w.tiles() * kSquare + row;
    for (int64_t tile = 0; tile < w.tiles(); ++tile, o += kSquare) {
      store(o, load(o) * splat(alpha));
      store(o + kSquare / 2, load(o + kSquare / 2) * splat(alpha));
    }
  }
}

// O += P V of a half on N tiles of C; soon() after each product.
template <int N, class Soon>
AF_INLINE void add_values(const uint32_t* p, const TileSource* v, int64_t groups, int64_t column,
                          float* o, const Soon& soon) {
  Tiles t;
  t.load<0>(o, 64);
  if constexpr (N > 1) t.load<1>(o + kSquare, 64);
  if constexpr (N > 2) t.load<2>(o + 2 * kSquare, 64);
  if constexpr (N > 3) t.load<3>(o + 3 * kSquare, 64);
  for (int64_t g = 0; g < groups; ++g) {
    const BFloat16* rows = v[g].rows + column;
    t.load<4>(p + g * kSquare, 64);
    t.load<5>(rows, v[g].bytes);
    t.dot<0, 4, 5>();
    soon();
    if constexpr (N > 1) t.load<6>(rows + kTileDepth, v[g].bytes), t.dot<1, 4, 6>(), soon();
    if constexpr (N > 2) t.load<7>(rows + 2 * kTileDepth, v[g].bytes), t.dot<2, 4, 7>(), soon();
    if constexpr (N > 3) t.load<5>(rows + 3 * kTileDepth, v[g].bytes), t.dot<3, 4, 5>(), soon();
  }
  t.store<0>(o, 64);
  if constexpr (N > 1) t.store<1>(o + kSquare, 64);
  if constexpr (N > 2) t.store<2>(o + 2 * kSquare, 64);
  if constexpr (N > 3) t.store<3>(o + 3 * kSquare, 64);
}

// Biases of n entries on S^T, which is scaled here.
AF_INLINE void bias_turned(const Layout& y, int64_t q_len, int64_t row0, int64_t rows,
                           const float* bias, int64_t n, float scale, float* turned) {
  for (int64_t c = 0; c < n; ++c) {
    float* s = turned + c * kTileRows;
    if (!y.united) {
      store(s, load(s) * splat(scale) + splat(bias[c]));
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float own = bias[c * y.group + (row0 + r) / q_len];
      s[r] = own == -kInf ? -kInf : s[r] * scale + own;
    }
  }
}

// run_entries() on matrix tiles.
AF_INLINE void run_entries_on_tiles(const IndexedFwdParams& params, const Layout& y,
                                    const Gathered& g, int64_t unit, int64_t row0, int64_t rows,
                                    int64_t lo, int64_t hi, const Partial& part,
                                    const ListTiles& w) {
  const TileScope scope;
  const FlashProblem& p = params.flash.problem;
  const int64_t batch = unit / p.heads_k, head = unit % p.heads_k;
  const Sequence seq = sequence(p, batch);
  const Rows<BFloat16> kv{params};
  const float scale = score_map(p).q_scale;
  const bool biased = y.united || params.lists.log_bias;
  const PageKeys<BFloat16> keys = kv.keys(batch, head);
  auto q_row = [&](int64_t r) {
    return row_ptr<const BFloat16>(params.flash.q, batch, seq.q_row + (row0 + r) % p.seqlen_q,
                                   head * y.group + (row0 + r) / p.seqlen_q);
  };
  pack_key_tiles(q_row, rows, p.head_dim, w.q);
  __builtin_memset(w.p, 0, 2 * kTileGroups * kSquare * sizeof(uint32_t));
  __builtin_memset(w.o, 0, 2 * w.tiles() * kSquare * sizeof(float));
  for (int64_t r = row0; r < row0 + rows; ++r) part.m[r] = -kInf, part.l[r] = part.z[r] = 0.0f;
  int64_t k_at[2][kTileKeys], v_at[2][kTileKeys], here = 0;
  kv.locate(batch, g.keys + lo, min64(kTileKeys, hi - lo), k_at[0], v_at[0]);
  for (int64_t e = lo; e < hi; e += kTileKeys, here ^= 1) {
    const int64_t n = min64(kTileKeys, hi - e), next = min64(kTileKeys, hi - e - n);
    const int64_t groups = ceil_div(n, kTileRows), panels = round_up(n, kNR);
    kv.locate(batch, g.keys + e + n, next, k_at[here ^ 1], v_at[here ^ 1]);
    Ahead<BFloat16> ahead = {{keys.k, k_at[here ^ 1], kv.k_stride(), 0, p.head_dim, 1},
                             {keys.v, v_at[here ^ 1], kv.v_stride(), 0, p.v_head_dim, 1}};
    ahead.begin(next);
    if (next > 0) ahead.allow(0, 1);
    const int64_t k_share = share_of(&ahead.k, groups * (w.depth / kTileDepth)),
                  v_share = share_of(&ahead.v, groups * w.tiles());
    auto k_soon = [&] { ask_for(ahead.k, k_share); };
    auto v_soon = [&] { ask_for(ahead.v, v_share); };
    TileSource k[kTileGroups], v[kTileGroups];
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t j = i * kTileRows, own = min64(kTileRows, n - j);
      k[i] = tile_source(keys.k, k_at[here] + j, own, p.head_dim, w.rows + j * w.depth);
      v[i] = tile_source(keys.v, v_at[here] + j, own, p.v_head_dim,
                         w.rows + kTileKeys * w.depth + j * w.width);
    }
    for (int64_t i = 0; i < groups; i += 2) {
      float* turned = w.turned + i * kSquare;
      if (i + 1 < groups) {
        score_groups<true>(w, k + i, turned, k_soon);
      } else {
        score_groups<false>(w, k + i, turned, k_soon);
      }
    }
    if (biased)
      bias_turned(y, p.seqlen_q, row0, rows, g.bias + e * (y.united ? y.group : 1), n, scale,
                  w.turned);
    turn_scores(w, rows, n, panels);
    weigh_listed(w, rows, panels, biased ? 1.0f : scale, part.m + row0, part.l + row0);
    for (int64_t half = 0; half * kHalfRows < rows; ++half) {
      const uint32_t* a = w.p + half * kTileGroups * kSquare;
      for (int64_t tile = 0; tile < w.tiles(); tile += 4) {
        float* o = w.o + (half * w.tiles() + tile) * kSquare;
        const int64_t column = tile * kTileDepth;
        switch (min64(4, w.tiles() - tile)) {
          case 1:
            add_values<1>(a, v, groups, column, o, v_soon);
            break;
          case 2:
            add_values<2>(a, v, groups, column, o, v_soon);
            break;
          case 3:
            add_values<3>(a, v, groups, column, o, v_soon);
            break;
          default:
            add_values<4>(a, v, groups, column, o, v_soon);
        }
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* o = w.o + r / kHalfRows * w.tiles() * kSquare + r % kHalfRows * kTileRows;
    float* out = part.o + (row0 + r) * y.ldo;
    int64_t d = 0;  // the pair order that decode sums in, behind whole tiles that of memory
    for (; d + kTileDepth <= p.v_head_dim; d += kTileDepth, o += kSquare) {
      store(out + d, load(o));
      store(out + d + kLanes, load(o + kSquare / 2));
    }
    for (int64_t c = 0; d + c < y.ldo; ++c) out[d + c] = o[c % 2 * (kSquare / 2) + c / 2];
  }
}

}  // namespace
}  // namespace attnforge::cpu::ATTNFORGE_ISA
