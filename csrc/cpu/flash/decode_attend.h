// One group of query rows of decode over one run of keys: scores, online softmax, P V. What it is
// for is told in decode_tasks.h.
#pragma once

#include "cpu/flash/decode_products.h"
#include "cpu/flash/score_row.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kMaxChunk = 64;

// Four rows of a kv head: the register group, with what each row sees.
struct RowGroup {
  int64_t rows;
  int64_t ldq, ldo;
  const float* q;
  float *m, *l, *z, *o;
  float q_sum[kRows];  // of the elements of q, where codes have zeros
  Interval keys[kRows];
  float slope2[kRows];
  int64_t head[kRows], query[kRows];
  int64_t lo, hi;  // union of the intervals
  bool same;       // all rows see [lo, hi)
};

// Four lanes again and again.
AF_INLINE VecF repeat4(Vec4 x) {
#if ATTNFORGE_LANES == 16 && defined(__AVX512F__)
  return (VecF)_mm512_broadcast_f32x4((__m128)x);
#elif ATTNFORGE_LANES == 8 && defined(__AVX__)
  return (VecF)_mm256_set_m128((__m128)x, (__m128)x);
#else
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = x[i % 4];
  return v;
#endif
}

// Online softmax on [key][kRows] scores; n keys, padded here to a whole vector with -inf.
AF_INLINE void softmax_group(float* s, int64_t n, float* m, float* l, float* alpha) {
  constexpr int64_t kStep = kLanes / kRows;
  int64_t padded = round_up(n, kStep);
  fill(s, n * kRows, padded * kRows, -kInf);
  VecF top = splat(-kInf);
  for (int64_t c = 0; c < padded; c += kStep) top = vmax(load(s + c * kRows), top);
  const Vec4 tops = fold4(top, [](auto a, auto b) { return a > b ? a : b; });
  const Vec4 was = load4(m), none{}, empty = none - kInf;
  const Vec4 now = tops > was ? tops : was;
  store4(m, now);
  const auto moved = now != was;
  Vec4 factor = none + 1.0f;
  if (moved[0] | moved[1] | moved[2] | moved[3]) {
    const VecF power = exp2(repeat4(moved ? was - now : none));
    factor = fold4(power, [](auto a, auto) { return a; });
  }
  store4(alpha, factor);
  const VecF bases = repeat4(now == empty ? none : now);
  VecF sum{};
  for (int64_t c = 0; c < padded; c += kStep) {
    VecF prob = exp2(load(s + c * kRows) - bases);
    store(s + c * kRows, prob);
    sum += prob;
  }
  store4(l, load4(l) * factor + fold4(sum, [](auto a, auto b) { return a + b; }));
}

// Scores [key][kRows] of n keys from key0 on to weights, row by row, where a call does more than
// softmax.
AF_INLINE void weigh_group(const FlashProblem& p, const Sequence& seq, const RowGroup& rows,
                           int64_t key0, int64_t n, float* s, float* alpha) {
  float row[kMaxChunk], drop[kMaxChunk];
  const int64_t padded = round_up(n, kNR);
  for (int64_t r = 0; r < rows.rows; ++r) {
    alpha[r] = 1.0f;
    const int64_t lo = max64(0, rows.keys[r].lo - key0), hi = min64(n, rows.keys[r].hi - key0);
    fill(row, 0, padded, 0.0f);
    if (lo < hi) {
      for (int64_t c = 0; c < n; ++c) row[c] = s[c * kRows + r];
      const ScoreRow scores = {row, padded, key0, {lo, hi}, drop};
      alpha[r] = weigh_score_row(p, seq, rows.head[r], rows.query[r], scores, rows.m[r], rows.l[r]);
    }
    for (int64_t c = 0; c < n; ++c) s[c * kRows + r] = row[c];
  }
}

// O += P V of one row over exactly the keys it sees.
template <class Keys>
AF_INLINE void weigh_seen(const FlashProblem& p, const Sequence& seq, const RowGroup& rows,
                          int64_t r, Interval seen, const float* s, Keys keys) {
  const RowMods mods = row_mods(p, seq, rows.head[r], rows.query[r]);
  for (int64_t j = seen.lo; j < seen.hi; ++j, s += kRows, keys.skip(1)) {
    if (sees(mods, j)) weigh<1>(s, keys, 1, p.v_head_dim, nullptr, rows.o + r * rows.ldo, rows.ldo);
  }
}

// Whether n rows of V hold neither NaN nor infinity.
template <class Keys>
[[gnu::noinline]] static bool finite_values(const Keys& keys, int64_t n, int64_t dim) {
  VecF poison{};
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      poison += load_partial(channel(keys.v_row(j), d), dim - d) * splat(0.0f);
    }
  }
  return reduce_add(poison) == 0.0f;
}

// What is prefetched meanwhile: K beside Q K, V beside P V.
template <class E>
struct Ahead {
  RowsAhead<E> k, v;

  AF_INLINE_MEMBER void begin(int64_t keys) { k.begin(keys), v.begin(keys); }
  AF_INLINE_MEMBER void allow(int64_t part, int64_t parts) {
    k.allow(part, parts), v.allow(part, parts);
  }
  AF_INLINE_MEMBER void finish() { ask_for(k, k.left), ask_for(v, v.left); }
};

template <class Keys>
AF_INLINE void attend(const FlashProblem& p, const ScoreMap& map, const Sequence& seq,
                      const RowGroup& rows, Keys keys, const float* rotated, int64_t key0,
                      int64_t key_end, Ahead<typename Keys::Element>& ahead) {
  int64_t lo = max64(key0, rows.lo), hi = min64(key_end, rows.hi);
  if (lo >= hi) return;
  const int64_t n = hi - lo;
  keys.skip(lo - key0);
  float s[(kMaxChunk + kLanes) * kRows];
  dispatch_rows(rows.rows, [&](auto r) {
    constexpr int kCount = decltype(r)::value;
    if constexpr (!Keys::kPages) {  // pages hold keys that were rotated as they were written
      if (rotated) {
        const DenseKeys<float> turned{rotated + (lo - key0) * rows.ldq, nullptr, rows.ldq, 0};
        scores<kCount>(rows.q, rows.ldq, turned, n, p.head_dim, nullptr, s);
        return;
      }
    }
    scores<kCount>(rows.q, rows.ldq, keys, n, p.head_dim, &ahead.k, s);
  });
  const int64_t flat = round_up(n * kRows, kLanes);
  fill(s, n * kRows, flat, 0.0f);
  if constexpr (Keys::kCodes) keys.decode_scores(n, rows.q_sum, s);
  if (map.cap2 > 0.0f) apply_softcap(s, flat, map.cap2);
  if (p.alibi_slopes) {
    for (int64_t c = 0; c < n; ++c) {
      for (int64_t r = 0; r < kRows; ++r) {
        int64_t distance = rows.query[r] + seq.offset - (lo + c);
        s[c * kRows + r] -=
            rows.slope2[r] * static_cast<float>(distance < 0 ? -distance : distance);
      }
    }
  }
  bool masked = false;
  for (int64_t r = 0; r < rows.rows && !rows.same; ++r) {
    masked |= rows.keys[r].lo > lo || rows.keys[r].hi < hi;
  }
  float alpha[kRows];
  if (p.mods.any) {
    weigh_group(p, seq, rows, lo, n, s, alpha);
  } else {
    if (masked) {
      for (int64_t r = 0; r < rows.rows; ++r) {
        for (int64_t c = 0; c < n; ++c) {
          if (lo + c < rows.keys[r].lo || lo + c >= rows.keys[r].hi) s[c * kRows + r] = -kInf;
        }
      }
    }
    softmax_group(s, n, rows.m, rows.l, alpha);
  }
  if constexpr (Keys::kCodes) keys.decode_weights(n, alpha, rows.z, s);
  for (int64_t r = 0; r < rows.rows; ++r) {
    if (alpha[r] == 1.0f) continue;
    float* o = rows.o + r * rows.ldo;
    for (int64_t d = 0; d < rows.ldo; d += kLanes) store(o + d, load(o + d) * splat(alpha[r]));
  }
  const bool some_hidden = p.mods.segments_q || (p.mods.mask && hi > seq.k_len - p.mods.mask_keys);
  const bool each = some_hidden && !finite_values(keys, n, p.v_head_dim);
  if (!masked && !each) {
    dispatch_rows(rows.rows, [&](auto r) {
      weigh<decltype(r)::value>(s, keys, n, p.v_head_dim, &ahead.v, rows.o, rows.ldo);
    });
    return;
  }
  for (int64_t r = 0; r < rows.rows; ++r) {
    int64_t first = max64(lo, rows.keys[r].lo), end = min64(hi, rows.keys[r].hi);
    if (first >= end) continue;
    const float* weights = s + (first - lo) * kRows + r;
    Keys seen = keys;
    seen.skip(first - lo);
    if (each) {
      weigh_seen(p, seq, rows, r, {first, end}, weights, seen);
    } else {
      weigh<1>(weights, seen, end - first, p.v_head_dim, nullptr, rows.o + r * rows.ldo, rows.ldo);
    }
  }
}

}  // namespace
}  // namespace attnforge::cpu::ATTNFORGE_ISA
