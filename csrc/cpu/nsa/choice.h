// What importance and choice of blocks share: the tokens of a task, sums over heads to scores of
// blocks, scores to the blocks that a token picks.
#pragma once

#include "attnforge/nsa.h"
#include "cpu/flash/problem.h"
#include "cpu/micro/parallel.h"
#include "cpu/micro/softmax.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int64_t kWindows = 256;              // compressed keys of one product
constexpr int64_t kWindowLds = kWindows + 16;  // off the power of two: rows do not share L1 sets

struct TaskPlan {
  int64_t group, tokens, rows;  // of a task
  int64_t tasks;                // of the longest sequence and one KV head
  int64_t key_blocks, slots;    // of the longest sequence; (batch, KV head) pairs per wave
};

// rows: about so many of a task. block_floats: packed floats of a key block, of which a wave holds
// no more than wave_bytes.
AF_INLINE TaskPlan plan_tasks(const FlashProblem& p, int64_t rows, int64_t block_floats,
                              int64_t wave_bytes, int64_t threads) {
  TaskPlan plan;
  plan.group = group_size(p);
  plan.tokens = max64(1, rows / plan.group);
  plan.rows = plan.tokens * plan.group;
  plan.tasks = max64(1, ceil_div(p.seqlen_q, plan.tokens));
  plan.key_blocks = max64(1, ceil_div(p.seqlen_k, kWindows));
  const int64_t in_cache = wave_bytes / (plan.key_blocks * block_floats * 4);
  const int64_t enough = ceil_div(4 * threads, plan.tasks);
  plan.slots = max64(1, min64(p.batch * p.heads_k, max64(enough, in_cache)));
  return plan;
}

struct Choice {
  float* sums;    // [tokens][kWindowLds]: P of windows, summed over heads
  float* scores;  // [tokens][blocks]
  float* best;    // [top_n], the chosen ones of one token, best first
  int32_t* ids;   // [top_n]
};

AF_INLINE Choice take_choice(Arena& a, const NsaSelectParams& params, int64_t tokens) {
  Choice choice;
  choice.sums = a.take<float>(tokens * kWindowLds);
  choice.scores = a.take<float>(tokens * params.blocks);
  choice.best = a.take<float>(params.top_n);
  choice.ids = a.take<int32_t>(params.top_n);
  return choice;
}

// Some tokens of one sequence with the query heads of a KV head: rows of products, head by head.
struct Task {
  const NsaSelectParams& params;
  const TaskPlan& plan;
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
  // The most that one of the tokens sees.
  AF_INLINE_MEMBER int64_t most_windows() const {
    int64_t most = 0;
    for (int64_t token = 0; token < tokens; ++token) most = max64(most, windows(token));
    return most;
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

// Sums of windows [key0, key0 + n) into the scores of the blocks that they overlap.
AF_INLINE void add_scores(const Task& t, const Choice& choice, int64_t key0, int64_t n) {
  const int64_t span = t.params.cmp_block / t.params.cmp_stride;
  const int64_t ratio = t.params.slc_block / t.params.cmp_stride;
  for (int64_t token = 0; token < t.tokens; ++token) {
    const int64_t end = min64(key0 + n, t.windows(token));
    if (end <= key0) continue;
    const float* sum = choice.sums + token * kWindowLds;
    float* scores = choice.scores + token * t.params.blocks;
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
AF_INLINE void pick(const NsaSelectParams& params, const Choice& choice, const float* scores,
                    int64_t blocks, int32_t* out) {
  const int64_t n = params.top_n;
  int64_t size = 0;
  for (int64_t j = 0; j < blocks; ++j) {
    const bool forced = j < params.init_blocks || j + params.local_blocks >= blocks;
    const float x = forced ? kInf : scores[j];
    if (!(x > -kInf) || (size == n && !(x >= choice.best[n - 1]))) continue;
    int64_t at = size < n ? size++ : n - 1;
    for (; at > 0 && choice.best[at - 1] <= x; --at) {
      choice.best[at] = choice.best[at - 1];
      choice.ids[at] = choice.ids[at - 1];
    }
    choice.best[at] = x;
    choice.ids[at] = static_cast<int32_t>(j);
  }
  for (int64_t i = 0; i < size; ++i) {  // ascending, by insertion: n is small
    int64_t at = i;
    for (; at > 0 && out[at - 1] > choice.ids[i]; --at) out[at] = out[at - 1];
    out[at] = choice.ids[i];
  }
  for (int64_t i = size; i < n; ++i) out[i] = -1;
}

// What each token of a task picks, or its scores as they are.
AF_INLINE void store_choice(const Task& t, const Choice& choice) {
  const NsaSelectParams& params = t.params;
  for (int64_t token = 0; token < t.tokens; ++token) {
    const float* scores = choice.scores + token * params.blocks;
    const int64_t row = t.output_row(token);
    if (params.importance) {
      __builtin_memcpy(params.importance + row * params.blocks, scores,
                       params.blocks * sizeof(float));
    }
    if (params.indices) {
      pick(params, choice, scores, t.blocks(token), params.indices + row * params.top_n);
    }
  }
}

// Calls f(t, slot, worker) for all tasks of a wave of `slots` pairs from pair0 on.
template <class F>
AF_INLINE void for_tasks(const NsaSelectParams& params, const TaskPlan& plan,
                         const Workers& workers, int64_t pair0, int64_t slots, const F& f) {
  const FlashProblem& p = params.problem;
  parallel_tasks(workers, slots * plan.tasks, [&](int64_t index, int64_t worker) {
    // Late tokens see the most windows: they go first.
    const int64_t token0 = (plan.tasks - 1 - index / slots) * plan.tokens;
    const int64_t slot = index % slots, pair = pair0 + slot;
    const Sequence seq = sequence(p, pair / p.heads_k);
    if (token0 >= seq.q_len) return;
    f(Task{params, plan, seq, pair % p.heads_k, token0, min64(plan.tokens, seq.q_len - token0)},
      slot, worker);
  });
}

// Calls f(seq, kv_head, block, slot) for all key blocks of a wave.
template <class F>
AF_INLINE void for_key_blocks(const FlashProblem& p, const TaskPlan& plan, const Workers& workers,
                              int64_t pair0, int64_t slots, const F& f) {
  parallel_tasks(workers, slots * plan.key_blocks, [&](int64_t task, int64_t) {
    const int64_t slot = task / plan.key_blocks, block = task % plan.key_blocks;
    const Sequence seq = sequence(p, (pair0 + slot) / p.heads_k);
    if (block * kWindows < seq.k_len) f(seq, (pair0 + slot) % p.heads_k, block, slot);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
