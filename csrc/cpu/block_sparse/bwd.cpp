// Block-sparse attention, backward.
//
// Algorithm: as flash's (cpu/flash/bwd.cpp), key-block-major over inverse lists. For each key
// block, the rows that name it are gathered, 96 at a time, ascending, over all heads of the KV
// head:
//   P = 2^(S - LSE)    dP = dO V^T    dS = P * (dP - delta) [* (1 - tanh^2) under a softcap]
//   dV += P^T dO       dK += dS^T Q   dQ[row] += dS K
// A block that nobody names has dK = dV = 0.
//
//   phases     1  delta of every row; the inverse of every list head
//              and for each band of queries
//              2  per (batch, KV head, chunk): its key blocks; dQ goes to the chunk's fp32 slab
//              3  per row: the slabs summed in chunk order, scaled, rounded
//   chunks     key blocks are dealt round-robin to ceil(kChunksWanted / KV heads) chunks: the same
//              sums for any number of threads and any batch. No atomics
//   bands      as many queries as slabs of kSlabBytes take: the slabs stay in cache. dK and dV wait
//              between bands in fp32; their chains of FMAs are those of one band
//   tile       96 rows x 128 keys (64 when D > 96)
//   flops      5 products: 6 D + 4 Dv per row and listed key
//   memory     per wave of heads: slabs of one band, dK and dV in fp32; the inverse lists, as large
//              as the lists
#include "cpu/block_sparse/lists.h"
#include "cpu/kernels.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/softmax.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kBatchRows = 96;
constexpr int64_t kMaxSpan = 128;
constexpr int64_t kLds = kMaxSpan + 16;  // of S and dP, off the power of two
constexpr int64_t kLda = 256 + 16;       // of gathered Q and dO: D and Dv up to 256
constexpr int64_t kChunksWanted = 8;
constexpr int64_t kSlabBytes = 16 << 20;  // of a (batch, KV head)
constexpr int64_t kWaveBytes = 32 << 20;
constexpr int64_t kRowsPerTask = 64;

struct Plan {
  Units units;
  int64_t group;
  int64_t blocks;  // of the longest sequence
  int64_t span;
  int64_t chunks, slots;
  int64_t band, bands;  // queries of a band, a multiple of q_block
  int64_t ldd, ldv;
};

AF_INLINE int64_t slab_floats(const Plan& plan) {
  return plan.group * plan.band * plan.ldd;
}

// dK and dV of a (batch, KV head) between bands.
AF_INLINE int64_t sum_floats(const Plan& plan, const FlashProblem& p) {
  return plan.bands > 1 ? p.seqlen_k * (plan.ldd + plan.ldv) : 0;
}

AF_INLINE Plan make_plan(const BlockSparseBwdParams& params, int64_t threads) {
  const FlashProblem& p = params.flash.problem;
  Plan plan;
  plan.units = units_of(p, params.selection);
  plan.group = group_size(p);
  plan.blocks = max64(1, ceil_div(p.seqlen_k, params.selection.kv_block));
  plan.span = p.head_dim > 96 ? 64 : kMaxSpan;
  plan.chunks = max64(1, min64(plan.blocks, ceil_div(kChunksWanted, p.heads_k)));
  plan.ldd = padded_columns(p.head_dim);
  plan.ldv = padded_columns(p.v_head_dim);
  const int64_t q_block = params.selection.q_block;
  const int64_t fit = kSlabBytes / (plan.chunks * plan.group * plan.ldd * 4);
  plan.band = max64(1, min64(fit, p.seqlen_q + q_block - 1) / q_block) * q_block;
  plan.bands = max64(1, ceil_div(p.seqlen_q, plan.band));
  const int64_t bytes = (plan.chunks * slab_floats(plan) + sum_floats(plan, p)) * 4;
  const int64_t enough = ceil_div(2 * threads, plan.chunks);
  plan.slots = max64(1, min64(p.batch * p.heads_k, max64(enough, kWaveBytes / bytes)));
  return plan;
}

AF_INLINE Inverse take_lists(Arena& a, const BlockSparseBwdParams& params, const Plan& plan) {
  const SelectionRef& s = params.selection;
  return take_inverse(a, plan.blocks, ceil_div(params.flash.problem.seqlen_q, s.q_block), s.slots);
}

// One worker's key block and gathered rows.
struct Scratch {
  float *k_panels, *k_columns, *v_panels;  // K^T, K and V^T operands
  float *dk, *dv;                          // [kMaxSpan + kMR][ldd], [..][ldv]
  float *q, *dout;                         // [kBatchRows][kLda], q scaled for base-2 logits
  float *q_panels, *do_panels;             // column panels, q scaled for dK
  float *s, *dp, *slope;                   // [kBatchRows][kLds]; slope under a softcap
  float* dq;                               // [kBatchRows][kNR]
  int64_t *heads, *queries;                // of the gathered rows
  bool k_finite, rows_finite;
};

AF_INLINE Scratch take_scratch(Arena& a, const FlashProblem& p, const Plan& plan) {
  Scratch s{};
  s.k_panels = a.take<float>(kMaxSpan * p.head_dim);
  s.k_columns = a.take<float>(kMaxSpan * plan.ldd);
  s.v_panels = a.take<float>(kMaxSpan * p.v_head_dim);
  s.dk = a.take<float>((kMaxSpan + kMR) * plan.ldd);
  s.dv = a.take<float>((kMaxSpan + kMR) * plan.ldv);
  s.q = a.take<float>(kBatchRows * kLda);
  s.dout = a.take<float>(kBatchRows * kLda);
  s.q_panels = a.take<float>(kBatchRows * plan.ldd);
  s.do_panels = a.take<float>(kBatchRows * plan.ldv);
  s.s = a.take<float>(kBatchRows * kLds + kMR);
  s.dp = a.take<float>(kBatchRows * kLds + kMR);
  s.slope = a.take<float>(p.softcap > 0.0f ? kBatchRows * kLds : 0);
  s.dq = a.take<float>(kBatchRows * kNR);
  s.heads = a.take<int64_t>(kBatchRows);
  s.queries = a.take<int64_t>(kBatchRows);
  return s;
}

// Phase 1: delta of rows [i0, i1) of one head.
template <class T>
AF_INLINE void row_deltas(const FlashBwdParams& f, const Sequence& seq, int64_t head, int64_t i0,
                          int64_t i1) {
  for (int64_t i = i0; i < i1; ++i) {
    const int64_t row = seq.q_row + i;
    const T* lo = f.out_lo.data ? row_ptr<const T>(f.out_lo, seq.batch, row, head) : nullptr;
    float delta =
        dot_residue(row_ptr<const T>(f.dout, seq.batch, row, head),
                    row_ptr<const T>(f.out, seq.batch, row, head), lo, f.problem.v_head_dim);
    if (f.dlse.data) delta -= *stat_ptr(f.dlse, seq, head, i);
    *stat_ptr(f.delta, seq, head, i) = delta;
  }
}

// One (batch, KV head, span of keys) and band of phase 2.
struct Step {
  const BlockSparseBwdParams& params;
  const Plan& plan;
  const Sequence& seq;
  const ScoreMap& map;
  int64_t kv_head;
  int64_t key0, keys;
  int64_t band;
  float* slab;  // [group][plan.band][ldd]

  AF_INLINE_MEMBER float* dq_row(int64_t head, int64_t i) const {
    const int64_t row = i - band * plan.band;
    return slab + ((head - kv_head * plan.group) * plan.band + row) * plan.ldd;
  }
};

template <class T>
AF_INLINE void pack_span(const Step& t, Scratch& w) {
  const FlashBwdParams& f = t.params.flash;
  const FlashProblem& p = f.problem;
  const T* k = row_ptr<const T>(f.k, t.seq.batch, t.seq.k_row + t.key0, t.kv_head);
  const T* v = row_ptr<const T>(f.v, t.seq.batch, t.seq.k_row + t.key0, t.kv_head);
  for (int64_t c = 0; c < t.keys; c += kNR) {
    pack_key_panel(k + c * f.k.seq_stride, f.k.seq_stride, t.keys - c, p.head_dim,
                   w.k_panels + c * p.head_dim);
    pack_key_panel(v + c * f.v.seq_stride, f.v.seq_stride, t.keys - c, p.v_head_dim,
                   w.v_panels + c * p.v_head_dim);
  }
  w.k_finite =
      pack_column_panels(k, f.k.seq_stride, t.keys, p.head_dim, 1.0f, w.k_columns, kMaxSpan * kNR);
  w.rows_finite = true;
}

// dK and dV of the span as the bands before have left them: sums [seqlen_k][ldd], [seqlen_k][ldv].
AF_INLINE void begin_sums(const Step& t, const Scratch& w, const float* sums) {
  const Plan& plan = t.plan;
  fill(w.dk, 0, (t.keys + kMR) * plan.ldd, 0.0f);
  fill(w.dv, 0, (t.keys + kMR) * plan.ldv, 0.0f);
  if (t.band == 0) return;
  const float* dv = sums + t.params.flash.problem.seqlen_k * plan.ldd;
  __builtin_memcpy(w.dk, sums + t.key0 * plan.ldd, t.keys * plan.ldd * sizeof(float));
  __builtin_memcpy(w.dv, dv + t.key0 * plan.ldv, t.keys * plan.ldv * sizeof(float));
}

// And how they go on, or out.
template <class T>
AF_INLINE void end_sums(const Step& t, const Scratch& w, float* sums) {
  const Plan& plan = t.plan;
  const FlashBwdParams& f = t.params.flash;
  const FlashProblem& p = f.problem;
  if (t.band + 1 < plan.bands) {
    float* dv = sums + p.seqlen_k * plan.ldd;
    __builtin_memcpy(sums + t.key0 * plan.ldd, w.dk, t.keys * plan.ldd * sizeof(float));
    __builtin_memcpy(dv + t.key0 * plan.ldv, w.dv, t.keys * plan.ldv * sizeof(float));
    return;
  }
  for (int64_t c = 0; c < t.keys; ++c) {
    const int64_t row = t.seq.k_row + t.key0 + c;
    store_output<T>(w.dk + c * plan.ldd, 1.0f, p.head_dim,
                    row_ptr<T>(f.dk, t.seq.batch, row, t.kv_head), nullptr);
    store_output<T>(w.dv + c * plan.ldv, 1.0f, p.v_head_dim,
                    row_ptr<T>(f.dv, t.seq.batch, row, t.kv_head), nullptr);
  }
}

template <class T>
AF_INLINE void gather_row(const Step& t, Scratch& w, int64_t n, int64_t head, int64_t i) {
  const FlashBwdParams& f = t.params.flash;
  const FlashProblem& p = f.problem;
  const T* q = row_ptr<const T>(f.q, t.seq.batch, t.seq.q_row + i, head);
  const T* dout = row_ptr<const T>(f.dout, t.seq.batch, t.seq.q_row + i, head);
  for (int64_t d = 0; d < p.head_dim; d += kLanes)
    store(w.q + n * kLda + d, load_partial(q + d, p.head_dim - d) * splat(t.map.q_scale));
  for (int64_t d = 0; d < p.v_head_dim; d += kLanes)
    store(w.dout + n * kLda + d, load_partial(dout + d, p.v_head_dim - d));
  w.rows_finite &= pack_column_panels(q, 0, 1, p.head_dim, p.softmax_scale, w.q_panels + n * kNR,
                                      kBatchRows * kNR);
  w.rows_finite &=
      pack_column_panels(dout, 0, 1, p.v_head_dim, 1.0f, w.do_panels + n * kNR, kBatchRows * kNR);
  w.heads[n] = head, w.queries[n] = i;
}

// The keys of the span that gathered row n sees, from the span's first.
AF_INLINE Interval seen_keys(const Step& t, const Scratch& w, int64_t n) {
  const Interval keys = visible_keys(t.params.flash.problem, t.seq, w.heads[n], w.queries[n]);
  const int64_t lo = max64(0, keys.lo - t.key0);
  return {lo, max64(lo, min64(t.keys, keys.hi - t.key0))};
}

// S and dP of gathered row n become P and dS. Returns whether the row sees the span whole.
AF_INLINE bool differentiate_row(const Step& t, const Scratch& w, int64_t n, int64_t width) {
  const FlashBwdParams& f = t.params.flash;
  const FlashProblem& p = f.problem;
  float *s = w.s + n * kLds, *dp = w.dp + n * kLds;
  const int64_t head = w.heads[n], i = w.queries[n];
  const float* slope = nullptr;
  if (t.map.cap2 > 0.0f) {
    apply_softcap_with_slope(s, width, t.map.cap2, w.slope + n * kLds);
    slope = w.slope + n * kLds;
  }
  if (p.alibi_slopes)
    add_alibi(s, width, alibi_slope2(p, t.seq.batch, head), i + t.seq.offset - t.key0);
  softmax_row_backward(s, dp, width, *stat_ptr(f.lse, t.seq, head, i) * kLog2E,
                       *stat_ptr(f.delta, t.seq, head, i), slope);
  const Interval seen = seen_keys(t, w, n);
  if (seen.lo == 0 && seen.hi == width) return true;
  mask_row(s, width, seen.lo, seen.hi, 0.0f);
  mask_row(dp, width, seen.lo, seen.hi, 0.0f);
  return seen.lo == 0 && seen.hi == t.keys;
}

AF_INLINE void add_to_row(const Step& t, const Scratch& w, int64_t n, int64_t d, VecF x0, VecF x1) {
  float* dq = t.dq_row(w.heads[n], w.queries[n]) + d;
  store(dq, load(dq) + x0);
  store(dq + kLanes, load(dq + kLanes) + x1);
}

// The three sums over visible pairs only: where an operand holds NaN or infinity.
AF_INLINE void accumulate_pairs(const Step& t, const Scratch& w, int64_t count) {
  const FlashProblem& p = t.params.flash.problem;
  for (int64_t n = 0; n < count; ++n) {
    const Interval seen = seen_keys(t, w, n);
    for (int64_t c = seen.lo; c < seen.hi; ++c) {
      const float prob = w.s[n * kLds + c], ds = w.dp[n * kLds + c];
      axpy_panels(prob, w.do_panels + n * kNR, kBatchRows * kNR, p.v_head_dim,
                  w.dv + c * t.plan.ldv);
      axpy_panels(ds, w.q_panels + n * kNR, kBatchRows * kNR, p.head_dim, w.dk + c * t.plan.ldd);
    }
    for (int64_t d = 0; d < t.plan.ldd; d += kNR) {
      VecF sum0{}, sum1{};
      for (int64_t c = seen.lo; c < seen.hi; ++c) {
        const float* k = w.k_columns + d * kMaxSpan + c * kNR;
        sum0 = fma(splat(w.dp[n * kLds + c]), load(k), sum0);
        sum1 = fma(splat(w.dp[n * kLds + c]), load(k + kLanes), sum1);
      }
      add_to_row(t, w, n, d, sum0, sum1);
    }
  }
}

// `count` gathered rows against the span.
AF_INLINE void run_rows(const Step& t, Scratch& w, int64_t count) {
  const FlashProblem& p = t.params.flash.problem;
  const int64_t d = p.head_dim, dv = p.v_head_dim, width = round_up(t.keys, kNR);
  gemm<kLda, 1>(count, vectors_of(width), d, w.q, kLda, w.k_panels, d * kNR, w.s, kLds, false);
  gemm<kLda, 1>(count, vectors_of(width), dv, w.dout, kLda, w.v_panels, dv * kNR, w.dp, kLds,
                false);
  bool whole = true;
  for (int64_t n = 0; n < count; ++n) whole &= differentiate_row(t, w, n, width);
  const bool finite = w.k_finite && w.rows_finite;
  w.rows_finite = true;
  if (!whole && !finite) return accumulate_pairs(t, w, count);
  gemm<1, kLds>(t.keys, vectors_of(dv), count, w.s, 1, w.do_panels, kBatchRows * kNR, w.dv,
                t.plan.ldv, true);
  gemm<1, kLds>(t.keys, vectors_of(d), count, w.dp, 1, w.q_panels, kBatchRows * kNR, w.dk,
                t.plan.ldd, true);
  for (int64_t c = 0; c < d; c += kNR) {
    gemm<kLds, 1>(count, 2, t.keys, w.dp, kLds, w.k_columns + c * kMaxSpan, 0, w.dq, kNR, false);
    for (int64_t n = 0; n < count; ++n)
      add_to_row(t, w, n, c, load(w.dq + n * kNR), load(w.dq + n * kNR + kLanes));
  }
}

// List rows [row0, row1) of a block: a part of what names it, as rows ascend.
struct Items {
  const int32_t *begin, *end;
};

AF_INLINE const int32_t* first_from(const int32_t* begin, const int32_t* end, int64_t row) {
  while (begin < end) {
    const int32_t* middle = begin + (end - begin) / 2;
    if (*middle < row) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

AF_INLINE Items items_of(const Inverse& inverse, int64_t id, int64_t row0, int64_t row1) {
  const int32_t* end = inverse.items + inverse.start[id + 1];
  const int32_t* begin = first_from(inverse.items + inverse.start[id], end, row0);
  return {begin, first_from(begin, end, row1)};
}

// Where a task of phase 2 works.
struct Work {
  const BlockSparseBwdParams& params;
  const Plan& plan;
  const Sequence& seq;
  int64_t kv_head, band;
  const Inverse* inverses;  // of the sequence
  float *slab, *sums;
};

// Phase 2: one block of keys and one band, span by span.
template <class T>
AF_INLINE void run_block(const Work& work, int64_t id, Scratch& w) {
  const BlockSparseBwdParams& params = work.params;
  const Plan& plan = work.plan;
  const Sequence& seq = work.seq;
  const FlashProblem& p = params.flash.problem;
  const SelectionRef& s = params.selection;
  const ScoreMap map = score_map(p);
  const int64_t end = min64((id + 1) * s.kv_block, seq.k_len);
  const int64_t units = plan.units.count / p.heads_k;  // of this KV head
  const int64_t row0 = work.band * plan.band / s.q_block, row1 = row0 + plan.band / s.q_block;
  auto items = [&](int64_t unit) __attribute__((always_inline)) {
    const int64_t list = plan.units.list_head(s, work.kv_head * units + unit);
    return items_of(work.inverses[list], id, row0, row1);
  };
  bool named = work.band == 0 || work.band + 1 == plan.bands;  // sums begin, or go out
  for (int64_t unit = 0; unit < units && !named; ++unit) {
    const Items own = items(unit);
    named = own.begin < own.end;
  }
  if (!named) return;
  for (int64_t key0 = id * s.kv_block; key0 < end; key0 += plan.span) {
    const Step t = {params,    plan,     seq, map, work.kv_head, key0, min64(plan.span, end - key0),
                    work.band, work.slab};
    pack_span<T>(t, w);
    begin_sums(t, w, work.sums);
    int64_t count = 0;
    auto flush = [&]() {
      if (count > 0) run_rows(t, w, count);
      count = 0;
    };
    for (int64_t unit = 0; unit < units; ++unit) {
      const Items own = items(unit);
      for (const int32_t* item = own.begin; item < own.end; ++item) {
        const int64_t i0 = *item * s.q_block;
        for (int64_t i = i0; i < min64(i0 + s.q_block, seq.q_len); ++i) {
          for (int64_t h = 0; h < plan.units.heads; ++h) {
            const int64_t head = (work.kv_head * units + unit) * plan.units.heads + h;
            const Interval keys = visible_keys(p, seq, head, i);
            if (keys.lo >= key0 + t.keys || keys.hi <= key0) continue;
            gather_row<T>(t, w, count, head, i);
            if (++count == kBatchRows) flush();
          }
        }
      }
    }
    flush();
    end_sums<T>(t, w, work.sums);
  }
}

// Keys that exist in memory behind k_len: zero gradients.
template <class T>
AF_INLINE void zero_keys(const FlashBwdParams& f, const Plan& plan, const Sequence& seq,
                         int64_t kv_head, const Scratch& w) {
  const FlashProblem& p = f.problem;
  fill(w.dk, 0, plan.ldd, 0.0f);
  fill(w.dv, 0, plan.ldv, 0.0f);
  for (int64_t key = seq.k_len; key < seq.k_rows; ++key) {
    const int64_t row = seq.k_row + key;
    store_output<T>(w.dk, 1.0f, p.head_dim, row_ptr<T>(f.dk, seq.batch, row, kv_head), nullptr);
    store_output<T>(w.dv, 1.0f, p.v_head_dim, row_ptr<T>(f.dv, seq.batch, row, kv_head), nullptr);
  }
}

// Phase 3: dQ of row i of all heads of a KV head; slabs of its band.
template <class T>
AF_INLINE void finish_row(const FlashBwdParams& f, const Plan& plan, const Sequence& seq,
                          int64_t kv_head, int64_t i, float* slabs) {
  const FlashProblem& p = f.problem;
  for (int64_t h = 0; h < plan.group; ++h) {
    float* sum = slabs + (h * plan.band + i % plan.band) * plan.ldd;
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
      const float* part = sum + chunk * slab_floats(plan);
      for (int64_t d = 0; d < plan.ldd; d += kLanes) store(sum + d, load(sum + d) + load(part + d));
    }
    store_output<T>(sum, p.softmax_scale, p.head_dim,
                    row_ptr<T>(f.dq, seq.batch, seq.q_row + i, kv_head * plan.group + h), nullptr);
  }
}

template <class T>
AF_INLINE void run(const BlockSparseBwdParams& params, const Workers& workers) {
  const FlashBwdParams& f = params.flash;
  const FlashProblem& p = f.problem;
  const SelectionRef& s = params.selection;
  const Plan plan = make_plan(params, workers.num_threads);
  Arena arena{static_cast<char*>(f.workspace)};
  char* scratch = arena.base;
  take_scratch(arena, p, plan);
  const int64_t scratch_bytes = arena.used;
  arena.used *= workers.num_threads;
  Inverse* inverses = arena.take<Inverse>(p.batch * s.heads);
  for (int64_t n = 0; n < p.batch * s.heads; ++n) inverses[n] = take_lists(arena, params, plan);
  float* slabs = reinterpret_cast<float*>(arena.base + arena.used);
  float* sums = slabs + plan.slots * plan.chunks * slab_floats(plan);

  parallel_tasks(workers, p.batch * s.heads, [&](int64_t task, int64_t) {
    const Sequence seq = sequence(p, task / s.heads);
    const Lists lists = lists_of(p, s, seq);
    invert(lists, task % s.heads, 0, lists.rows, inverses[task]);
  });
  const int64_t pieces = max64(1, ceil_div(p.seqlen_q, kRowsPerTask));
  parallel_tasks(workers, p.batch * p.heads_q * pieces, [&](int64_t task, int64_t) {
    const int64_t i0 = task % pieces * kRowsPerTask, pair = task / pieces;
    const Sequence seq = sequence(p, pair / p.heads_q);
    row_deltas<T>(f, seq, pair % p.heads_q, i0, min64(seq.q_len, i0 + kRowsPerTask));
  });
  const int64_t pairs = p.batch * p.heads_k, slab = slab_floats(plan);
  const int64_t rows = min64(kRowsPerTask, plan.band), parts = ceil_div(plan.band, rows);
  for (int64_t pair0 = 0; pair0 < pairs; pair0 += plan.slots) {
    const int64_t slots = min64(plan.slots, pairs - pair0);
    for (int64_t band = 0; band < plan.bands; ++band) {
      parallel_tasks(workers, slots * plan.chunks, [&](int64_t task, int64_t worker) {
        const int64_t slot = task / plan.chunks, chunk = task % plan.chunks, pair = pair0 + slot;
        const int64_t batch = pair / p.heads_k, kv_head = pair % p.heads_k;
        const Sequence seq = sequence(p, batch);
        Arena a{scratch + worker * scratch_bytes};
        Scratch w = take_scratch(a, p, plan);
        const Work work = {params,
                           plan,
                           seq,
                           kv_head,
                           band,
                           inverses + batch * s.heads,
                           slabs + task * slab,
                           sums + slot * sum_floats(plan, p)};
        fill(work.slab, 0, slab, 0.0f);
        if (chunk == 0 && band == 0) zero_keys<T>(f, plan, seq, kv_head, w);
        for (int64_t id = chunk; id * s.kv_block < seq.k_len; id += plan.chunks)
          run_block<T>(work, id, w);
      });
      parallel_tasks(workers, slots * parts, [&](int64_t task, int64_t) {
        const int64_t slot = task / parts, pair = pair0 + slot;
        const int64_t i0 = band * plan.band + task % parts * rows;
        const Sequence seq = sequence(p, pair / p.heads_k);
        const int64_t end = min64(seq.q_len, (band + 1) * plan.band);
        for (int64_t i = i0; i < min64(end, i0 + rows); ++i)
          finish_row<T>(f, plan, seq, pair % p.heads_k, i, slabs + slot * plan.chunks * slab);
      });
    }
  }
}

}  // namespace

int64_t block_sparse_bwd_workspace(const BlockSparseBwdParams& params, int64_t num_threads) {
  const FlashProblem& p = params.flash.problem;
  const Plan plan = make_plan(params, num_threads);
  Arena scratch{nullptr}, lists{nullptr};
  take_scratch(scratch, p, plan);
  lists.take<Inverse>(p.batch * params.selection.heads);
  for (int64_t n = 0; n < p.batch * params.selection.heads; ++n) take_lists(lists, params, plan);
  return scratch.used * num_threads + lists.used +
         plan.slots * (plan.chunks * slab_floats(plan) + sum_floats(plan, p)) * 4;
}

void block_sparse_bwd(const BlockSparseBwdParams& params, const Workers& workers) {
  dispatch_dtype(params.flash.problem.dtype,
                 [&](auto element) { run<decltype(element)>(params, workers); });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
