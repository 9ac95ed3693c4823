// Upper bounds of the logits in each page, for selection by page (Quest).
//
//   bound     the two products of page_bounds.h, by FMAs or, of int8, on matrix tiles
//   order     that of memory: where bounds of all heads of a page lie together, a task walks
//             kPageBlock pages of all heads at once, else one head after the other. The next block
//             is asked for meanwhile
//   group     with `grouped` the largest bound of the query heads of a KV head is written
//
//   bytes     2 D elements per page and KV head       flops   4 D per row and page
#include "cpu/micro/parallel.h"
#include "cpu/micro/softmax.h"
#include "cpu/tile_kernels.h"
#ifdef ATTNFORGE_BELOW
#include "cpu/retrieval/page_tiles.h"
#else
#include "cpu/retrieval/page_fma.h"
#endif

namespace attnforge::cpu {
ATTNFORGE_DECLARE_HERE
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kPageRun = 256;  // pages of a task

struct Queries {
  char* base;
  int64_t rows, dim;  // of a KV head

  AF_INLINE_MEMBER int64_t bytes() const { return round_up(BoundQueries::bytes(rows, dim), 64); }
  AF_INLINE_MEMBER BoundQueries of(int64_t unit) const {
    return BoundQueries::of(base + unit * bytes(), rows, dim);
  }
};

AF_INLINE Queries queries_of(const PageScoresParams& params) {
  const FlashProblem& p = params.problem;
  return {static_cast<char*>(params.workspace), p.seqlen_q * group_size(p), p.head_dim};
}

// Row r of a unit as fp32, zeros behind it.
AF_INLINE void load_row(const PageScoresParams& params, int64_t unit, int64_t r, float scale,
                        float* x) {
  const FlashProblem& p = params.problem;
  const Row row = row_of(p, unit % p.heads_k, r);
  dispatch_dtype(p.q_dtype, [&](auto element) {
    const auto* src =
        row_ptr<const decltype(element)>(params.q, unit / p.heads_k, row.query, row.head);
    for (int64_t d = 0; d < p.head_dim; d += kLanes)
      store(x + d, load_partial(src + d, p.head_dim - d) * splat(scale));
  });
}

// Bounds of one row: `own`, of n pages, to where they are wanted; scales of pages are 1 but with
// codes.
template <class E>
AF_INLINE void write_bounds(const PageScoresParams& params, int64_t unit, int64_t r,
                            const Pages<E, kPageBlock>& pages, const float* scales, int64_t n,
                            float* own, float* out, bool first) {
  const FlashProblem& p = params.problem;
  VecF poison{};
  for (int64_t j = 0; j < kPageBlock; j += kLanes) {
    if constexpr (kIsCode<E>) store(own + j, load(own + j) * load(scales + j));
    poison += load(own + j) * splat(0.0f);
  }
  if (reduce_add(poison) == 0.0f) {
    for (int64_t j = 0; j < n; j += kLanes) {
      const VecF x = load(own + j);  // a NaN that is there stays
      store_partial(out + j, first ? x : vmax(x, load_partial(out + j, n - j)), n - j);
    }
    return;
  }
  float q[kMostDim + kLanes];
  load_row(params, unit, r, p.softmax_scale, q);
  for (int64_t j = 0; j < n; ++j) {
    if (!(__builtin_fabsf(own[j]) < kInf))
      own[j] = bound_page(q, pages.low[j], pages.high[j], p.head_dim) * scales[j];
    if (first || own[j] > out[j] || own[j] != own[j]) out[j] = own[j];
  }
}

// Pages [lo, hi) of one KV head, kPageBlock at most; what follows them is asked for.
template <class E>
AF_INLINE void score_block(const PageScoresParams& params, const Queries& queries, int64_t batch,
                           int64_t kv_head, int64_t lo, int64_t hi, int64_t next) {
  const FlashProblem& p = params.problem;
  const int64_t unit = batch * p.heads_k + kv_head;
  auto place = [&]<class T>(T, const TensorRef& x, int64_t page) __attribute__((always_inline)) {
    if (!params.table) return row_ptr<const T>(x, batch, page, kv_head);
    const int64_t own = params.table[batch * params.table_stride + page];
    return row_ptr<const T>(x, max64(0, min64(own, params.pages - 1)), 0, kv_head);
  };
  auto row = [&](const TensorRef& bounds, int64_t page)
                 __attribute__((always_inline)) { return place(E{}, bounds, page); };
  Pages<E, kPageBlock> pages;
  float scales[kPageBlock];
  for (int64_t j = 0; j < kPageBlock; ++j) {
    const int64_t own = min64(lo + j, hi - 1), ahead = lo + j + kPageBlock;
    pages.low[j] = row(params.low, own), pages.high[j] = row(params.high, own);
    scales[j] = kIsCode<E> ? *place(float{}, params.scale, own) : 1.0f;
    if (ahead < next) {
      prefetch_row(row(params.low, ahead), p.head_dim);
      prefetch_row(row(params.high, ahead), p.head_dim);
    }
  }
  for (int64_t r0 = 0; r0 < queries.rows; r0 += kBoundRows) {
    const int64_t count = min64(kBoundRows, queries.rows - r0);
    float bounds[kBoundRows * kPageBlock] = {};
    bound_block(queries.of(unit), r0, count, pages, hi - lo, bounds);
    for (int64_t r = 0; r < count; ++r) {
      const Row own = row_of(p, kv_head, r0 + r);
      float* out =
          params.out + (params.grouped ? unit * p.seqlen_q + own.query
                                       : (batch * p.heads_q + own.head) * p.seqlen_q + own.query) *
                           params.columns;
      const bool first = !params.grouped || own.head == kv_head * group_size(p);
      write_bounds(params, unit, r0 + r, pages, scales, hi - lo, bounds + r * kPageBlock, out + lo,
                   first);
    }
  }
}

template <class E>
AF_INLINE void score_pages(const PageScoresParams& params, const Queries& queries, int64_t batch,
                           int64_t run) {
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

int64_t page_scores_workspace(const PageScoresParams& params,
                              [[maybe_unused]] int64_t num_threads) {
  AF_LEAVE_UNLESS(served_by_tiles(params), page_scores_workspace(params, num_threads));
  return queries_of(params).bytes() * params.problem.batch * params.problem.heads_k;
}

void page_scores(const PageScoresParams& params, const Workers& workers) {
  AF_LEAVE_UNLESS(served_by_tiles(params), page_scores(params, workers));
  const FlashProblem& p = params.problem;
  const Queries queries = queries_of(params);
  const int64_t runs = ceil_div(params.columns, kPageRun);
  dispatch_bounds(params, [&](auto element) {
    using E = decltype(element);
    parallel_tasks(workers, p.batch * p.heads_k, [&](int64_t unit, int64_t) {
      queries.of(unit).pack<E>(p.softmax_scale,
                               [&](int64_t r, float* x) { load_row(params, unit, r, 1.0f, x); });
    });
    parallel_tasks(workers, p.batch * runs, [&](int64_t task, int64_t) {
      score_pages<E>(params, queries, task / runs, task % runs);
    });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
