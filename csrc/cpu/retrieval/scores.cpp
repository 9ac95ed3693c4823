// Logits of all keys, or of centroids: the first product of decode, written out.
//
// Four rows at a time over a run of keys. With counts each logit is divided by the sum of
// counts exp(s): a key's share of the softmax, if a centroid's logit stood for all of its keys
// (Squeezed Attention). Keys are read once for all query heads of a KV head: bound by memory. A
// task is a run of keys of one KV head; the division by the sum is a pass of its own.
#include "cpu/flash/decode_tasks.h"
#include "cpu/kernels.h"
#include "cpu/paged/pages.h"
#include "cpu/retrieval/rows.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kRun = 2048;  // keys of a task
constexpr int64_t kStep = 64;

AF_INLINE float* out_row(float* out, const FlashProblem& p, int64_t batch, Row row,
                         int64_t columns) {
  return out + ((batch * p.heads_q + row.head) * p.seqlen_q + row.query) * columns;
}

// [key][kRows] of n keys to rows of the output.
AF_INLINE void spread_scores(const float* s, int64_t n, int64_t r, float* out) {
  for (int64_t c = 0; c < n; ++c) out[c] = s[c * kRows + r];
}

template <class Store>
AF_INLINE void score_run(const KeyScoresParams& params, const Store& kv, int64_t batch,
                         int64_t kv_head, int64_t run) {
  const FlashProblem& p = params.problem;
  const Sequence seq = sequence(p, batch);
  const int64_t lo = run * kRun, end = min64(params.columns, lo + kRun),
                hi = max64(lo, min64(end, seq.k_len));
  const int64_t rows = p.seqlen_q * group_size(p);
  const int64_t ldq = round_up(p.head_dim, kLanes);
  FlashFwdParams loader;
  loader.problem = p, loader.q = params.q;
  alignas(64) float q[kRows * kMostDim], s[(kStep + kLanes) * kRows];
  for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
    const int64_t count = min64(kRows, rows - r0);
    for (int64_t r = 0; r < count; ++r) {
      const Row row = row_of(p, kv_head, r0 + r);
      load_query<typename Store::Element>(loader, seq, row.head, row.query, p.softmax_scale,
                                          nullptr, q + r * ldq);
    }
    typename Store::Places places[2];
    int64_t here = 0;
    if (lo < hi) kv.locate(seq, lo, min64(kStep, hi - lo), places[here]);
    for (int64_t key = lo; key < hi; key += kStep, here ^= 1) {
      const int64_t n = min64(kStep, hi - key), rest = hi - key - kStep;
      const auto keys = kv.keys(seq, key, kv_head, places[here]);
      if (rest > 0) kv.locate(seq, key + kStep, min64(kStep, rest), places[here ^ 1]);
      RowsAhead<typename Store::Element> ahead{};
      if (rest > 0 && r0 == 0) {
        const auto next = kv.keys(seq, key + kStep, kv_head, places[here ^ 1]);
        ahead = kv.k_rows(next, 1, p.head_dim);
        ahead.begin(min64(kStep, rest));
        ahead.allow(0, 1);
      }
      dispatch_rows(count, [&](auto r) {
        scores<decltype(r)::value>(q, ldq, keys, n, p.head_dim, &ahead, s);
      });
      for (int64_t r = 0; r < count; ++r) {
        const Row row = row_of(p, kv_head, r0 + r);
        spread_scores(s, n, r, out_row(params.out, p, batch, row, params.columns) + key);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const Row row = row_of(p, kv_head, r0 + r);
      fill(out_row(params.out, p, batch, row, params.columns), hi, end, -kInf);
    }
  }
}

// s - log sum counts exp(s); keys of count 0 are -inf.
[[gnu::noinline]] static void normalise_row(float* s, const int32_t* counts, int64_t n) {
  float top = -kInf;
  for (int64_t c = 0; c < n; ++c) {
    if (counts[c] <= 0) s[c] = -kInf;
    if (!(s[c] <= top)) top = s[c];  // a NaN goes on to all
  }
  const float base = top == -kInf ? 0.0f : top;
  double sum = 0.0;
  auto add = [&](VecF x, VecI size) __attribute__((always_inline)) {
    sum +=
        reduce_add(exp2((x - splat(base)) * splat(kLog2E)) * __builtin_convertvector(size, VecF));
  };
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) add(load(s + c), load_raw<VecI>(counts + c));
  if (c < n) {
    VecF x = splat(-kInf);
    VecI size{};
    for (int64_t i = c; i < n; ++i) x[i - c] = s[i], size[i - c] = counts[i];
    add(x, size);
  }
  if (sum == 0.0) return;
  const float total = base + static_cast<float>(__builtin_log(sum));
  for (c = 0; c < n; ++c) s[c] -= total;
}

template <class Store>
AF_INLINE void run_key_scores(const KeyScoresParams& params, const Store& kv,
                              const Workers& workers) {
  const FlashProblem& p = params.problem;
  const int64_t units = p.batch * p.heads_k, runs = ceil_div(params.columns, kRun);
  parallel_tasks(workers, units * runs, [&](int64_t task, int64_t) {
    const int64_t unit = task / runs;
    score_run(params, kv, unit / p.heads_k, unit % p.heads_k, task % runs);
  });
  if (!params.counts) return;
  parallel_tasks(workers, units, [&](int64_t unit, int64_t) {
    const int64_t batch = unit / p.heads_k, kv_head = unit % p.heads_k;
    for (int64_t r = 0; r < p.seqlen_q * group_size(p); ++r) {
      float* s = out_row(params.out, p, batch, row_of(p, kv_head, r), params.columns);
      normalise_row(s, params.counts + unit * params.columns, params.columns);
    }
  });
}

}  // namespace

void key_scores(const KeyScoresParams& params, const Workers& workers) {
  dispatch_dtype(params.problem.dtype, [&](auto element) {
    using T = decltype(element);
    if (params.pool.table) return run_key_scores(params, PageStore<T>{params.pool}, workers);
    run_key_scores(params, DenseStore<T>{params.k, params.k}, workers);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
