// Upper bounds of the logits in each page, for selection by page (Quest).
//
//   bound     the two products of page_bounds.h, by FMAs or, of int8, on matrix tiles
//   order     that of memory: where bounds of all heads of a page lie together, a task walks
//             kPageBlock pages of all heads at once, else pages of one head. The next block is
//             asked for meanwhile
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

constexpr int64_t kPageRun = 256, kHeadRun = 512;  // pages of a task: of all heads, of one

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

// Where one KV head's bounds of pages lie, one kind of them: in one piece, or in rows of a pool.
template <class T>
struct PageRows {
  const T* first;
  int64_t step;

  AF_INLINE_MEMBER static PageRows of(const PageScoresParams& params, const TensorRef& x,
                                      int64_t batch, int64_t kv_head) {
    if (params.table) return {row_ptr<const T>(x, 0, 0, kv_head), x.batch_stride};
    return {row_ptr<const T>(x, batch, 0, kv_head), x.seq_stride};
  }
  AF_INLINE_MEMBER const T* at(int64_t row) const { return first + row * step; }
};

template <class E>
struct HeadRows {
  const PageScoresParams& params;
  int64_t batch, head;
  PageRows<E> low, high;
  PageRows<float> scale;  // of codes

  AF_INLINE_MEMBER static HeadRows of(const PageScoresParams& params, int64_t batch, int64_t head) {
    HeadRows rows = {params,
                     batch,
                     head,
                     PageRows<E>::of(params, params.low, batch, head),
                     PageRows<E>::of(params, params.high, batch, head),
                     {}};
    if constexpr (kIsCode<E>) rows.scale = PageRows<float>::of(params, params.scale, batch, head);
    return rows;
  }
  AF_INLINE_MEMBER int64_t row(int64_t page) const {
    if (!params.table) return page;
    return max64(0, min64(params.table[batch * params.table_stride + page], params.pages - 1));
  }
};

// Pages that will be scored next, asked for a few at a time between the steps of what is scored
// now: all at once would fill the core's buffers for misses, and whatever loads would wait.
template <class E>
struct PagesSoon {
  const HeadRows<E>& rows;
  int64_t page, end;

  AF_INLINE_MEMBER void operator()(int64_t pages) {
    for (; pages > 0 && page < end; --pages, ++page) {
      const int64_t own = rows.row(page);
      const char* low = reinterpret_cast<const char*>(rows.low.at(own));
      const char* high = reinterpret_cast<const char*>(rows.high.at(own));
      const int64_t bytes = rows.params.problem.head_dim * static_cast<int64_t>(sizeof(E));
      for (int64_t b = 0; b < bytes; b += 64) {
        __builtin_prefetch(low + b);
        __builtin_prefetch(high + b);
      }
    }
  }
};

// Pages [lo, hi) of one KV head, kPageBlock at most. Those behind them, up to `next`, are asked
// for.
template <class E>
AF_INLINE void score_block(const Queries& queries, const HeadRows<E>& rows, int64_t lo, int64_t hi,
                           int64_t next) {
  const PageScoresParams& params = rows.params;
  const FlashProblem& p = params.problem;
  const int64_t unit = rows.batch * p.heads_k + rows.head;
  Pages<E, kPageBlock> pages;
  float scales[kPageBlock];
  PagesSoon<E> soon = {rows, lo + kPageBlock, min64(next, lo + 2 * kPageBlock)};
  for (int64_t j = 0; j < kPageBlock; ++j) {
    if (j % 4 == 0) soon(1);
    const int64_t own = rows.row(min64(lo + j, hi - 1));
    pages.low[j] = rows.low.at(own), pages.high[j] = rows.high.at(own);
    scales[j] = kIsCode<E> ? *rows.scale.at(own) : 1.0f;
  }
  for (int64_t r0 = 0; r0 < queries.rows; r0 += kBoundRows) {
    const int64_t count = min64(kBoundRows, queries.rows - r0);
    float bounds[kBoundRows * kPageBlock] = {};
    bound_block(queries.of(unit), r0, count, pages, hi - lo, soon, bounds);
    for (int64_t r = 0; r < count; ++r) {
      soon(2);
      const Row own = row_of(p, rows.head, r0 + r);
      float* out = params.out +
                   (params.grouped ? unit * p.seqlen_q + own.query
                                   : (rows.batch * p.heads_q + own.head) * p.seqlen_q + own.query) *
                       params.columns;
      const bool first = !params.grouped || own.head == rows.head * group_size(p);
      write_bounds(params, unit, r0 + r, pages, scales, hi - lo, bounds + r * kPageBlock, out + lo,
                   first);
    }
  }
  soon(kPageBlock);
}

// Tasks: `run` pages of `heads` heads.
struct Cut {
  int64_t heads, run, runs;
};

AF_INLINE Cut cut_of(const PageScoresParams& params) {
  const FlashProblem& p = params.problem;
  const int64_t page_stride = params.table ? params.low.batch_stride : params.low.seq_stride;
  const bool planes = params.low.head_stride > page_stride;
  const int64_t run = planes ? kHeadRun : kPageRun;
  return {planes ? 1 : p.heads_k, run, ceil_div(params.columns, run)};
}

template <class E>
AF_INLINE void score_pages(const PageScoresParams& params, const Queries& queries, const Cut& cut,
                           int64_t batch, int64_t head0, int64_t run) {
  const BoundScope scope;
  const FlashProblem& p = params.problem;
  const int64_t used =
      params.used ? max64(0, min64(params.used[batch], params.columns)) : params.columns;
  const int64_t lo = run * cut.run, end = min64(params.columns, lo + cut.run),
                hi = max64(lo, min64(end, used));
  for (int64_t page = lo; page < hi; page += kPageBlock) {
    for (int64_t head = head0; head < head0 + cut.heads; ++head) {
      score_block(queries, HeadRows<E>::of(params, batch, head), page, min64(hi, page + kPageBlock),
                  hi);
    }
  }
  const int64_t rows = (params.grouped ? 1 : group_size(p)) * p.seqlen_q;  // of a KV head
  for (int64_t r = head0 * rows; r < (head0 + cut.heads) * rows && hi < end; ++r) {
    fill(params.out + (batch * p.heads_k * rows + r) * params.columns, hi, end, -kInf);
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
  const Cut cut = cut_of(params);
  dispatch_bounds(params, [&](auto element) {
    using E = decltype(element);
    parallel_tasks(workers, p.batch * p.heads_k, [&](int64_t unit, int64_t) {
      queries.of(unit).pack<E>(p.softmax_scale,
                               [&](int64_t r, float* x) { load_row(params, unit, r, 1.0f, x); });
    });
    const int64_t parts = p.heads_k / cut.heads;
    parallel_tasks(workers, p.batch * parts * cut.runs, [&](int64_t task, int64_t) {
      const int64_t unit = task / cut.runs;
      score_pages<E>(params, queries, cut, unit / parts, unit % parts * cut.heads, task % cut.runs);
    });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
