// Keys that share at least min_hits buckets with a query, and how likely that was.
//
//   count      a byte per key of a segment, one more for each table whose bucket of the query's
//   code
//              names it; a scan gives the ids in ascending order
//   weigh      with p = 1 - angle / pi and P = p^bits, a key is hit at least twice of L times with
//                  u = 1 - (1 - P)^L - L P (1 - P)^(L - 1)
//              and log_bias = -log(u + clip). Where L P < 1 the difference cancels: there the tail
//              of the binomial distribution is summed term by term. With min_hits 1, u is
//              1 - (1 - P)^L
//
// The cosine is that of the query and the centred key, clamped: rounding must not give NaN. A task
// is one query head. Reads about L n / 2^bits ids and the keys that are hit.
#include "cpu/flash/problem.h"
#include "cpu/kernels.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/softmax.h"
#include "cpu/retrieval/lsh.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr float kLeast = 1e-12f;  // of an inclusion probability that is a divisor
constexpr int64_t kTablesAhead = 8;
constexpr int64_t kHitsAhead = 32;  // rows of K
constexpr int kTerms = 12;          // of the binomial tail: the next one is below 1e-9 of the sum

AF_INLINE VecF square_root(VecF x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// 1 - acos(c) / pi for c in [-1, 1], relative error below 1e-6 for either sign: Abramowitz and
// Stegun 4.4.46 gives acos of |c|, which is what is left of pi for a negative one.
AF_INLINE VecF collision(VecF c) {
  const VecF x = vabs(c);
  constexpr float kSeries[] = {0.0066700901f, -0.0170881256f, 0.0308918810f, -0.0501743046f,
                               0.0889789874f, -0.2145988016f, 1.5707963050f};
  VecF p = splat(-0.0012624911f);
  for (const float a : kSeries) p = fma(p, x, splat(a));
  const VecF part = p * square_root(splat(1.0f) - x) * splat(0.31830988618f);
  return c < splat(0.0f) ? part : splat(1.0f) - part;
}

AF_INLINE VecF power(VecF x, int64_t n) {
  VecF y = splat(1.0f);
  for (; n > 0; n >>= 1, x *= x) {
    if (n & 1) y *= x;
  }
  return y;
}

AF_INLINE VecF log_of(VecF x) {  // x > 0, normal
  const VecU bits = float_to_bits(x);
  VecF exponent;
  for (int i = 0; i < kLanes; ++i) exponent[i] = static_cast<int32_t>(bits[i] >> 23) - 127;
  const VecF m = bits_to_float((bits & 0x007fffffu) | 0x3f800000u);
  return fma(exponent, splat(kLn2), log1p_unit(m - splat(1.0f)));
}

// The probability that a key at cosine c is hit at least min_hits (1 or 2) times.
AF_INLINE VecF inclusion(VecF c, int64_t bits, int64_t tables, int64_t min_hits) {
  const float l = static_cast<float>(tables);
  const VecF one = splat(1.0f), p = power(collision(c), bits), miss = one - p;
  const VecF none = power(miss, tables - 1);
  VecF sure = one - none * miss, term = splat(l) * p * none;
  // From the term of j hits to that of j + 1: (l - j) / (j + 1) p / (1 - p).
  const VecF ratio = miss > splat(0.0f) ? p / miss : splat(0.0f);
  VecF tail = min_hits == 1 ? term : splat(0.0f);
  if (min_hits == 2) sure -= term;
  for (int j = 1; j <= kTerms; ++j) {
    term *= ratio * splat((l - static_cast<float>(j)) / static_cast<float>(j + 1));
    tail += term;
  }
  return p * splat(l) < one ? tail : sure;
}

template <class T>
AF_INLINE float dot(const float* a, const T* b, int64_t dim) {
  VecF sum{};
  for (int64_t d = 0; d < dim; d += kLanes) {
    sum = fma(load(a + d), load_partial(b + d, dim - d), sum);
  }
  return reduce_add(sum);
}

// Local ids of [lo, hi) whose count is at least min_hits, from key0 on; returns how many.
AF_INLINE int64_t scan_hits(const uint8_t* counts, int64_t lo, int64_t hi, int64_t min_hits,
                            int64_t key0, int32_t* ids, int64_t room) {
  int64_t n = 0;
  const uint64_t skip = min_hits >= 2 ? 0xfefefefefefefefeu : ~uint64_t{0};
  for (int64_t c = lo / 8 * 8; c < hi; c += 8) {
    uint64_t word;
    __builtin_memcpy(&word, counts + c, 8);
    if ((word & skip) == 0) continue;
    for (int64_t i = max64(c, lo); i < min64(c + 8, hi); ++i) {
      if (counts[i] >= min_hits && n < room) ids[n++] = static_cast<int32_t>(key0 + i);
    }
  }
  return n;
}

AF_INLINE int64_t find_hits(const LshRetrieveParams& params, int64_t batch, int64_t head,
                            uint8_t* counts, int32_t* ids) {
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
    __builtin_memset(counts, 0, round_up(t.segment, 8));
    for (int64_t l = -2 * kTablesAhead; l < t.tables; ++l) {
      // A bucket lies anywhere: where it starts is asked for early, then its ids.
      if (l + 2 * kTablesAhead < t.tables) __builtin_prefetch(bucket(s, l + 2 * kTablesAhead));
      if (l + kTablesAhead >= 0 && l + kTablesAhead < t.tables) {
        const uint16_t* ids = table_of(t, unit, s, l + kTablesAhead).ids;
        const int32_t* ends = bucket(s, l + kTablesAhead);
        for (int64_t i = ends[0]; i < ends[1]; i += 32) __builtin_prefetch(ids + i);
      }
      if (l < 0) continue;
      const uint16_t* ids = table_of(t, unit, s, l).ids;
      const int32_t* ends = bucket(s, l);
      for (int64_t i = ends[0]; i < ends[1]; ++i) {
        uint8_t& count = counts[ids[i]];
        count = static_cast<uint8_t>(count + (count != 255));
      }
    }
    n += scan_hits(counts, lo, hi, params.min_hits, key0, ids + n, params.slots - n);
  }
  return n;
}

template <class T>
AF_INLINE void weigh_hits(const LshRetrieveParams& params, int64_t batch, int64_t head, int64_t n,
                          const int32_t* ids, float* log_bias) {
  const FlashProblem& p = params.problem;
  const int64_t kv_head = head / group_size(p), dim = p.head_dim;
  const int64_t unit = batch * p.heads_k + kv_head;
  alignas(64) float q[256 + kLanes];
  const T* src = row_ptr<const T>(params.q, batch, 0, head);
  VecF square{};
  float top = 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    const float x = to_float(src[d]);
    top = x > top ? x : -x > top ? -x : top;
  }
  // Scaled by the largest element: squares neither overflow nor vanish.
  const float scale = top > 0.0f ? 1.0f / top : 0.0f;
  for (int64_t d = 0; d < dim; d += kLanes) {
    const VecF x = load_partial(src + d, dim - d) * splat(scale);
    store(q + d, x);
    square = fma(x, x, square);
  }
  const float norm = __builtin_sqrtf(reduce_add(square));
  float shift = 0.0f;
  if (params.mean) shift = dot(q, params.mean + unit * dim, dim);
  const float* norms = params.norms + unit * params.norm_stride;
  auto row = [&](int64_t i) { return row_ptr<const T>(params.k, batch, ids[i], kv_head); };
  for (int64_t j = 0; j < min64(kHitsAhead, n); ++j) prefetch_row(row(j), dim);
  for (int64_t i = 0; i < n; i += kLanes) {
    float cosine[kLanes] = {};
    const int64_t m = min64(kLanes, n - i);
    for (int64_t j = i + kHitsAhead; j < min64(i + kHitsAhead + kLanes, n); ++j) {
      prefetch_row(row(j), dim);
    }
    for (int64_t j = 0; j < m; ++j) {
      const float size = norm * norms[ids[i + j]];
      const float c = size > 0.0f ? (dot(q, row(i + j), dim) - shift) / size : 0.0f;
      cosine[j] = c > 1.0f ? 1.0f : c < -1.0f ? -1.0f : c == c ? c : 0.0f;
    }
    const LshTables& t = params.tables;
    VecF u = inclusion(load(cosine), t.bits, t.tables, params.min_hits) + splat(params.clip);
    u = vmax(splat(kLeast), u);
    float bias[kLanes];
    store(bias, splat(0.0f) - log_of(u > splat(1.0f) ? splat(1.0f) : u));
    for (int64_t j = 0; j < m; ++j) log_bias[i + j] = bias[j];
  }
}

}  // namespace

int64_t lsh_retrieve_workspace(const LshRetrieveParams& params, int64_t num_threads) {
  return round_up(params.tables.segment, 64) * num_threads;
}

void lsh_retrieve(const LshRetrieveParams& params, const Workers& workers) {
  const FlashProblem& p = params.problem;
  const int64_t bytes = round_up(params.tables.segment, 64);
  dispatch_dtype(p.dtype, [&](auto element) {
    parallel_tasks(workers, p.batch * p.heads_q, [&](int64_t task, int64_t worker) {
      const int64_t batch = task / p.heads_q, head = task % p.heads_q;
      auto* counts = static_cast<uint8_t*>(params.workspace) + worker * bytes;
      int32_t* ids = params.ids + task * params.slots;
      const int64_t n = find_hits(params, batch, head, counts, ids);
      weigh_hits<decltype(element)>(params, batch, head, n, ids,
                                    params.log_bias + task * params.slots);
      params.lens[task] = static_cast<int32_t>(n);
    });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
