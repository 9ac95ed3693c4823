// Flash attention for few query rows against many keys (decode): split-KV, bound by memory.
//
// Algorithm (Flash-Decoding, Dao et al. 2023): the keys are cut into splits of fixed length; each
// (batch, split, range of kv heads) is a task that leaves (m, l, O) per row; a second pass merges
// the splits in ascending order. Splits are anchored at key 0 and their length does not depend on
// the machine or the batch, so neither do results. Tuning may choose another length (FlashTiles).
//
//   rows       all heads of a group (and all queries) of a kv head, four at a time: K and V are
//              read from memory once, from cache once per four rows
//   chunk      8 KiB of K and as much V: scores [key][4], online softmax on that layout, then P V
//   QK         dot products, 2 (4 with 32 registers) keys x 4 rows of accumulators; a transposing
//              tree reduces a vector's worth of them at once
//   PV         4 rows x 2 (or 4) vectors of columns in registers over the chunk's keys
//   bf16       widened in pairs, even and odd elements apart: a shift and a mask. Q is stored in
//              that order; O is accumulated in it and put right when it is written
//   fp8        the same order, whatever type Q has beside it
//   order      [B, S, H, D] caches hold all heads of a key together: chunk by chunk, all heads of
//              the range, so that a memory page is walked once. Planes of heads go one by one
//   bytes      (D + Dv) * keys * kv heads * element size: the floor is that over the read bandwidth
//   flops      2 (D + Dv) per visible (row, key) pair
//
// Keys outside a row's interval are not multiplied into it: they may hold NaN.
#include "cpu/flash/decode_products.h"
#include "cpu/flash/score_row.h"
#include "cpu/kernels.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/parallel.h"
#include "cpu/micro/softmax.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kSplitKeys = 2048;  // 1-2 MiB of K and V: tasks enough for any core count at 32k
constexpr int64_t kChunkBytes = 8 << 10;  // of K: with V and the next K a part of L1
constexpr int64_t kMaxChunk = 64;
constexpr int64_t kMaxSplitKeys = 1 << 20;
constexpr int64_t kInlineBytes = 128 << 10;  // smaller problems are done before a thread wakes up

struct Plan {
  int64_t group, rows;  // rows per kv head, padded to kRows
  int64_t split_keys, splits, chunk;
  int64_t ranges, heads;  // head ranges per (batch, split), heads in one
  int64_t ldq, ldo;
  int64_t threads;
};

// What one split leaves for the rows of one kv head.
struct Partial {
  float* m;
  float* l;
  float* o;  // [rows][ldo], not normalised
};

AF_INLINE Partial take_partial(Arena& a, const Plan& plan) {
  Partial part;
  part.m = a.take<float>(plan.rows);
  part.l = a.take<float>(plan.rows);
  part.o = a.take<float>(plan.rows * plan.ldo);
  return part;
}

AF_INLINE Plan make_plan(const FlashFwdParams& params, int64_t threads) {
  const FlashProblem& p = params.problem;
  const int64_t item = item_size(p.dtype);
  Plan plan;
  plan.group = group_size(p);
  int64_t q_len = params.route == RowRoute::kFewRows ? min64(p.seqlen_q, kFewRows) : p.seqlen_q;
  plan.rows = round_up(q_len * plan.group, kRows);
  plan.split_keys = params.split_keys > 0
                        ? params.split_keys
                        : chosen(params.tiles.split_keys, kSplitKeys, kMaxChunk, kMaxSplitKeys);
  plan.splits = max64(1, ceil_div(p.seqlen_k, plan.split_keys));
  const int64_t chunk = max64(8, min64(kMaxChunk, kChunkBytes / (p.head_dim * item) / 8 * 8));
  plan.chunk = chosen(params.tiles.chunk_keys, chunk, 8, kMaxChunk);
  int64_t bytes = p.batch * p.heads_k * p.seqlen_k * (p.head_dim + p.v_head_dim) * item;
  plan.threads = bytes * max64(1, plan.rows / kRows) < kInlineBytes ? 1 : threads;
  bool planes = params.k.head_stride > params.k.seq_stride;
  int64_t wanted = ceil_div(4 * plan.threads, p.batch * plan.splits);
  plan.heads = planes ? 1 : ceil_div(p.heads_k, min64(p.heads_k, wanted));
  plan.ranges = ceil_div(p.heads_k, plan.heads);
  plan.ldq = round_up(p.head_dim, kLanes);
  plan.ldo = round_up(p.v_head_dim, kLanes);
  return plan;
}

// ---- one row group over one run of keys ----

// Four rows of a kv head: the register group, with what each row sees.
struct RowGroup {
  int64_t rows;
  const float* q;
  float *m, *l, *o;
  Interval keys[kRows];
  float slope2[kRows];
  int64_t head[kRows], query[kRows];
  int64_t lo, hi;  // union of the intervals
  bool same;       // all rows see [lo, hi)
};

AF_INLINE VecF repeat4(const float* x) {
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = x[i % kRows];
  return v;
}

// Online softmax on [key][kRows] scores; n keys, padded here to a whole vector with -inf.
AF_INLINE void softmax_group(float* s, int64_t n, float* m, float* l, float* alpha) {
  constexpr int64_t kStep = kLanes / kRows;
  int64_t padded = round_up(n, kStep);
  fill(s, n * kRows, padded * kRows, -kInf);
  VecF top = splat(-kInf);
  for (int64_t c = 0; c < padded; c += kStep) top = vmax(load(s + c * kRows), top);
  Vec4 tops = fold4(top, [](auto a, auto b) { return a > b ? a : b; });
  float base[kRows], step[kRows];
  bool moved = false;
  for (int64_t r = 0; r < kRows; ++r) {
    float m_new = tops[r] > m[r] ? tops[r] : m[r];
    step[r] = m_new == m[r] ? 0.0f : m[r] - m_new;
    moved |= m_new != m[r];
    m[r] = m_new;
    base[r] = m_new == -kInf ? 0.0f : m_new;
  }
  VecF factor = splat(1.0f);
  if (moved) factor = exp2(repeat4(step));
  for (int64_t r = 0; r < kRows; ++r) alpha[r] = factor[r];
  VecF bases = repeat4(base), sum{};
  for (int64_t c = 0; c < padded; c += kStep) {
    VecF prob = exp2(load(s + c * kRows) - bases);
    store(s + c * kRows, prob);
    sum += prob;
  }
  Vec4 sums = fold4(sum, [](auto a, auto b) { return a + b; });
  for (int64_t r = 0; r < kRows; ++r) l[r] = l[r] * alpha[r] + sums[r];
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
template <class T>
AF_INLINE void weigh_seen(const FlashProblem& p, const Plan& plan, const Sequence& seq,
                          const RowGroup& rows, int64_t r, Interval keys, const float* s,
                          const T* v, int64_t stride) {
  const RowMods mods = row_mods(p, seq, rows.head[r], rows.query[r]);
  for (int64_t j = keys.lo; j < keys.hi; ++j, s += kRows, v += stride) {
    if (sees(mods, j)) weigh<1>(s, v, stride, 1, p.v_head_dim, rows.o + r * plan.ldo, plan.ldo);
  }
}

// Whether n rows hold neither NaN nor infinity.
template <class T>
[[gnu::noinline]] static bool finite_rows(const T* x, int64_t stride, int64_t n, int64_t dim) {
  VecF poison{};
  for (int64_t j = 0; j < n; ++j, x += stride) {
    for (int64_t d = 0; d < dim; d += kLanes) poison += load_partial(x + d, dim - d) * splat(0.0f);
  }
  return reduce_add(poison) == 0.0f;
}

template <class T>
AF_INLINE void attend(const FlashProblem& p, const Plan& plan, const ScoreMap& map,
                      const Sequence& seq, const RowGroup& rows, const Keys<T>& all,
                      const float* rotated, int64_t key0, int64_t key_end, bool prefetch) {
  int64_t lo = max64(key0, rows.lo), hi = min64(key_end, rows.hi);
  if (lo >= hi) return;
  const int64_t n = hi - lo;
  Keys<T> keys = all;
  keys.k += (lo - key0) * keys.k_stride;
  keys.v += (lo - key0) * keys.v_stride;
  float s[(kMaxChunk + kLanes) * kRows];
  dispatch_rows(rows.rows, [&](auto r) {
    constexpr int kCount = decltype(r)::value;
    if (rotated) {
      const Keys<float> turned{rotated + (lo - key0) * plan.ldq, nullptr, plan.ldq, 0, nullptr};
      scores<kCount>(rows.q, plan.ldq, turned, n, p.head_dim, p.v_head_dim, false, s);
    } else {
      scores<kCount>(rows.q, plan.ldq, keys, n, p.head_dim, p.v_head_dim, prefetch, s);
    }
  });
  const int64_t flat = round_up(n * kRows, kLanes);
  fill(s, n * kRows, flat, 0.0f);
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
  for (int64_t r = 0; r < rows.rows; ++r) {
    if (alpha[r] == 1.0f) continue;
    float* o = rows.o + r * plan.ldo;
    for (int64_t d = 0; d < plan.ldo; d += kLanes) store(o + d, load(o + d) * splat(alpha[r]));
  }
  const bool some_hidden = p.mods.segments_q || (p.mods.mask && hi > seq.k_len - p.mods.mask_keys);
  const bool each = some_hidden && !finite_rows(keys.v, keys.v_stride, n, p.v_head_dim);
  if (!masked && !each) {
    dispatch_rows(rows.rows, [&](auto r) {
      weigh<decltype(r)::value>(s, keys.v, keys.v_stride, n, p.v_head_dim, rows.o, plan.ldo);
    });
    return;
  }
  for (int64_t r = 0; r < rows.rows; ++r) {
    int64_t first = max64(lo, rows.keys[r].lo), end = min64(hi, rows.keys[r].hi);
    if (first >= end) continue;
    const float* weights = s + (first - lo) * kRows + r;
    const T* v = keys.v + (first - lo) * keys.v_stride;
    if (each) {
      weigh_seen(p, plan, seq, rows, r, {first, end}, weights, v, keys.v_stride);
    } else {
      weigh<1>(weights, v, keys.v_stride, end - first, p.v_head_dim, rows.o + r * plan.ldo,
               plan.ldo);
    }
  }
}

// ---- tasks ----

struct Memory {
  char* partials;
  int64_t partial_bytes;
  char* scratch;
  int64_t scratch_bytes;  // per worker

  AF_INLINE_MEMBER Partial partial(const Plan& plan, int64_t pair, int64_t split) const {
    Arena a{partials + (pair * plan.splits + split) * partial_bytes};
    return take_partial(a, plan);
  }
};

AF_INLINE int64_t groups_of(const Plan& plan) {
  return plan.rows / kRows;
}

// One worker's: scaled q of a head range, its row groups, and with rotary positions a chunk of keys
// (or one query) turned.
struct Scratch {
  float* q;
  RowGroup* groups;
  float* rotated;  // [chunk][ldq], or null
};

AF_INLINE Scratch take_scratch(Arena& a, const FlashProblem& p, const Plan& plan) {
  Scratch w;
  w.q = a.take<float>(plan.heads * plan.rows * plan.ldq);
  w.groups = a.take<RowGroup>(plan.heads * groups_of(plan));
  w.rotated = p.mods.rope_cos ? a.take<float>(plan.chunk * plan.ldq) : nullptr;
  return w;
}

AF_INLINE int64_t place(Memory& memory, const FlashProblem& p, const Plan& plan, char* base) {
  Arena part{nullptr}, scratch{nullptr};
  take_partial(part, plan);
  take_scratch(scratch, p, plan);
  memory.partial_bytes = part.used;
  memory.scratch_bytes = scratch.used;
  memory.partials = base;
  int64_t partials = part.used * p.batch * p.heads_k * plan.splits;
  memory.scratch = base + partials;
  return partials + scratch.used * plan.threads;
}

// One row, scaled, in pair order: the order in which scores() reads its keys.
template <class T>
AF_INLINE void scale_query(const T* src, int64_t dim, float scale, float* dst) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
    store(dst + d, load_pair<0>(src + d) * splat(scale));
    store(dst + d + kLanes, load_pair<1>(src + d) * splat(scale));
  }
  for (; d < dim; d += kLanes) store(dst + d, load_partial(src + d, dim - d) * splat(scale));
}

// The same beside fp8 keys, in their pair order.
template <class T>
AF_INLINE void scale_query_by_pairs(const T* src, int64_t dim, float scale, float* dst) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
    float lanes[2 * kLanes];
    store(lanes, load(src + d) * splat(scale));
    store(lanes + kLanes, load(src + d + kLanes) * splat(scale));
    for (int64_t i = 0; i < 2 * kLanes; ++i) dst[d + i % 2 * kLanes + i / 2] = lanes[i];
  }
  for (; d < dim; d += kLanes) store(dst + d, load_partial(src + d, dim - d) * splat(scale));
}

// Scaled fp32 copies of the rows of one kv head, and its register groups.
template <class T>
AF_INLINE void prepare_head(const FlashFwdParams& params, const Plan& plan, const Sequence& seq,
                            int64_t kv_head, const Partial& part, float* q, RowGroup* groups,
                            float* rotated) {
  const FlashProblem& p = params.problem;
  const float q_scale = score_map(p).q_scale;
  const int64_t rows = seq.q_len * plan.group;
  fill(part.m, 0, plan.rows, -kInf);
  fill(part.l, 0, plan.rows, 0.0f);
  fill(part.o, 0, plan.rows * plan.ldo, 0.0f);
  for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
    RowGroup& g = groups[r0 / kRows];
    g.rows = min64(kRows, rows - r0);
    g.q = q + r0 * plan.ldq;
    g.m = part.m + r0, g.l = part.l + r0, g.o = part.o + r0 * plan.ldo;
    g.lo = seq.k_len, g.hi = 0, g.same = true;
    for (int64_t r = 0; r < kRows; ++r) {
      g.slope2[r] = 0.0f, g.head[r] = g.query[r] = 0, g.keys[r] = {0, 0};
      if (r >= g.rows) continue;
      const int64_t head = kv_head * plan.group + (r0 + r) / seq.q_len, i = (r0 + r) % seq.q_len;
      const float scale = q_scale * row_scale(p, seq, head, i);
      with_query_type<T>(p, [&](auto element) {
        const auto* src =
            row_ptr<const decltype(element)>(params.q, seq.batch, seq.q_row + i, head);
        with_query(p, seq, head, i, src, rotated, [&](auto* row) {
          float* dst = q + (r0 + r) * plan.ldq;
          if (kIsFloat8<T> && !rotated) return scale_query_by_pairs(row, p.head_dim, scale, dst);
          scale_query(row, p.head_dim, scale, dst);
        });
      });
      g.keys[r] = visible_keys(p, seq, head, i);
      g.slope2[r] = alibi_slope2(p, seq.batch, head);
      g.head[r] = head, g.query[r] = i;
      g.same &= g.keys[r].lo == g.keys[0].lo && g.keys[r].hi == g.keys[0].hi;
      if (g.keys[r].lo < g.keys[r].hi) {
        g.lo = min64(g.lo, g.keys[r].lo);
        g.hi = max64(g.hi, g.keys[r].hi);
      }
    }
  }
}

template <class T>
AF_INLINE void run_split(const FlashFwdParams& params, const Plan& plan, const Memory& memory,
                         const Sequence& seq, int64_t split, int64_t head0, int64_t worker) {
  const FlashProblem& p = params.problem;
  const ScoreMap map = score_map(p);
  Arena a{memory.scratch + worker * memory.scratch_bytes};
  const Scratch w = take_scratch(a, p, plan);
  const int64_t heads = min64(plan.heads, p.heads_k - head0);
  const int64_t row_groups = ceil_div(seq.q_len * plan.group, kRows);
  int64_t lo = seq.k_len, hi = 0;
  for (int64_t h = 0; h < heads; ++h) {
    Partial part = memory.partial(plan, seq.batch * p.heads_k + head0 + h, split);
    RowGroup* mine = w.groups + h * groups_of(plan);
    prepare_head<T>(params, plan, seq, head0 + h, part, w.q + h * plan.rows * plan.ldq, mine,
                    w.rotated);
    for (int64_t g = 0; g < row_groups; ++g) {
      lo = min64(lo, mine[g].lo);
      hi = max64(hi, mine[g].hi);
    }
  }
  // Chunks are anchored at the split, whatever the window leaves of it.
  const int64_t split0 = split * plan.split_keys;
  hi = min64(hi, split0 + plan.split_keys);
  lo = split0 + max64(0, lo - split0) / plan.chunk * plan.chunk;
  for (int64_t key0 = lo; key0 < hi; key0 += plan.chunk) {
    const int64_t key_end = min64(key0 + plan.chunk, hi);
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t head = head0 + h;
      Keys<T> keys{row_ptr<const T>(params.k, seq.batch, seq.k_row + key0, head),
                   row_ptr<const T>(params.v, seq.batch, seq.k_row + key0, head),
                   params.k.seq_stride, params.v.seq_stride, nullptr};
      if (h + 1 < heads) {
        keys.next_k = keys.k + params.k.head_stride;
      } else if (key0 + 2 * plan.chunk <= hi) {
        keys.next_k = row_ptr<const T>(params.k, seq.batch, seq.k_row + key0 + plan.chunk, head0);
      }
      const RowGroup* mine = w.groups + h * groups_of(plan);
      if (w.rotated) {
        with_keys(p, seq, head, {key0, key_end}, keys.k, keys.k_stride, w.rotated,
                  [](auto*, int64_t) {});
      }
      for (int64_t g = 0; g < row_groups; ++g) {
        attend<T>(p, plan, map, seq, mine[g], keys, w.rotated, key0, key_end, g == 0);
      }
    }
  }
}

// Merges the splits of one kv head in ascending order, adds the sink, rounds and stores.
template <class T>
AF_INLINE void merge_head(const FlashFwdParams& params, const Plan& plan, const Memory& memory,
                          const Sequence& seq, int64_t kv_head) {
  const FlashProblem& p = params.problem;
  const int64_t pair = seq.batch * p.heads_k + kv_head;
  const int64_t splits = max64(1, ceil_div(seq.k_len, plan.split_keys));
  const Partial total = memory.partial(plan, pair, 0);
  for (int64_t r = 0; r < seq.q_len * plan.group; ++r) {
    float m = total.m[r], l = total.l[r];
    float* o = total.o + r * plan.ldo;
    for (int64_t split = 1; split < splits; ++split) {
      const Partial part = memory.partial(plan, pair, split);
      if (part.l[r] == 0.0f) continue;  // saw nothing; NaN goes on
      const float top = part.m[r] > m ? part.m[r] : m;
      const float base = top == -kInf ? 0.0f : top;
      const float keep = l == 0.0f ? 0.0f : exp2(splat(m - base))[0];
      const float add = exp2(splat(part.m[r] - base))[0];
      const float* x = part.o + r * plan.ldo;
      for (int64_t d = 0; d < plan.ldo; d += kLanes) {
        store(o + d, fma(splat(add), load(x + d), splat(keep) * load(o + d)));
      }
      l = l * keep + part.l[r] * add;
      m = top;
    }
    const int64_t head = kv_head * plan.group + r / seq.q_len, i = r % seq.q_len;
    const RowEnd end = finish_softmax(m, l, p.sinks ? p.sinks[head] : -kInf);
    *stat_ptr(params.lse, seq, head, i) = end.lse;
    for (int64_t d = 0; d + 2 * kLanes <= p.v_head_dim; d += 2 * kLanes) {
      VecF x = load(o + d), y = load(o + d + kLanes);
      unpair(T{}, x, y);
      store(o + d, x);
      store(o + d + kLanes, y);
    }
    const float scale = end.scale * value_scale(p, seq, kv_head);
    with_output_type<T>(p, [&](auto element) {
      using O = decltype(element);
      const int64_t row = seq.q_row + i;
      O* lo = params.out_lo.data ? row_ptr<O>(params.out_lo, seq.batch, row, head) : nullptr;
      store_output(o, scale, p.v_head_dim, row_ptr<O>(params.out, seq.batch, row, head), lo);
    });
  }
}

template <class T>
AF_INLINE void run(const FlashFwdParams& params, const Workers& all_workers) {
  const FlashProblem& p = params.problem;
  const Plan plan = make_plan(params, all_workers.num_threads);
  Memory memory;
  place(memory, p, plan, static_cast<char*>(params.workspace));
  Workers workers = all_workers;
  workers.num_threads = plan.threads;
  parallel_tasks(workers, p.batch * plan.splits * plan.ranges, [&](int64_t task, int64_t worker) {
    const int64_t range = task % plan.ranges, split = task / plan.ranges % plan.splits;
    const Sequence seq = sequence(p, task / plan.ranges / plan.splits);
    if (!served_here(params, seq) || seq.q_len == 0) return;
    if (split > 0 && split * plan.split_keys >= seq.k_len) return;
    run_split<T>(params, plan, memory, seq, split, range * plan.heads, worker);
  });
  parallel_tasks(workers, p.batch * p.heads_k, [&](int64_t pair, int64_t) {
    const Sequence seq = sequence(p, pair / p.heads_k);
    if (!served_here(params, seq) || seq.q_len == 0) return;
    merge_head<T>(params, plan, memory, seq, pair % p.heads_k);
  });
}

}  // namespace

int64_t flash_decode_workspace(const FlashFwdParams& params, int64_t num_threads) {
  const Plan plan = make_plan(params, num_threads);
  Memory memory;
  return place(memory, params.problem, plan, nullptr);
}

void flash_decode(const FlashFwdParams& params, const Workers& workers) {
  dispatch_input(params.problem.dtype,
                 [&](auto element) { run<decltype(element)>(params, workers); });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
