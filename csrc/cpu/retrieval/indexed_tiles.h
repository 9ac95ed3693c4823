// Listed keys on matrix tiles: bf16 rows of K and V copied together, kTileKeys at a time.
//
//   S^T = K Q^T   K is A as it lies in memory, the rows of a unit are the 16 columns of B: K costs
//                 copies of its rows alone. S is S^T turned by 16 x 16
//   O += P V      V is B: two rows side by side, even columns in one tile, odd ones in the next:
//                 the pair order that decode sums in
//   prefetch      the next chunk's rows between those that are copied, by rounds (flash/keys.h)
//
// P is rounded to bf16, sums are of P before rounding.
#pragma once

#include "cpu/micro/tile_pack.h"
#include "cpu/micro/tile_softmax.h"
#include "cpu/retrieval/indexed_layout.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kTileKeys = 64;
constexpr int64_t kTileLds = kTileKeys + 16;  // off the power of two

struct ListTiles {
  BFloat16* q;     // one panel of B
  BFloat16* rows;  // K [kTileKeys][depth], then V as B
  float* turned;   // S^T [kTileKeys][16]
  float* s;        // S, then P in its place: [16][kTileLds]
  float* o;        // [16][ldo]
  int64_t depth, ldo;
};

AF_INLINE ListTiles take_list_tiles(Arena& a, int64_t dim, int64_t v_dim) {
  ListTiles w;
  w.depth = tile_depth(dim), w.ldo = round_up(v_dim, kNR);
  w.q = a.take<BFloat16>(w.depth * kNR);
  w.rows = a.take<BFloat16>(kTileKeys * max64(w.depth, w.ldo));
  w.turned = a.take<float>(kTileKeys * kTileRows);
  w.s = a.take<float>(kTileRows * kTileLds);
  w.o = a.take<float>(kTileRows * w.ldo);
  return w;
}

// Between this many keys prefetches have their turn.
constexpr int64_t kTurn = 8;

// row(j): of n keys. What *walk has left is walked meanwhile.
template <class Row>
AF_INLINE void copy_keys(const ListTiles& w, int64_t n, int64_t dim, RowsAhead<BFloat16>& walk,
                         const Row& row) {
  const int64_t share = share_of(&walk, n / kTurn);
  for (int64_t j = 0; j < n; ++j) {
    if (j % kTurn == 0) ask_for(walk, share);
    const BFloat16* src = row(j);
    for (int64_t d = 0; d < dim; d += kTileDepth)
      store_raw(w.rows + j * w.depth + d, load_pairs(src + d, dim - d));
  }
  ask_for(walk, walk.left);
}

// Two rows of up to 32 columns as a row of each of two tiles.
AF_INLINE void put_side_by_side(const BFloat16* first, const BFloat16* second, int64_t columns,
                                BFloat16* to) {
  VecU a = load_pairs(first, columns), b = second ? load_pairs(second, columns) : VecU{};
  if (columns >= kTileDepth) {
    store_raw(to, (a & 0xffffu) | (b << 16));
    store_raw(to + kTileSize, (a >> 16) | (b & 0xffff0000u));
    return;
  }
  BFloat16 x[kTileDepth], y[kTileDepth], pair[2 * kTileDepth];  // the order of memory
  store_raw(x, a), store_raw(y, b);
  for (int64_t i = 0; i < kTileDepth; ++i) pair[2 * i] = x[i], pair[2 * i + 1] = y[i];
  store_raw(to, load_raw<VecU>(pair));
  store_raw(to + kTileSize, load_raw<VecU>(pair + kTileDepth));
}

// The same for V; `keys`: n rounded up to whole tiles.
template <class Row>
AF_INLINE void pair_values(const ListTiles& w, int64_t n, int64_t keys, int64_t dim,
                           RowsAhead<BFloat16>& walk, const Row& row) {
  const int64_t share = share_of(&walk, keys / kTurn);
  for (int64_t j = 0; j < keys; j += 2) {
    if (j % kTurn == 0) ask_for(walk, share);
    const BFloat16* first = j < n ? row(j) : nullptr;
    BFloat16* to = w.rows + j / kTileDepth * 2 * kTileSize + j % kTileDepth * kTileRows;
    for (int64_t d = 0; d < dim; d += kTileDepth, to += keys * kNR) {
      if (first) {
        put_side_by_side(first + d, j + 1 < n ? row(j + 1) + d : nullptr, dim - d, to);
      } else {
        store_raw(to, VecU{}), store_raw(to + kTileSize, VecU{});
      }
    }
  }
  ask_for(walk, walk.left);
}

// S of `rows` rows from S^T of whole tiles of keys; what is past n is not seen.
AF_INLINE void turn_scores(const ListTiles& w, int64_t rows, int64_t n, int64_t keys) {
  for (int64_t c = 0; c < keys; c += kLanes) {
    VecU x[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) x[i] = load_raw<VecU>(w.turned + (c + i) * kTileRows);
    transpose_pairs(x);
    for (int64_t r = 0; r < rows; ++r) store_raw(w.s + r * kTileLds + c, x[r]);
  }
  for (int64_t r = 0; r < rows && n < keys; ++r) mask_row(w.s + r * kTileLds, keys, 0, n, -kInf);
}

AF_INLINE BFloat16* weights_of(const ListTiles& w, int64_t r) {
  return reinterpret_cast<BFloat16*>(w.s + r * kTileLds);
}

// S to P; O is brought under the new maximum.
AF_INLINE void weigh_listed(const ListTiles& w, int64_t rows, int64_t keys, float scale, float* m,
                            float* l) {
  for (int64_t r = 0; r < rows; ++r) {
    const float alpha =
        softmax_row_rounded(w.s + r * kTileLds, keys, scale, weights_of(w, r), m[r], l[r]);
    if (alpha != 1.0f) scale_row(w.o + r * w.ldo, w.ldo, alpha);
  }
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
  PageKeys<BFloat16> keys = kv.keys(batch, head);
  auto q_row = [&](int64_t r) {
    return row_ptr<const BFloat16>(params.flash.q, batch, seq.q_row + (row0 + r) % p.seqlen_q,
                                   head * y.group + (row0 + r) / p.seqlen_q);
  };
  pack_key_tiles(q_row, rows, p.head_dim, w.q);
  __builtin_memset(w.s, 0, kTileRows * kTileLds * sizeof(float));
  __builtin_memset(w.o, 0, kTileRows * w.ldo * sizeof(float));
  for (int64_t r = row0; r < row0 + rows; ++r) part.m[r] = -kInf, part.l[r] = part.z[r] = 0.0f;
  int64_t k_at[2][kTileKeys], v_at[2][kTileKeys], here = 0;
  kv.locate(batch, g.keys + lo, min64(kTileKeys, hi - lo), k_at[0], v_at[0]);
  for (int64_t e = lo; e < hi; e += kTileKeys, here ^= 1) {
    const int64_t n = min64(kTileKeys, hi - e), next = min64(kTileKeys, hi - e - n);
    const int64_t whole = round_up(n, kTileDepth);
    kv.locate(batch, g.keys + e + n, next, k_at[here ^ 1], v_at[here ^ 1]);
    keys.k_at = k_at[here], keys.v_at = v_at[here];
    Ahead<BFloat16> ahead = {{keys.k, k_at[here ^ 1], kv.k_stride(), 0, p.head_dim, 1},
                             {keys.v, v_at[here ^ 1], kv.v_stride(), 0, p.v_head_dim, 1}};
    ahead.begin(next);
    if (next > 0) ahead.allow(0, 1);
    copy_keys(w, n, p.head_dim, ahead.k, [&](int64_t j) { return keys.k_row(j); });
    tile_gemm(n, 1, w.depth, w.rows, w.depth, w.q, 0, w.turned, kTileRows, false);
    if (biased)
      bias_turned(y, p.seqlen_q, row0, rows, g.bias + e * (y.united ? y.group : 1), n, scale,
                  w.turned);
    turn_scores(w, rows, n, whole);
    weigh_listed(w, rows, whole, biased ? 1.0f : scale, part.m + row0, part.l + row0);
    pair_values(w, n, whole, p.v_head_dim, ahead.v, [&](int64_t j) { return keys.v_row(j); });
    tile_gemm(rows, vectors_of(p.v_head_dim), whole, weights_of(w, 0), 2 * kTileLds, w.rows,
              whole * kNR, w.o, w.ldo, true);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < y.ldo; d += kLanes)
      store(part.o + (row0 + r) * y.ldo + d, load(w.o + r * w.ldo + d));
  }
}

}  // namespace
}  // namespace attnforge::cpu::ATTNFORGE_ISA
