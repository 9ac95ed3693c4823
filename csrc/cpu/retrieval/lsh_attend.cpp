// MagicPIG in one pass: a query head's hits, their weights, and attention over them and over the
// keys that are exact in any case.
//
//   list      the keys before `begin` and from `end` on, then the hits: all of one softmax
//   products  a row of K is gathered once, for the cosine that gives its log-bias and for its logit
//   values    rows of V two at a time into a row of O that stays in L1
//   task      one query head. What heads of a group share they find in cache: lists of their own
//             hardly meet, and a union would multiply every key by all of them
//
//   bytes     (D + Dv) elements per key of a list, besides what lsh_hits.h reads
#include "cpu/flash/decode_tasks.h"
#include "cpu/kernels.h"
#include "cpu/retrieval/lsh_hits.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

struct HeadScratch {
  uint8_t* counts;  // of a segment
  int32_t* ids;     // [keys]
  float* s;         // like ids, to a whole kNR: logits, then weights, base 2
  float* o;
};

AF_INLINE HeadScratch take_scratch(Arena& a, const LshAttendParams& params) {
  const FlashProblem& p = params.flash.problem;
  HeadScratch w;
  w.counts = a.take<uint8_t>(params.find.tables.segment);
  w.ids = a.take<int32_t>(p.seqlen_k);
  w.s = a.take<float>(p.seqlen_k + kNR);
  w.o = a.take<float>(round_up(p.v_head_dim, kLanes));
  return w;
}

AF_INLINE int64_t scratch_bytes(const LshAttendParams& params) {
  Arena a{nullptr};
  take_scratch(a, params);
  return a.used;
}

// s becomes 2^(s - m); returns their sum. Not inlined: the loops of a head keep their registers.
[[gnu::noinline]] static float softmax_list(float* s, int64_t n, float& m) {
  fill(s, n, round_up(n, kNR), -kInf);
  float l = 0.0f;
  m = -kInf;
  softmax_row(s, round_up(n, kNR), m, l);
  return l;
}

// o += a x + b y, in the pair order of T.
template <class T>
[[gnu::noinline]] static void add_rows(float a, const T* x, float b, const T* y, int64_t dim,
                                       float* o) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
    const VecF low = fma(splat(a), load_pair<0>(x + d), load(o + d));
    const VecF high = fma(splat(a), load_pair<1>(x + d), load(o + d + kLanes));
    store(o + d, fma(splat(b), load_pair<0>(y + d), low));
    store(o + d + kLanes, fma(splat(b), load_pair<1>(y + d), high));
  }
  for (; d < dim; d += kLanes) {
    const VecF sum = fma(splat(a), load_partial(x + d, dim - d), load(o + d));
    store(o + d, fma(splat(b), load_partial(y + d, dim - d), sum));
  }
}

template <class T>
AF_INLINE void weigh_values(const LshAttendParams& params, int64_t batch, int64_t kv_head,
                            const HeadScratch& w, int64_t n) {
  const int64_t dim = params.flash.problem.v_head_dim;
  auto row = [&](int64_t i) __attribute__((always_inline)) {
    return row_ptr<const T>(params.flash.v, batch, w.ids[i], kv_head);
  };
  fill(w.o, 0, round_up(dim, kLanes), 0.0f);
  for (int64_t i = 0; i < min64(kHitsAhead, n); ++i) fetch_row(row(i), dim);
  for (int64_t i = 0; i < n; i += 2) {
    for (int64_t j = i + kHitsAhead; j < min64(i + kHitsAhead + 2, n); ++j) fetch_row(row(j), dim);
    const bool two = i + 1 < n;  // of a last row alone the half
    add_rows(two ? w.s[i] : 0.5f * w.s[i], row(i), two ? w.s[i + 1] : 0.5f * w.s[i],
             row(two ? i + 1 : i), dim, w.o);
  }
}

template <class T>
AF_INLINE void attend_head(const LshAttendParams& params, int64_t batch, int64_t head,
                           const HeadScratch& w) {
  const LshRetrieveParams& find = params.find;
  const FlashProblem& p = params.flash.problem;
  const int64_t kv_head = head / group_size(p);
  const int64_t length = max64(0, min64(params.length[batch], p.seqlen_k));
  const int64_t begin = max64(0, min64(find.begin[batch], length));
  const int64_t end = max64(begin, min64(find.end[batch], length));
  int64_t exact = 0;
  for (int64_t key = 0; key < begin; ++key) w.ids[exact++] = static_cast<int32_t>(key);
  for (int64_t key = end; key < length; ++key) w.ids[exact++] = static_cast<int32_t>(key);
  const int64_t n =
      exact + find_hits(find, batch, head, w.counts, w.ids + exact, p.seqlen_k - exact);
  HashedQuery query;
  take_query<T>(find, batch, head, query);
  const VecF unit = splat(p.softmax_scale * kLog2E / query.scale);
  auto exactly = [&](int64_t i, int64_t, VecF dots) { store(w.s + i, dots * unit); };
  auto weighed = [&](int64_t i, int64_t m, VecF dots) {
    const VecF bias = weigh_hits(find, query, w.ids + exact + i, m, dots);
    store(w.s + exact + i, fma(bias, splat(kLog2E), dots * unit));
  };
  for_products<T>(find, batch, kv_head, query, w.ids, exact, exactly);
  for_products<T>(find, batch, kv_head, query, w.ids + exact, n - exact, weighed);
  float m;
  const float l = softmax_list(w.s, n, m);
  weigh_values<T>(params, batch, kv_head, w, n);
  const DenseStore<T> plain{params.flash.k, params.flash.v};
  finish_row(params.flash, plain, sequence(p, batch), head, 0, m, l, 0.0f, w.o);
}

}  // namespace

int64_t lsh_attend_workspace(const LshAttendParams& params, int64_t num_threads) {
  return scratch_bytes(params) * num_threads;
}

void lsh_attend(const LshAttendParams& params, const Workers& workers) {
  const FlashProblem& p = params.flash.problem;
  dispatch_dtype(p.dtype, [&](auto element) {
    parallel_tasks(workers, p.batch * p.heads_q, [&](int64_t task, int64_t worker) {
      Arena own{static_cast<char*>(params.flash.workspace) + worker * scratch_bytes(params)};
      attend_head<decltype(element)>(params, task / p.heads_q, task % p.heads_q,
                                     take_scratch(own, params));
    });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
