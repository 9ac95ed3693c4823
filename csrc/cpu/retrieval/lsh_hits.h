// What a query hits in the tables, and how alike query and keys are.
//
//   count     a byte per key of a segment, one more for each table whose bucket of the query's code
//             names it; a scan gives the ids in ascending order
//   products  of the query, scaled by a power of two, with kLanes gathered rows of K at a time
//   cosine    that of the query and the centred key, clamped: rounding must not give NaN
//
// Reads about L n / 2^bits ids and the keys that are hit.
#pragma once

#include "cpu/flash/problem.h"
#include "cpu/micro/pack.h"
#include "cpu/retrieval/inclusion.h"
#include "cpu/retrieval/lsh.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int64_t kTablesAhead = 8;
constexpr int64_t kHitsAhead = 16;  // rows asked for ahead: what hides the latency of memory

// A row that is read soon: into L1, as few of them are on their way at a time.
template <class T>
AF_INLINE void fetch_row(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 512 / kBits<T>) __builtin_prefetch(row + d, 0, 3);
}

// Local ids of [lo, hi) whose count is at least min_hits (1 or 2), from key0 on; returns how many.
AF_INLINE int64_t scan_hits(const uint8_t* counts, int64_t lo, int64_t hi, int64_t min_hits,
                            int64_t key0, int32_t* ids, int64_t room) {
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7fu;
  const uint64_t seen = min_hits >= 2 ? 0xfefefefefefefefeu : ~uint64_t{0};
  int64_t n = 0;
  auto look = [&](int64_t c, uint64_t word) __attribute__((always_inline)) {
    // The highest bit of each byte that is not 0.
    uint64_t found = (((word & kLow) + kLow) | word) & ~kLow;
    for (; found; found &= found - 1) {
      const int64_t i = c + __builtin_ctzll(found) / 8;
      if (i >= lo && i < hi && n < room) ids[n++] = static_cast<int32_t>(key0 + i);
    }
  };
  auto word_at = [&](int64_t c) __attribute__((always_inline)) {
    uint64_t word;
    __builtin_memcpy(&word, counts + c, 8);
    return word & seen;
  };
  int64_t c = lo / 8 * 8;
  for (; c + 32 <= hi; c += 32) {
    const uint64_t w[] = {word_at(c), word_at(c + 8), word_at(c + 16), word_at(c + 24)};
    if ((w[0] | w[1] | w[2] | w[3]) == 0) continue;
    for (int64_t i = 0; i < 4; ++i) look(c + 8 * i, w[i]);
  }
  for (; c < hi; c += 8) look(c, word_at(c));
  return n;
}

AF_INLINE int64_t find_hits(const LshRetrieveParams& params, int64_t batch, int64_t head,
                            uint8_t* counts, int32_t* ids, int64_t room) {
  const LshTables& t = params.tables;
  const FlashProblem& p = params.problem;
  const int64_t unit = batch * t.heads + head / group_size(p);
  const uint16_t* codes = params.codes + (batch * p.heads_q + head) * t.tables;
  const int64_t most = min64(t.segments * t.segment, p.seqlen_k);
  const int64_t begin = max64(0, params.begin[batch]), end = min64(most, params.end[batch]);
  auto bucket = [&](int64_t s, int64_t l) __attribute__((always_inline)) {
    return table_of(t, unit, s, l).starts + (codes[l] & (buckets_of(t) - 1));
  };
  int64_t n = 0;
  for (int64_t s = 0; s < t.segments; ++s) {
    const int64_t key0 = s * t.segment;
    const int64_t lo = max64(0, begin - key0), hi = min64(t.segment, end - key0);
    if (lo >= hi) continue;
    __builtin_memset(counts, 0, round_up(hi, 8));  // what is behind is counted, but not looked at
    for (int64_t l = -2 * kTablesAhead; l < t.tables; ++l) {
      // A bucket lies anywhere: where it starts is asked for early, then its ids.
      if (l + 2 * kTablesAhead < t.tables) __builtin_prefetch(bucket(s, l + 2 * kTablesAhead));
      if (l + kTablesAhead >= 0 && l + kTablesAhead < t.tables) {
        const uint16_t* own = table_of(t, unit, s, l + kTablesAhead).ids;
        const int32_t* ends = bucket(s, l + kTablesAhead);
        for (int64_t i = ends[0]; i < ends[1]; i += 32) __builtin_prefetch(own + i);
      }
      if (l < 0) continue;
      const uint16_t* own = table_of(t, unit, s, l).ids;
      const int32_t* ends = bucket(s, l);
      if (t.tables <= 255) {
        for (int64_t i = ends[0]; i < ends[1]; ++i) ++counts[own[i]];
      } else {
        for (int64_t i = ends[0]; i < ends[1]; ++i) {
          uint8_t& count = counts[own[i]];
          count = static_cast<uint8_t>(count + (count != 255));
        }
      }
    }
    n += scan_hits(counts, lo, hi, params.min_hits, key0, ids + n, room - n);
  }
  return n;
}

// <q, row> for kLanes rows; q in the pair order of T.
template <class T>
[[gnu::noinline]] static VecF dot_rows(const float* q, const T* const (&rows)[kLanes],
                                       int64_t dim) {
  VecF acc[kLanes]{};
  int64_t d = 0;
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
    const VecF x = load(q + d), y = load(q + d + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      acc[i] = fma(x, load_pair<0>(rows[i] + d), acc[i]);
      acc[i] = fma(y, load_pair<1>(rows[i] + d), acc[i]);
    }
  }
  auto tail = [&]() __attribute__((always_inline)) {  // at most two vectors: see dot_keys
    if (d >= dim) return;
    const VecF x = load(q + d);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) acc[i] = fma(x, load_partial(rows[i] + d, dim - d), acc[i]);
    d += kLanes;
  };
  tail();
  tail();
  return sum_each(acc);
}

// One query against keys of its KV head.
struct HashedQuery {
  alignas(64) float q[256 + kLanes];  // times `scale`, in pair order
  float scale, norm;                  // norm: of the scaled query
  float shift;                        // <scaled query, mean>
  const float* norms;                 // of the centred keys
};

template <class T>
AF_INLINE void take_query(const LshRetrieveParams& params, int64_t batch, int64_t head,
                          HashedQuery& h) {
  const FlashProblem& p = params.problem;
  const int64_t dim = p.head_dim, unit = batch * p.heads_k + head / group_size(p);
  const T* src = row_ptr<const T>(params.q, batch, 0, head);
  float top = 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    const float x = __builtin_fabsf(to_float(src[d]));
    top = x > top ? x : top;
  }
  // A power of two that brings the largest element to 1 .. 2: squares neither overflow nor vanish.
  const uint32_t exponent = __builtin_bit_cast(uint32_t, top) >> 23 & 255;
  h.scale = __builtin_bit_cast(float, (exponent < 253 ? 254 - exponent : 1) << 23);
  const float* mean = params.mean ? params.mean + unit * dim : nullptr;
  VecF square{}, shift{};
  for (int64_t d = 0; d < dim; d += kLanes) {
    const VecF x = load_partial(src + d, dim - d) * splat(h.scale);
    store(h.q + d, x);
    square = fma(x, x, square);
    if (mean) shift = fma(x, load_partial(mean + d, dim - d), shift);
  }
  for (int64_t d = 0; d + 2 * kLanes <= dim; d += 2 * kLanes) {
    VecF x = load(h.q + d), y = load(h.q + d + kLanes);
    pair_up(T{}, x, y);
    store(h.q + d, x);
    store(h.q + d + kLanes, y);
  }
  h.norm = __builtin_sqrtf(reduce_add(square));
  h.shift = reduce_add(shift);
  h.norms = params.norms + unit * params.norm_stride;
}

// Calls f(i, m, dots) for ids [i, i + m) of n, kLanes at a time: the products of the scaled query
// with their rows of K.
template <class T, class F>
AF_INLINE void for_products(const LshRetrieveParams& params, int64_t batch, int64_t kv_head,
                            const HashedQuery& h, const int32_t* ids, int64_t n, const F& f) {
  const int64_t dim = params.problem.head_dim;
  auto row = [&](int64_t i) __attribute__((always_inline)) {
    return row_ptr<const T>(params.k, batch, ids[i], kv_head);
  };
  auto fetch = [&](int64_t i) __attribute__((always_inline)) {
    fetch_row(row(i), dim);
    __builtin_prefetch(h.norms + ids[i]);
  };
  for (int64_t i = 0; i < min64(kHitsAhead, n); ++i) fetch(i);
  for (int64_t i = 0; i < n; i += kLanes) {
    const T* rows[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) rows[j] = row(min64(i + j, n - 1));
    for (int64_t j = i + kHitsAhead; j < min64(i + kHitsAhead + kLanes, n); ++j) fetch(j);
    f(i, min64(kLanes, n - i), dot_rows(h.q, rows, dim));
  }
}

// The log-biases of m hits from their products.
AF_INLINE VecF weigh_hits(const LshRetrieveParams& params, const HashedQuery& h, const int32_t* ids,
                          int64_t m, VecF dots) {
  VecF size{};
  for (int64_t j = 0; j < m; ++j) size[j] = h.norms[ids[j]];
  size *= splat(h.norm);
  VecF c = size > splat(0.0f) ? (dots - splat(h.shift)) / size : splat(0.0f);
  c = c > splat(1.0f) ? splat(1.0f) : c < splat(-1.0f) ? splat(-1.0f) : c;
  c = c == c ? c : splat(0.0f);
  const LshTables& t = params.tables;
  return log_bias_of(c, t.bits, t.tables, params.min_hits, params.clip);
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
