// Block importance of attention to compressed keys, and NSA's top-n blocks by it.
//
//   P_hi = 2^(s_hi - lse_h)                     windows that the query sees, 0 for others
//   p_j  = sum_i overlap(i, j) sum_h P_hi       h over the query heads of a KV head
//
// A task is a few tokens with all heads of a KV head, as rows of one product. It goes through the
// windows in blocks: S = Q K^T, P, the sum over heads [tokens][kKeys], and from it into the scores
// [tokens][blocks] of the task. Then each token picks its blocks. What is held is one task's
// scores: no S x N buffer, unless the importance itself is what is asked for.
//
//   tile     96 rows (heads x tokens) x 256 windows
//   flops    2 D per (query, visible window), one exp2 each
//   bytes    Q once; K packed once per KV head, then from cache once per tile
//   order    (batch, KV head) in waves whose packed keys stay inside kWaveBytes
//
// Windows are summed in the order of the keys and heads in the order of the group, so a score
// depends on its own query and keys alone. NaN in a window that a query does not see is masked.
#include "cpu/flash/problem.h"
#include "cpu/kernels.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/parallel.h"
#include "cpu/micro/softmax.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kRows = 96;
constexpr int64_t kKeys = 256;
constexpr int64_t kLds = kKeys + 16;  // off the power of two: rows do not share L1 sets
constexpr int64_t kWaveBytes = 8 << 20;

struct Plan {
  int64_t group, tokens, rows;  // of a task
  int64_t tasks;                // of the longest sequence and one KV head
  int64_t key_blocks, slots;
  int64_t key_floats;   // packed floats of a key block
  int64_t span, ratio;  // strides of a window, of a block
};

struct Tile {
  float* q;       // row groups, scaled
  float* s;       // [rows][kLds]
  float* lse2;    // [rows]
  float* sums;    // [tokens][kLds]
  float* scores;  // [tokens][blocks]
  float* best;    // [top_n], the chosen ones of one token, best first
  int32_t* ids;   // [top_n]
};

AF_INLINE Plan make_plan(const NsaSelectParams& params, int64_t threads) {
  const FlashProblem& p = params.problem;
  Plan plan;
  plan.group = group_size(p);
  plan.tokens = max64(1, kRows / plan.group);
  plan.rows = plan.tokens * plan.group;
  plan.tasks = max64(1, ceil_div(p.seqlen_q, plan.tokens));
  plan.key_blocks = max64(1, ceil_div(p.seqlen_k, kKeys));
  plan.key_floats = kKeys * p.head_dim;
  plan.span = params.cmp_block / params.cmp_stride;
  plan.ratio = params.slc_block / params.cmp_stride;
  const int64_t pairs = p.batch * p.heads_k;
  const int64_t in_cache = kWaveBytes / (plan.key_blocks * plan.key_floats * 4);
  const int64_t enough = ceil_div(4 * threads, plan.tasks);
  plan.slots = max64(1, min64(pairs, max64(enough, in_cache)));
  return plan;
}

AF_INLINE Tile take_tile(Arena& a, const NsaSelectParams& params, const Plan& plan) {
  Tile tile;
  const int64_t rows = round_up(plan.rows, kMR);
  tile.q = a.take<float>(rows * params.problem.head_dim);
  tile.s = a.take<float>(rows * kLds);
  tile.lse2 = a.take<float>(rows);
  tile.sums = a.take<float>(plan.tokens * kLds);
  tile.scores = a.take<float>(plan.tokens * params.blocks);
  tile.best = a.take<float>(params.top_n);
  tile.ids = a.take<int32_t>(params.top_n);
  return tile;
}

// Some tokens of one sequence and KV head.
struct Task {
  const NsaSelectParams& params;
  const Plan& plan;
  const Sequence& seq;
  int64_t kv_head, token0, tokens;

  AF_INLINE_MEMBER int64_t rows() const { return tokens * plan.group; }
  AF_INLINE_MEMBER int64_t head(int64_t row) const { return kv_head * plan.group + row / tokens; }
  AF_INLINE_MEMBER int64_t position(int64_t token) const {
    return params.positions[seq.batch * params.positions_batch + seq.q_row + token0 + token];
  }
  // Windows that a token sees: those that end at or before it.
  AF_INLINE_MEMBER int64_t windows(int64_t token) const {
    const int64_t past = position(token) + 1 - params.cmp_block;
    return past < 0 ? 0 : min64(seq.k_len, past / params.cmp_stride + 1);
  }
  // Blocks that a token may choose from.
  AF_INLINE_MEMBER int64_t blocks(int64_t token) const {
    const int64_t at = position(token);
    return at < 0 ? 0 : min64(params.blocks, at / params.slc_block + 1);
  }
  AF_INLINE_MEMBER int64_t output_row(int64_t token) const {
    const FlashProblem& p = params.problem;
    if (p.cu_seqlens_q) return kv_head * p.total_q + seq.q_row + token0 + token;
    return (seq.batch * p.heads_k + kv_head) * p.seqlen_q + token0 + token;
  }
};

template <class T>
AF_INLINE void load_rows(const Task& t, const Tile& tile) {
  const NsaSelectParams& params = t.params;
  const int64_t dim = params.problem.head_dim;
  const float scale = params.problem.softmax_scale * kLog2E;
  for (int64_t r = 0; r < t.rows(); ++r) {
    const int64_t token = t.token0 + r % t.tokens, h = t.head(r);
    pack_row(row_ptr<const T>(params.q, t.seq.batch, t.seq.q_row + token, h), dim, scale, r,
             tile.q);
    const float lse = *stat_ptr(params.lse, t.seq, h, token);
    tile.lse2[r] = lse == -kInf ? kInf : lse * kLog2E;  // no probabilities
  }
  zero_rows(t.rows(), round_up(t.rows(), kMR), dim, tile.q);
}

// P of windows [key0, key0 + n) summed over the heads, for each token.
AF_INLINE void sum_heads(const Task& t, const Tile& tile, const float* panels, int64_t key0,
                         int64_t n) {
  const int64_t dim = t.params.problem.head_dim, width = round_up(n, kNR);
  gemm<1, kMR>(t.rows(), vectors_of(width), dim, tile.q, dim, panels, dim * kNR, tile.s, kLds,
               false);
  for (int64_t token = 0; token < t.tokens; ++token) {
    float* sum = tile.sums + token * kLds;
    const int64_t seen = max64(0, min64(n, t.windows(token) - key0));
    fill(sum, 0, width, 0.0f);
    for (int64_t g = 0; g < t.plan.group; ++g) {
      const int64_t r = g * t.tokens + token;
      const float* s = tile.s + r * kLds;
      const VecF lse2 = splat(tile.lse2[r]);
      for (int64_t c = 0; c < seen; c += kLanes)
        store(sum + c, load(sum + c) + exp2(load(s + c) - lse2));
    }
    mask_row(sum, width, 0, seen, 0.0f);
  }
}

// Sums of windows [key0, key0 + n) into the scores of the blocks that they overlap.
AF_INLINE void add_scores(const Task& t, const Tile& tile, int64_t key0, int64_t n) {
  const int64_t span = t.plan.span, ratio = t.plan.ratio;
  for (int64_t token = 0; token < t.tokens; ++token) {
    const int64_t end = min64(key0 + n, t.windows(token));
    if (end <= key0) continue;
    const float* sum = tile.sums + token * kLds;
    float* scores = tile.scores + token * t.params.blocks;
    const int64_t last = min64(t.params.blocks - 1, (end - 1 + span - 1) / ratio);
    for (int64_t j = key0 / ratio; j <= last; ++j) {
      const int64_t first = max64(key0, j * ratio - span + 1);
      float score = scores[j];
      for (int64_t i = first; i < min64(end, (j + 1) * ratio); ++i) {
        const int64_t strides = min64(i + span, (j + 1) * ratio) - max64(i, j * ratio);
        score += static_cast<float>(strides) * sum[i - key0];
      }
      scores[j] = score;
    }
  }
}

// The n best of scores [0, blocks), ids rising: of equal ones the later one goes first. Forced
// blocks stand at +inf, NaN is never chosen.
AF_INLINE void choose(const NsaSelectParams& params, const Tile& tile, const float* scores,
                      int64_t blocks, int32_t* out) {
  const int64_t n = params.top_n;
  int64_t size = 0;
  for (int64_t j = 0; j < blocks; ++j) {
    const bool forced = j < params.init_blocks || j + params.local_blocks >= blocks;
    const float x = forced ? kInf : scores[j];
    if (!(x > -kInf) || (size == n && !(x >= tile.best[n - 1]))) continue;
    int64_t at = size < n ? size++ : n - 1;
    for (; at > 0 && tile.best[at - 1] <= x; --at) {
      tile.best[at] = tile.best[at - 1];
      tile.ids[at] = tile.ids[at - 1];
    }
    tile.best[at] = x;
    tile.ids[at] = static_cast<int32_t>(j);
  }
  for (int64_t i = 0; i < size; ++i) {  // ascending, by insertion: n is small
    int64_t at = i;
    for (; at > 0 && out[at - 1] > tile.ids[i]; --at) out[at] = out[at - 1];
    out[at] = tile.ids[i];
  }
  for (int64_t i = size; i < n; ++i) out[i] = -1;
}

template <class T>
AF_INLINE void run_task(const Task& t, const Tile& tile, const float* packed) {
  const NsaSelectParams& params = t.params;
  load_rows<T>(t, tile);
  fill(tile.scores, 0, t.tokens * params.blocks, 0.0f);
  int64_t windows = 0;
  for (int64_t token = 0; token < t.tokens; ++token) windows = max64(windows, t.windows(token));
  for (int64_t key0 = 0; key0 < windows; key0 += kKeys) {
    const int64_t n = min64(kKeys, windows - key0);
    sum_heads(t, tile, packed + key0 / kKeys * t.plan.key_floats, key0, n);
    add_scores(t, tile, key0, n);
  }
  for (int64_t token = 0; token < t.tokens; ++token) {
    const float* scores = tile.scores + token * params.blocks;
    const int64_t row = t.output_row(token);
    if (params.importance) {
      __builtin_memcpy(params.importance + row * params.blocks, scores,
                       params.blocks * sizeof(float));
    }
    if (params.indices) {
      choose(params, tile, scores, t.blocks(token), params.indices + row * params.top_n);
    }
  }
}

template <class T>
AF_INLINE void pack_keys(const NsaSelectParams& params, const Sequence& seq, int64_t kv_head,
                         int64_t key0, float* panels) {
  const int64_t dim = params.problem.head_dim, n = min64(kKeys, seq.k_len - key0);
  const T* k = row_ptr<const T>(params.k, seq.batch, seq.k_row + key0, kv_head);
  for (int64_t c = 0; c < n; c += kNR) {
    pack_key_panel(k + c * params.k.seq_stride, params.k.seq_stride, n - c, dim, panels + c * dim);
  }
}

template <class T>
AF_INLINE void run(const NsaSelectParams& params, const Workers& workers) {
  const FlashProblem& p = params.problem;
  const Plan plan = make_plan(params, workers.num_threads);
  Arena tile{nullptr};
  take_tile(tile, params, plan);
  char* base = static_cast<char*>(params.workspace);
  float* packed = reinterpret_cast<float*>(base + tile.used * workers.num_threads);
  const int64_t pairs = p.batch * p.heads_k, slot_floats = plan.key_blocks * plan.key_floats;
  for (int64_t pair0 = 0; pair0 < pairs; pair0 += plan.slots) {
    const int64_t slots = min64(plan.slots, pairs - pair0);
    parallel_tasks(workers, slots * plan.key_blocks, [&](int64_t task, int64_t) {
      const int64_t slot = task / plan.key_blocks, block = task % plan.key_blocks;
      const Sequence seq = sequence(p, (pair0 + slot) / p.heads_k);
      if (block * kKeys >= seq.k_len) return;
      pack_keys<T>(params, seq, (pair0 + slot) % p.heads_k, block * kKeys,
                   packed + slot * slot_floats + block * plan.key_floats);
    });
    parallel_tasks(workers, slots * plan.tasks, [&](int64_t index, int64_t worker) {
      // Late tokens see the most windows: they go first.
      const int64_t token0 = (plan.tasks - 1 - index / slots) * plan.tokens;
      const int64_t slot = index % slots, pair = pair0 + slot;
      const Sequence seq = sequence(p, pair / p.heads_k);
      if (token0 >= seq.q_len) return;
      Arena a{base + worker * tile.used};
      const Task t = {params,           plan,   seq,
                      pair % p.heads_k, token0, min64(plan.tokens, seq.q_len - token0)};
      run_task<T>(t, take_tile(a, params, plan), packed + slot * slot_floats);
    });
  }
}

}  // namespace

int64_t nsa_select_workspace(const NsaSelectParams& params, int64_t num_threads) {
  const Plan plan = make_plan(params, num_threads);
  Arena tile{nullptr};
  take_tile(tile, params, plan);
  return tile.used * num_threads + plan.slots * plan.key_blocks * plan.key_floats * 4;
}

void nsa_select(const NsaSelectParams& params, const Workers& workers) {
  dispatch_dtype(params.problem.dtype,
                 [&](auto element) { run<decltype(element)>(params, workers); });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
