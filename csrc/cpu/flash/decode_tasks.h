// Flash attention for few query rows against many keys (decode): split-KV, bound by memory.
//
// Algorithm (Flash-Decoding, Dao et al. 2023): the keys are cut into splits of fixed length; each
// (batch, split, range of kv heads) is a task that leaves (m, l, O) per row; a second pass merges
// the splits in ascending order. Splits are anchored at key 0 and their length does not depend on
// the machine or the batch, so neither do results. Tuning may choose another length (FlashTiles),
// and a call may bring a plan of its own (SplitTable).
//
//   rows       all heads of a group (and all queries) of a kv head, four at a time: K and V are
//              read from memory once, from cache once per four rows
//   chunk      16 KiB of K and as much V of a head, 32 KiB of all heads of a task, at least 8 keys:
//              scores [key][4], online softmax on that layout, then P V
//   QK         dot products, 2 (4 with 32 registers) keys x 4 rows of accumulators; a transposing
//              tree reduces a vector's worth of them at once
//   PV         4 rows x 2 (4 with 32 registers, or with few rows) vectors of columns in registers
//              over the chunk's keys
//   bf16       widened in pairs, even and odd elements apart: a shift and a mask. Q is stored in
//              that order; O is accumulated in it and put right when it is written
//   fp8        the same order, whatever type Q has beside it
//   order      [B, S, H, D] caches hold all heads of a key together: chunk by chunk, all heads of
//              the range, so that a memory page is walked once. Planes of heads go one by one
//   prefetch   a chunk ahead, K beside Q K and V beside P V, by rounds over the memory pages of the
//              chunk: eight streams (RowsAhead). With one or two rows per head, which are bound by
//              memory alone, a head ahead
//   bytes      (D + Dv) * keys * kv heads * element size: the floor is that over the read bandwidth
//   flops      2 (D + Dv) per visible (row, key) pair
//
// Keys outside a row's interval are not multiplied into it: they may hold NaN.
//
// Where K and V lie is the business of a store (keys.h). Codes are multiplied as they are: a scale
// and a zero change scores and weights, not elements, (code - zero) * scale being linear.
#pragma once

#include "cpu/flash/decode_attend.h"
#include "cpu/flash/output.h"
#include "cpu/flash/partials.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kSplitKeys = 2048;  // 1-2 MiB of K and V: tasks enough for any core count at 32k
constexpr int64_t kChunkBytes = 16 << 10;  // of K, or of V: a part of L1
// Of K of a task's heads, or of V, at a time; beyond eight memory pages of each, keys come at half
// the bandwidth (Zen 3). A token's part that a task takes is all of it, or a memory page: what the
// hardware fetches beside it is not for others.
constexpr int64_t kKeysBytes = 32 << 10;
constexpr int64_t kTokenBytes = 4 << 10;
constexpr int64_t kMaxSplitKeys = 1 << 20;
constexpr int64_t kInlineBytes = 128 << 10;  // smaller problems are done before a thread wakes up

struct Plan {
  int64_t group, rows;  // rows per kv head, padded to kRows
  int64_t split_keys, splits, chunk;
  int64_t ranges, heads;  // head ranges per (batch, split), heads in one
  int64_t ldq, ldo;
  int64_t threads;
};

// bits: of an element of K and V; planes: heads lie apart.
AF_INLINE Plan make_plan(const FlashFwdParams& params, int64_t bits, bool planes, int64_t threads) {
  const FlashProblem& p = params.problem;
  Plan plan;
  plan.group = group_size(p);
  const bool few = params.route == RowRoute::kFewRows;
  int64_t q_len = few ? min64(p.seqlen_q, params.few_rows) : p.seqlen_q;
  plan.rows = round_up(q_len * plan.group, kRows);
  plan.split_keys = params.split_keys > 0
                        ? params.split_keys
                        : chosen(params.tiles.split_keys, kSplitKeys, kMaxChunk, kMaxSplitKeys);
  plan.splits =
      params.num_splits > 0 ? params.num_splits : max64(1, ceil_div(p.seqlen_k, plan.split_keys));
  if (params.plan.first) {
    plan.splits = 1;
    for (int64_t b = 0; b < p.batch; ++b) {
      plan.splits = max64(plan.splits, split_count(params, plan.split_keys, b));
    }
  }
  const int64_t row_bytes = max64(1, p.head_dim * bits / 8);
  const int64_t most_heads = planes ? 1 : max64(1, min64(p.heads_k, kTokenBytes / row_bytes));
  const int64_t keys = min64(kChunkBytes, kKeysBytes / most_heads) / row_bytes;
  const int64_t chunk = max64(8, min64(kMaxChunk, keys / 8 * 8));
  plan.chunk = chosen(params.tiles.chunk_keys, chunk, 8, kMaxChunk);
  int64_t bytes = p.batch * p.heads_k * p.seqlen_k * (p.head_dim + p.v_head_dim) * bits / 8;
  plan.threads = bytes * max64(1, plan.rows / kRows) < kInlineBytes ? 1 : threads;
  int64_t wanted = ceil_div(4 * plan.threads, p.batch * plan.splits);
  plan.heads = min64(most_heads, ceil_div(p.heads_k, min64(p.heads_k, wanted)));
  plan.ranges = ceil_div(p.heads_k, plan.heads);
  plan.ldq = round_up(p.head_dim, kLanes);
  plan.ldo = round_up(p.v_head_dim, kLanes);
  return plan;
}

// ---- tasks ----

struct Memory {
  Partials partials;
  char* scratch;
  int64_t scratch_bytes;  // per worker
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
  Arena scratch{nullptr};
  take_scratch(scratch, p, plan);
  memory.scratch_bytes = scratch.used;
  memory.partials = {base, plan.rows, plan.ldo, plan.splits};
  const int64_t partials = memory.partials.bytes() * p.batch * p.heads_k * plan.splits;
  memory.scratch = base + partials;
  return partials + scratch.used * plan.threads;
}

// One row, scaled, in the pair order of E: the order in which scores() reads its keys. Returns the
// sum of its elements.
template <class E, class T>
AF_INLINE float scale_query(const T* src, int64_t dim, float scale, float* dst) {
  VecF sum{};
  int64_t d = 0;
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
    VecF x = load(src + d) * splat(scale), y = load(src + d + kLanes) * splat(scale);
    sum += x + y;
    pair_up(E{}, x, y);
    store(dst + d, x);
    store(dst + d + kLanes, y);
  }
  for (; d < dim; d += kLanes) {
    VecF x = load_partial(src + d, dim - d) * splat(scale);
    sum += x;
    store(dst + d, x);
  }
  return reduce_add(sum);
}

template <class E>
[[gnu::noinline]] static float load_query(const FlashFwdParams& params, const Sequence& seq,
                                          int64_t head, int64_t i, float scale, float* rotated,
                                          float* dst) {
  const FlashProblem& p = params.problem;
  float sum = 0.0f;
  dispatch_input(p.q_dtype, [&](auto element) {
    const auto* src = row_ptr<const decltype(element)>(params.q, seq.batch, seq.q_row + i, head);
    with_query(p, seq, head, i, src, rotated, [&](auto* row) {
      // Rotated keys are fp32, whatever the store has.
      sum = rotated ? scale_query<float>(row, p.head_dim, scale, dst)
                    : scale_query<E>(row, p.head_dim, scale, dst);
    });
  });
  return sum;
}

// Scaled fp32 copies of the rows of one kv head, and its register groups.
template <class Store>
AF_INLINE void prepare_head(const FlashFwdParams& params, const Plan& plan, const Store& kv,
                            const Sequence& seq, int64_t kv_head, const Partial& part, float* q,
                            RowGroup* groups, float* rotated) {
  const FlashProblem& p = params.problem;
  const float q_scale = score_map(p).q_scale * kv.key_scale(kv_head);
  const int64_t rows = seq.q_len * plan.group;
  clear(part, plan.rows, plan.ldo);
  for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
    RowGroup& g = groups[r0 / kRows];
    g.rows = min64(kRows, rows - r0);
    g.ldq = plan.ldq, g.ldo = plan.ldo;
    g.q = q + r0 * plan.ldq;
    g.m = part.m + r0, g.l = part.l + r0, g.z = part.z + r0, g.o = part.o + r0 * plan.ldo;
    g.lo = seq.k_len, g.hi = 0, g.same = true;
    for (int64_t r = 0; r < kRows; ++r) {
      g.slope2[r] = g.q_sum[r] = 0.0f, g.head[r] = g.query[r] = 0, g.keys[r] = {0, 0};
      if (r >= g.rows) continue;
      const int64_t head = kv_head * plan.group + (r0 + r) / seq.q_len, i = (r0 + r) % seq.q_len;
      const float scale = q_scale * row_scale(p, seq, head, i);
      g.q_sum[r] = load_query<typename Store::Element>(params, seq, head, i, scale, rotated,
                                                       q + (r0 + r) * plan.ldq);
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

template <class Store>
AF_INLINE void run_split(const FlashFwdParams& params, const Plan& plan, const Store& kv,
                         const Memory& memory, int64_t batch, int64_t split, int64_t head0,
                         int64_t worker) {
  const FlashProblem& p = params.problem;
  const ScoreMap map = score_map(p);
  Arena a{memory.scratch + worker * memory.scratch_bytes};
  const Scratch w = take_scratch(a, p, plan);
  const int64_t heads = min64(plan.heads, p.heads_k - head0);
  const Sequence first = sequence(p, batch, head0);
  const int64_t row_groups = ceil_div(first.q_len * plan.group, kRows);
  int64_t lo = first.k_rows, hi = 0;
  for (int64_t h = 0; h < heads; ++h) {
    const Sequence seq = sequence(p, batch, head0 + h);
    Partial part = memory.partials.at(batch * p.heads_k + head0 + h, split);
    RowGroup* mine = w.groups + h * groups_of(plan);
    prepare_head(params, plan, kv, seq, head0 + h, part, w.q + h * plan.rows * plan.ldq, mine,
                 w.rotated);
    for (int64_t g = 0; g < row_groups; ++g) {
      lo = min64(lo, mine[g].lo);
      hi = max64(hi, mine[g].hi);
    }
  }
  // Chunks are anchored at the split, whatever the window leaves of it.
  const Interval own = split_keys_of(params, plan.split_keys, batch, split);
  hi = min64(hi, own.hi);
  lo = own.lo + max64(0, lo - own.lo) / plan.chunk * plan.chunk;
  // Few rows of wide elements are bound by memory alone: what is prefetched far ahead then finds no
  // room among the misses.
  const bool near = first.q_len * plan.group < 3 && kBits<typename Store::Element> >= 16;
  typename Store::Places places[2];
  int64_t here = 0;
  auto locate = [&](int64_t key0, typename Store::Places& at) {
    kv.locate(first, key0, min64(plan.chunk, hi - key0), at);
  };
  // Keys from key0 on of `count` heads, as they will be walked.
  auto rows_at = [&](int64_t key0, const typename Store::Places& at, int64_t head, int64_t count) {
    const auto keys = kv.keys(first, key0, head, at);
    return Ahead<typename Store::Element>{kv.k_rows(keys, count, p.head_dim),
                                          kv.v_rows(keys, count, p.v_head_dim)};
  };
  Ahead<typename Store::Element> coming{};
  if (lo < hi) {
    locate(lo, places[here]);
    coming = rows_at(lo, places[here], head0, near ? 1 : heads);
    coming.begin(min64(plan.chunk, hi - lo));
    coming.allow(0, 1);
    coming.finish();
  }
  for (int64_t key0 = lo; key0 < hi; key0 += plan.chunk, here ^= 1) {
    const int64_t key_end = min64(key0 + plan.chunk, hi);
    const int64_t next = max64(0, min64(plan.chunk, hi - key_end));
    if (next > 0) {
      locate(key_end, places[here ^ 1]);
      coming = rows_at(key_end, places[here ^ 1], head0, near ? 1 : heads);
      coming.begin(next);
    }
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t head = head0 + h;
      const Sequence seq = p.seqused_head ? sequence(p, batch, head) : first;
      const auto keys = kv.keys(seq, key0, head, places[here]);
      const RowGroup* mine = w.groups + h * groups_of(plan);
      if (w.rotated) {
        if constexpr (!Store::Keys::kPages) {
          with_keys(p, seq, head, {key0, key_end}, keys.k, keys.k_stride, w.rotated,
                    [](auto*, int64_t) {});
        }
      }
      if (near && h + 1 < heads) {
        auto next_head = rows_at(key0, places[here], head + 1, 1);
        next_head.begin(key_end - key0);
        next_head.allow(0, 1);
        for (int64_t g = 0; g < row_groups; ++g) {
          attend(p, map, seq, mine[g], keys, w.rotated, key0, key_end, next_head);
        }
        continue;
      }
      if (next > 0) coming.allow(near ? 0 : h, near ? 1 : heads);
      for (int64_t g = 0; g < row_groups; ++g) {
        attend(p, map, seq, mine[g], keys, w.rotated, key0, key_end, coming);
      }
    }
  }
}

// Adds the sink, rounds and stores one merged row.
template <class Store>
AF_INLINE void finish_row(const FlashFwdParams& params, const Store& kv, const Sequence& seq,
                          int64_t head, int64_t i, float m, float l, float z, float* o) {
  const FlashProblem& p = params.problem;
  const RowEnd end = finish_softmax(m, l, p.sinks ? p.sinks[head] : -kInf);
  *stat_ptr(params.lse, seq, head, i) = end.lse;
  const int64_t kv_head = head / group_size(p);
  int64_t d = 0;
  for (; d + 2 * kLanes <= p.v_head_dim; d += 2 * kLanes) {
    VecF x = load(o + d), y = load(o + d + kLanes);
    unpair(typename Store::Element{}, x, y);
    store(o + d, x);
    store(o + d + kLanes, y);
  }
  if constexpr (Store::Keys::kCodes) {
    const VecF zeros = splat(z + l * kv.value_zero(kv_head));
    for (d = 0; d < p.v_head_dim; d += kLanes) store(o + d, load(o + d) - zeros);
  }
  store_row(params, seq, head, i, o,
            end.scale * kv.value_scale(kv_head) * value_scale(p, seq, kv_head));
}

// Merges the splits of one kv head.
template <class Store>
AF_INLINE void merge_head(const FlashFwdParams& params, const Plan& plan, const Store& kv,
                          const Memory& memory, const Sequence& seq, int64_t kv_head) {
  const int64_t pair = seq.batch * params.problem.heads_k + kv_head;
  const int64_t splits = split_count(params, plan.split_keys, seq.batch);
  merge_rows(memory.partials, pair, splits, seq.q_len * plan.group,
             [&](int64_t r, float m, float l, float z, float* o) {
               const int64_t head = kv_head * plan.group + r / seq.q_len;
               finish_row(params, kv, seq, head, r % seq.q_len, m, l, z, o);
             });
}

template <class Store>
AF_INLINE Plan plan_for(const FlashFwdParams& params, const Store& kv, int64_t threads) {
  return make_plan(params, kBits<typename Store::Element>, kv.planes(), threads);
}

template <class Store>
AF_INLINE int64_t decode_workspace(const FlashFwdParams& params, const Store& kv, int64_t threads) {
  Memory memory;
  return place(memory, params.problem, plan_for(params, kv, threads), nullptr);
}

template <class Store>
AF_INLINE void run_decode(const FlashFwdParams& params, const Store& kv,
                          const Workers& all_workers) {
  const FlashProblem& p = params.problem;
  const Plan plan = plan_for(params, kv, all_workers.num_threads);
  Memory memory;
  place(memory, p, plan, static_cast<char*>(params.workspace));
  Workers workers = all_workers;
  workers.num_threads = plan.threads;
  parallel_tasks(workers, p.batch * plan.splits * plan.ranges, [&](int64_t task, int64_t worker) {
    const int64_t range = task % plan.ranges, split = task / plan.ranges % plan.splits;
    const int64_t batch = task / plan.ranges / plan.splits;
    const Sequence seq = sequence(p, batch);
    if (!served_here(params, seq) || seq.q_len == 0) return;
    if (split >= split_count(params, plan.split_keys, batch)) return;
    run_split(params, plan, kv, memory, batch, split, range * plan.heads, worker);
  });
  parallel_tasks(workers, p.batch * p.heads_k, [&](int64_t pair, int64_t) {
    const Sequence seq = sequence(p, pair / p.heads_k, pair % p.heads_k);
    if (!served_here(params, seq) || seq.q_len == 0) return;
    merge_head(params, plan, kv, memory, seq, pair % p.heads_k);
  });
}

}  // namespace
}  // namespace attnforge::cpu::ATTNFORGE_ISA
