// Upper bounds of the logits in each page, for selection by page (Quest).
//
//   bound     sum over channels of max(q low, q high) = max(0, q) high + min(0, q) low: two chains
//             of FMAs per row and page, kDotKeys pages x four rows of accumulators, as in decode.
//             Where infinite bounds meet a 0 of q the sum is not finite: then the formula itself
//   order     that of memory: where bounds of all heads of a page lie together, a task walks
//             kPageBlock pages of all heads at once, else one head after the other. The next block
//             is asked for meanwhile
//   group     with `grouped` the largest bound of the query heads of a KV head is written
//
//   bytes     2 D elements per page and KV head       flops   4 D per row and page
#include "cpu/flash/decode_tasks.h"
#include "cpu/kernels.h"
#include "cpu/retrieval/rows.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kPageRun = 256;   // pages of a task
constexpr int64_t kPageBlock = 16;  // pages at a time; of all heads 128 KiB at most

// What is max(0, q) of each row, and min(0, q): sum max(q low, q high) is two chains of FMAs.
struct SplitQuery {
  const float *up, *down;  // [kRows][ldq]
  int64_t ldq;
};

// The bounds of kDotKeys pages for R rows: [page][kRows].
template <int R, class E>
[[gnu::noinline, gnu::noclone]] static void bound_pages(const SplitQuery& q,
                                                        const E* const (&low)[kDotKeys],
                                                        const E* const (&high)[kDotKeys],
                                                        int64_t dim, float* bounds) {
  VecF acc[kDotKeys * kRows]{};
  auto step = [&](const float* rows, int64_t d, const VecF(&x)[kDotKeys])
                  __attribute__((always_inline)) {
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) {
                      const VecF row = load(rows + r * q.ldq + d);
#pragma GCC unroll 4
                      for (int j = 0; j < kDotKeys; ++j)
                        acc[j * kRows + r] = fma(row, x[j], acc[j * kRows + r]);
                    }
                  };
  VecF x[kDotKeys];
  int64_t d = 0;
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_pair<0>(high[j] + d);
    step(q.up, d, x);
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_pair<1>(high[j] + d);
    step(q.up, d + kLanes, x);
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_pair<0>(low[j] + d);
    step(q.down, d, x);
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_pair<1>(low[j] + d);
    step(q.down, d + kLanes, x);
  }
  auto tail = [&]() __attribute__((always_inline)) {  // at most two vectors: see dot_keys
    if (d >= dim) return;
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_partial(high[j] + d, dim - d);
    step(q.up, d, x);
#pragma GCC unroll 4
    for (int j = 0; j < kDotKeys; ++j) x[j] = load_partial(low[j] + d, dim - d);
    step(q.down, d, x);
    d += kLanes;
  };
  tail();
  tail();
#pragma GCC unroll 2
  for (int i = 0; i < kDotKeys * kRows; i += kLanes) store(bounds + i, sum_each(acc + i));
}

// The same for one row and page by the formula itself: bounds that are not finite times 0.
template <class E>
[[gnu::noinline]] static float bound_page(const SplitQuery& q, int64_t row, const E* low,
                                          const E* high, int64_t dim) {
  VecF sum{};
  const float *up = q.up + row * q.ldq, *down = q.down + row * q.ldq;
  for (int64_t d = 0; d < dim; d += kLanes) {
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < min64(kLanes, dim - d); ++i) {
      const float x = up[d + i] + down[d + i];
      const float a = x * to_float(low[d + i]), b = x * to_float(high[d + i]);
      lanes[i] = a > b ? a : b;
    }
    sum += load(lanes);
  }
  return reduce_add(sum);
}

// Scaled rows of a KV head, in pair order and in the order of memory.
struct PageQueries {
  float* base;
  int64_t rows, ldq;  // of a KV head

  AF_INLINE_MEMBER int64_t size() const { return 4 * rows * ldq; }
  // up and down of pairs, then up and down as they lie.
  AF_INLINE_MEMBER SplitQuery of(int64_t unit, int64_t row, bool paired) const {
    const float* own = base + unit * size() + (paired ? 0 : 2 * rows * ldq) + row * ldq;
    return {own, own + rows * ldq, ldq};
  }
};

AF_INLINE PageQueries page_queries(const PageScoresParams& params) {
  const FlashProblem& p = params.problem;
  return {static_cast<float*>(params.workspace), round_up(p.seqlen_q * group_size(p), kRows),
          round_up(p.head_dim, kLanes)};
}

template <class E>
AF_INLINE void split_queries(const PageScoresParams& params, const PageQueries& queries,
                             int64_t unit) {
  const FlashProblem& p = params.problem;
  for (int64_t r = 0; r < p.seqlen_q * group_size(p); ++r) {
    const Row row = row_of(p, unit % p.heads_k, r);
    float x[kMostDim + kLanes];
    dispatch_dtype(p.q_dtype, [&](auto element) {
      const auto* src =
          row_ptr<const decltype(element)>(params.q, unit / p.heads_k, row.query, row.head);
      for (int64_t d = 0; d < p.head_dim; d += kLanes) {
        store(x + d, load_partial(src + d, p.head_dim - d) * splat(p.softmax_scale));
      }
    });
    auto write = [&](int64_t d, VecF y, bool paired) __attribute__((always_inline)) {
      const SplitQuery q = queries.of(unit, r, paired);
      store(const_cast<float*>(q.up) + d, vmax(splat(0.0f), y));
      store(const_cast<float*>(q.down) + d, splat(0.0f) - vmax(splat(0.0f), splat(0.0f) - y));
    };
    int64_t d = 0;
    for (; d + 2 * kLanes <= p.head_dim; d += 2 * kLanes) {
      VecF a = load(x + d), b = load(x + d + kLanes);
      write(d, a, false), write(d + kLanes, b, false);
      pair_up(E{}, a, b);
      write(d, a, true), write(d + kLanes, b, true);
    }
    for (; d < p.head_dim; d += kLanes) {
      write(d, load(x + d), false), write(d, load(x + d), true);
    }
  }
}

// Pages [lo, hi) of one KV head, kPageBlock at most; what follows them is asked for.
template <class E>
AF_INLINE void score_block(const PageScoresParams& params, const PageQueries& queries,
                           int64_t batch, int64_t kv_head, int64_t lo, int64_t hi, int64_t next) {
  const FlashProblem& p = params.problem;
  const int64_t rows = p.seqlen_q * group_size(p), unit = batch * p.heads_k + kv_head;
  auto row = [&](const TensorRef& bounds, int64_t page) __attribute__((always_inline)) {
    if (!params.table) return row_ptr<const E>(bounds, batch, page, kv_head);
    const int64_t own = params.table[batch * params.table_stride + page];
    return row_ptr<const E>(bounds, max64(0, min64(own, params.pages - 1)), 0, kv_head);
  };
  for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
    const int64_t count = min64(kRows, rows - r0);
    const SplitQuery q = queries.of(unit, r0, true);
    float bounds[(kPageBlock + kDotKeys) * kRows];
    for (int64_t page = lo; page < hi; page += kDotKeys) {
      const E *low[kDotKeys], *high[kDotKeys];
      for (int64_t j = 0; j < kDotKeys; ++j) {
        const int64_t own = min64(page + j, hi - 1), ahead = page + j + kPageBlock;
        low[j] = row(params.low, own), high[j] = row(params.high, own);
        if (r0 == 0 && ahead < next) {
          prefetch_row(row(params.low, ahead), p.head_dim);
          prefetch_row(row(params.high, ahead), p.head_dim);
        }
      }
      dispatch_rows(count, [&](auto r) {
        bound_pages<decltype(r)::value>(q, low, high, p.head_dim, bounds + (page - lo) * kRows);
      });
    }
    for (int64_t r = 0; r < count; ++r) {
      const Row own = row_of(p, kv_head, r0 + r);
      float* out =
          params.out + (params.grouped ? unit * p.seqlen_q + own.query
                                       : (batch * p.heads_q + own.head) * p.seqlen_q + own.query) *
                           params.columns;
      const bool first = !params.grouped || own.head == kv_head * group_size(p);
      for (int64_t page = lo; page < hi; ++page) {
        float x = bounds[(page - lo) * kRows + r];
        if (!(__builtin_fabsf(x) < kInf)) {
          x = bound_page(queries.of(unit, r0 + r, false), 0, row(params.low, page),
                         row(params.high, page), p.head_dim);
        }
        if (first || x > out[page] || x != x) out[page] = x;  // a NaN stays
      }
    }
  }
}

template <class E>
AF_INLINE void score_pages(const PageScoresParams& params, const PageQueries& queries,
                           int64_t batch, int64_t run) {
  const FlashProblem& p = params.problem;
  const int64_t used =
      params.used ? max64(0, min64(params.used[batch], params.columns)) : params.columns;
  const int64_t lo = run * kPageRun, end = min64(params.columns, lo + kPageRun),
                hi = max64(lo, min64(end, used));
  const int64_t page_stride = params.table ? params.low.batch_stride : params.low.seq_stride;
  const int64_t step = params.low.head_stride > page_stride ? kPageRun : kPageBlock;
  for (int64_t first = lo; first < hi; first += step) {
    for (int64_t head = 0; head < p.heads_k; ++head) {
      for (int64_t page = first; page < min64(hi, first + step); page += kPageBlock) {
        score_block<E>(params, queries, batch, head, page, min64(hi, page + kPageBlock), hi);
      }
    }
  }
  const int64_t rows = (params.grouped ? p.heads_k : p.heads_q) * p.seqlen_q;
  for (int64_t r = 0; r < rows && hi < end; ++r) {
    fill(params.out + (batch * rows + r) * params.columns, hi, end, -kInf);
  }
}

}  // namespace

int64_t page_scores_workspace(const PageScoresParams& params, int64_t) {
  const FlashProblem& p = params.problem;
  return page_queries(params).size() * p.batch * p.heads_k * static_cast<int64_t>(sizeof(float));
}

void page_scores(const PageScoresParams& params, const Workers& workers) {
  const FlashProblem& p = params.problem;
  const PageQueries queries = page_queries(params);
  const int64_t runs = ceil_div(params.columns, kPageRun);
  dispatch_dtype(params.bounds_dtype, [&](auto element) {
    using E = decltype(element);
    parallel_tasks(workers, p.batch * p.heads_k,
                   [&](int64_t unit, int64_t) { split_queries<E>(params, queries, unit); });
    parallel_tasks(workers, p.batch * runs, [&](int64_t task, int64_t) {
      score_pages<E>(params, queries, task / runs, task % runs);
    });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
