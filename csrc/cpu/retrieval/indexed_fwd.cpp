// Attention to listed keys, forward: decode over gathered rows.
//
//   lists      first every list is reduced to what it sees: keys in use, one copy per KV head.
//              Query heads with lists of their own are merged to a union with a bias per head, so
//              that a row of K and V is gathered once for all of them
//   split      kSplitEntries entries of a KV head are a task, as in decode; the partial results are
//              merged in ascending order. Ragged lists balance, since tasks are taken one by one
//   rows       up to kRowBlock rows go over a split together; more rows than that do not split
//   gather     the next chunk's rows are prefetched while one is computed: their addresses are
//              known, unlike those of a walk. First a line of each: rows of [B, S, H, D] lie two to
//              a memory page, and walks of the page tables that are asked for together run side by
//              side, while a product between two of them makes them wait for each other
//   tiles      bf16 rows that lie near each other, on a level of matrix tiles: indexed_tiles.h
//   bytes      (D + Dv) * entries of the union * element size: what bounds decode
//
// A row of a union is -inf at keys of other heads. A value there may be NaN or infinite, and
// 0 * NaN is NaN: a split whose result is not finite is computed anew, each row over its own keys.
#include "cpu/flash/operands.h"
#include "cpu/retrieval/indexed_layout.h"
#include "cpu/tile_kernels.h"
#ifdef ATTNFORGE_BELOW
#include "cpu/retrieval/indexed_tiles.h"
#endif

namespace attnforge::cpu {
ATTNFORGE_DECLARE_HERE
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

AF_INLINE int64_t place_room(Room& room, const Layout& y, int64_t threads, char* base) {
  Arena one{nullptr};
  take_gathered(one, y);
  room.gathered = base, room.gathered_bytes = one.used;
  room.partials = {base + one.used * y.units, y.rows, y.ldo, y.splits};
  room.scratch = room.partials.base + room.partials.bytes() * y.units * y.splits;
  Arena scratch{nullptr};
  scratch.take<float>(kRowBlock * y.ldq);
#ifdef ATTNFORGE_BELOW
  take_list_tiles(scratch, y.ldq, y.ldo);
#endif
  room.scratch_bytes = scratch.used;
  return room.scratch - base + scratch.used * threads;
}

// A line of every row that will be walked.
template <class T>
AF_INLINE void touch(const RowsAhead<T>& ahead) {
  for (int64_t j = 0; j < ahead.keys; ++j) __builtin_prefetch(ahead.rows + ahead.at[j], 0, 2);
}

// ---- tasks ----

// Four rows of a unit and their results.
struct Four {
  int64_t first, rows;  // of the unit
  const float* q;
  float *m, *l, *o;
};

// Adds the biases of n entries to scores [key][kRows]; what a row does not list becomes -inf,
// whatever the score is.
AF_INLINE void add_bias(const Layout& y, const Four& four, int64_t q_len, const float* bias,
                        int64_t n, float* s) {
  if (!y.united) {
    for (int64_t c = 0; c < n; ++c) store4(s + c * kRows, load4(s + c * kRows) + bias[c]);
    return;
  }
  int64_t head[kRows] = {};
  for (int64_t r = 0; r < four.rows; ++r) head[r] = (four.first + r) / q_len;
  for (int64_t c = 0; c < n; ++c) {
    const float* own = bias + c * y.group;
    const Vec4 added = {own[head[0]], own[head[1]], own[head[2]], own[head[3]]};
    const Vec4 hidden = {-kInf, -kInf, -kInf, -kInf};
    store4(s + c * kRows, added == hidden ? hidden : load4(s + c * kRows) + added);
  }
}

// each: every row over its own keys alone.
template <class T>
AF_INLINE void attend_chunk(const FlashProblem& p, const Layout& y, const Four& four,
                            const PageKeys<T>& keys, const float* bias, int64_t n, bool biased,
                            Ahead<T>& ahead, bool each) {
  float s[(kMaxChunk + kLanes) * kRows], alpha[kRows];
  dispatch_rows(four.rows, [&](auto r) {
    scores<decltype(r)::value>(four.q, y.ldq, keys, n, p.head_dim, &ahead.k, s);
  });
  if (biased) add_bias(y, four, p.seqlen_q, bias, n, s);
  softmax_group(s, n, four.m, four.l, alpha);
  for (int64_t r = 0; r < four.rows; ++r) {
    if (alpha[r] == 1.0f) continue;
    float* o = four.o + r * y.ldo;
    for (int64_t d = 0; d < y.ldo; d += kLanes) store(o + d, load(o + d) * splat(alpha[r]));
  }
  if (!each) {
    dispatch_rows(four.rows, [&](auto r) {
      weigh<decltype(r)::value>(s, keys, n, p.v_head_dim, &ahead.v, four.o, y.ldo);
    });
    return;
  }
  for (int64_t r = 0; r < four.rows; ++r) {
    const int64_t head = (four.first + r) / p.seqlen_q;
    PageKeys<T> one = keys;
    for (int64_t c = 0; c < n; ++c, one.skip(1)) {
      if (bias[c * y.group + head] == -kInf) continue;
      weigh<1>(s + c * kRows + r, one, 1, p.v_head_dim, nullptr, four.o + r * y.ldo, y.ldo);
    }
  }
}

AF_INLINE bool all_finite(const float* x, int64_t n) {
  VecF poison{};
  for (int64_t i = 0; i < n; i += kLanes) poison += load(x + i) * splat(0.0f);
  return reduce_add(poison) == 0.0f;
}

// Rows [row0, row0 + rows) of a unit over entries [lo, hi) of it.
template <class T>
AF_INLINE void run_entries(const IndexedFwdParams& params, const Layout& y, const Gathered& g,
                           int64_t unit, int64_t row0, int64_t rows, int64_t lo, int64_t hi,
                           const Partial& part, const float* q, bool each) {
  const FlashProblem& p = params.flash.problem;
  const int64_t batch = unit / p.heads_k, head = unit % p.heads_k;
  const Rows<T> kv{params};
  const int64_t width = y.united ? y.group : 1;
  const bool biased = y.united || params.lists.log_bias;
  for (int64_t r = row0; r < row0 + rows; ++r) part.m[r] = -kInf, part.l[r] = part.z[r] = 0.0f;
  fill(part.o, row0 * y.ldo, (row0 + rows) * y.ldo, 0.0f);
  int64_t k_at[2][kMaxChunk], v_at[2][kMaxChunk], here = 0;
  PageKeys<T> keys = kv.keys(batch, head);
  auto rows_at = [&](int64_t place, int64_t n) {
    Ahead<T> ahead = {{keys.k, k_at[place], kv.k_stride(), 0, p.head_dim, 1},
                      {keys.v, v_at[place], kv.v_stride(), 0, p.v_head_dim, 1}};
    ahead.begin(n);
    ahead.allow(0, 1);
    return ahead;
  };
  if (lo < hi) {
    const int64_t n = min64(y.chunk, hi - lo);
    kv.locate(batch, g.keys + lo, n, k_at[0], v_at[0]);
    auto start = rows_at(0, n);
    start.finish();
  }
  for (int64_t e = lo; e < hi; e += y.chunk, here ^= 1) {
    const int64_t n = min64(y.chunk, hi - e), next = min64(y.chunk, hi - e - n);
    keys.k_at = k_at[here], keys.v_at = v_at[here];
    Ahead<T> ahead{};
    if (next > 0) {
      kv.locate(batch, g.keys + e + n, next, k_at[here ^ 1], v_at[here ^ 1]);
      ahead = rows_at(here ^ 1, next);
      touch(ahead.k), touch(ahead.v);
    }
    for (int64_t r = row0; r < row0 + rows; r += kRows) {
      const Four four = {r,
                         min64(kRows, row0 + rows - r),
                         q + (r - row0) * y.ldq,
                         part.m + r,
                         part.l + r,
                         part.o + r * y.ldo};
      attend_chunk(p, y, four, keys, g.bias + e * width, n, biased, ahead, each);
    }
  }
}

template <class T>
AF_INLINE void run_task(const IndexedFwdParams& params, const Layout& y, const Room& room,
                        int64_t unit, int64_t split, int64_t block, int64_t worker) {
  const FlashProblem& p = params.flash.problem;
  const Gathered g = gathered_of(room, y, unit);
  const int64_t lo = split * y.split, hi = min64(*g.count, lo + y.split);
  if (split > 0 && lo >= hi) return;
  const Partial part = room.partials.at(unit, split);
  const Sequence seq = sequence(p, unit / p.heads_k);
  const int64_t row0 = block * kRowBlock;
  const int64_t rows = min64(kRowBlock, p.seqlen_q * y.group - row0);
  Arena scratch{room.scratch + worker * room.scratch_bytes};
  float* q = scratch.take<float>(kRowBlock * y.ldq);
  auto load_rows = [&] {
    const float scale = score_map(p).q_scale;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = unit % p.heads_k * y.group + (row0 + r) / p.seqlen_q;
      load_query<T>(params.flash, seq, head, (row0 + r) % p.seqlen_q, scale, nullptr,
                    q + r * y.ldq);
    }
  };
#ifdef ATTNFORGE_BELOW
  run_entries_on_tiles(params, y, g, unit, row0, rows, lo, hi, part,
                       take_list_tiles(scratch, p.head_dim, p.v_head_dim));
#else
  load_rows();
  run_entries<T>(params, y, g, unit, row0, rows, lo, hi, part, q, false);
#endif
  if ((Operands::kTiles || y.united) && !all_finite(part.o + row0 * y.ldo, rows * y.ldo)) {
    load_rows();
    run_entries<T>(params, y, g, unit, row0, rows, lo, hi, part, q, y.united);
  }
}

AF_INLINE void gather_unit(const IndexedFwdParams& params, const Layout& y, int64_t unit,
                           const Gathered& g) {
  const FlashProblem& p = params.flash.problem;
  const int64_t batch = unit / p.heads_k, head = unit % p.heads_k;
  const int64_t keys = sequence(p, batch).k_len;
  if (y.united) {
    *g.count = unite(params.lists, batch, head * y.group, y.group, keys, g);
    return;
  }
  int64_t count = 0;
  const List list = list_of(params.lists, batch, shared_list(p, params.lists, head));
  for_entries(list, keys, [&](int64_t, int64_t key, float bias) {
    g.keys[count] = static_cast<int32_t>(key);
    g.bias[count++] = bias * kLog2E;
  });
  *g.count = count;
}

template <class T>
AF_INLINE void run_indexed(const IndexedFwdParams& params, const Workers& workers) {
  const FlashProblem& p = params.flash.problem;
  const Layout y = make_layout(params, sizeof(T));
  Room room;
  place_room(room, y, workers.num_threads, static_cast<char*>(params.flash.workspace));
  parallel_tasks(workers, y.units, [&](int64_t unit, int64_t) {
    gather_unit(params, y, unit, gathered_of(room, y, unit));
  });
  int64_t longest = 0;
  for (int64_t u = 0; u < y.units; ++u) longest = max64(longest, *gathered_of(room, y, u).count);
  const int64_t splits = max64(1, ceil_div(longest, y.split));
  parallel_tasks(workers, y.units * splits * y.blocks, [&](int64_t task, int64_t worker) {
    const int64_t block = task % y.blocks, unit = task / y.blocks % y.units;
    run_task<T>(params, y, room, unit, task / y.blocks / y.units, block, worker);
  });
  const DenseStore<T> plain{params.flash.k, params.flash.v};
  parallel_tasks(workers, y.units, [&](int64_t unit, int64_t) {
    const Sequence seq = sequence(p, unit / p.heads_k);
    const int64_t used = max64(1, ceil_div(*gathered_of(room, y, unit).count, y.split));
    merge_rows(room.partials, unit, used, p.seqlen_q * y.group,
               [&](int64_t r, float m, float l, float z, float* o) {
                 const int64_t head = unit % p.heads_k * y.group + r / p.seqlen_q;
                 finish_row(params.flash, plain, seq, head, r % p.seqlen_q, m, l, z, o);
               });
  });
}

#ifdef ATTNFORGE_BELOW
// Rows that lie further apart are fetched better between the FMAs of the level below. Measured were
// rows 256 bytes apart, 0.75 of its time, and 2 KiB apart, 1.1 to 1.5; the limit is between them.
constexpr int64_t kNearBytes = 1024;

AF_INLINE bool served_here(const IndexedFwdParams& params) {
  const FlashProblem& p = params.flash.problem;
  const Rows<BFloat16> kv{params};
  return served_by_tiles(p) && score_map(p).q_scale > 0.0f &&
         max64(kv.k_stride(), kv.v_stride()) * 2 <= kNearBytes;
}
#endif

}  // namespace

int64_t indexed_fwd_workspace(const IndexedFwdParams& params, int64_t num_threads) {
  AF_LEAVE_UNLESS(served_here(params), indexed_fwd_workspace(params, num_threads));
  Room room;
  const Layout y = make_layout(params, item_size(params.flash.problem.dtype));
  return place_room(room, y, num_threads, nullptr);
}

void indexed_fwd(const IndexedFwdParams& params, const Workers& workers) {
  AF_LEAVE_UNLESS(served_here(params), indexed_fwd(params, workers));
  dispatch_plain_operands(params.flash.problem.dtype,
                          [&](auto element) { run_indexed<decltype(element)>(params, workers); });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
