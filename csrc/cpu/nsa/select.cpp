// Block importance of attention to compressed keys, and NSA's top-n blocks by it.
//
//   P_hi = 2^(s_hi - lse_h)                     windows that the query sees, 0 for others
//   p_j  = sum_i overlap(i, j) sum_h P_hi       h over the query heads of a KV head
//
// A task is a few tokens with all heads of a KV head, as rows of one product. It goes through the
// windows in blocks: S = Q K^T, P, the sum over heads [tokens][kWindows], and from it into the
// scores [tokens][blocks] of the task. Then each token picks its blocks. What is held is one task's
// scores: no S x N buffer, unless the importance itself is what is asked for.
//
//   tile     96 rows (heads x tokens) x 256 windows
//   flops    2 D per (query, visible window), one exp2 each
//   bytes    Q once; K packed once per KV head, then from cache once per tile
//   order    (batch, KV head) in waves whose packed keys stay inside kWaveBytes
//
// Windows are summed in the order of the keys and heads in the order of the group, so a score
// depends on its own query and keys alone. NaN in a window that a query does not see is masked.
#include "cpu/kernels.h"
#include "cpu/micro/pack.h"
#include "cpu/nsa/choice.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kRows = 96;
constexpr int64_t kWaveBytes = 8 << 20;

struct Tile {
  float* q;     // row groups, scaled
  float* s;     // [rows][kWindowLds]
  float* lse2;  // [rows]
  Choice choice;
};

AF_INLINE int64_t block_floats(const FlashProblem& p) {
  return kWindows * p.head_dim;
}

AF_INLINE TaskPlan make_plan(const NsaSelectParams& params, int64_t threads) {
  const FlashProblem& p = params.problem;
  return plan_tasks(p, kRows, block_floats(p), kWaveBytes, threads);
}

AF_INLINE Tile take_tile(Arena& a, const NsaSelectParams& params, const TaskPlan& plan) {
  Tile tile;
  const int64_t rows = round_up(plan.rows, kMR);
  tile.q = a.take<float>(rows * params.problem.head_dim);
  tile.s = a.take<float>(rows * kWindowLds);
  tile.lse2 = a.take<float>(rows);
  tile.choice = take_choice(a, params, plan.tokens);
  return tile;
}

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
  gemm<1, kMR>(t.rows(), vectors_of(width), dim, tile.q, dim, panels, dim * kNR, tile.s, kWindowLds,
               false);
  for (int64_t token = 0; token < t.tokens; ++token) {
    float* sum = tile.choice.sums + token * kWindowLds;
    const int64_t seen = max64(0, min64(n, t.windows(token) - key0));
    fill(sum, 0, width, 0.0f);
    for (int64_t g = 0; g < t.plan.group; ++g) {
      const int64_t r = g * t.tokens + token;
      const float* s = tile.s + r * kWindowLds;
      const VecF lse2 = splat(tile.lse2[r]);
      for (int64_t c = 0; c < seen; c += kLanes)
        store(sum + c, load(sum + c) + exp2(load(s + c) - lse2));
    }
    mask_row(sum, width, 0, seen, 0.0f);
  }
}

template <class T>
AF_INLINE void run_task(const Task& t, const Tile& tile, const float* packed) {
  load_rows<T>(t, tile);
  fill(tile.choice.scores, 0, t.tokens * t.params.blocks, 0.0f);
  const int64_t windows = t.most_windows();
  for (int64_t key0 = 0; key0 < windows; key0 += kWindows) {
    const int64_t n = min64(kWindows, windows - key0);
    sum_heads(t, tile, packed + key0 * t.params.problem.head_dim, key0, n);
    add_scores(t, tile.choice, key0, n);
  }
  store_choice(t, tile.choice);
}

template <class T>
AF_INLINE void pack_keys(const NsaSelectParams& params, const Sequence& seq, int64_t kv_head,
                         int64_t key0, float* panels) {
  const int64_t dim = params.problem.head_dim, n = min64(kWindows, seq.k_len - key0);
  const T* k = row_ptr<const T>(params.k, seq.batch, seq.k_row + key0, kv_head);
  for (int64_t c = 0; c < n; c += kNR) {
    pack_key_panel(k + c * params.k.seq_stride, params.k.seq_stride, n - c, dim, panels + c * dim);
  }
}

template <class T>
AF_INLINE void run(const NsaSelectParams& params, const Workers& workers) {
  const FlashProblem& p = params.problem;
  const TaskPlan plan = make_plan(params, workers.num_threads);
  Arena tile{nullptr};
  take_tile(tile, params, plan);
  char* base = static_cast<char*>(params.workspace);
  float* packed = reinterpret_cast<float*>(base + tile.used * workers.num_threads);
  const int64_t pairs = p.batch * p.heads_k, slot_floats = plan.key_blocks * block_floats(p);
  for (int64_t pair0 = 0; pair0 < pairs; pair0 += plan.slots) {
    const int64_t slots = min64(plan.slots, pairs - pair0);
    for_key_blocks(p, plan, workers, pair0, slots,
                   [&](const Sequence& seq, int64_t kv_head, int64_t block, int64_t slot) {
                     pack_keys<T>(params, seq, kv_head, block * kWindows,
                                  packed + slot * slot_floats + block * block_floats(p));
                   });
    for_tasks(params, plan, workers, pair0, slots,
              [&](const Task& t, int64_t slot, int64_t worker) {
                Arena a{base + worker * tile.used};
                run_task<T>(t, take_tile(a, params, plan), packed + slot * slot_floats);
              });
  }
}

}  // namespace

int64_t nsa_select_workspace(const NsaSelectParams& params, int64_t num_threads) {
  const TaskPlan plan = make_plan(params, num_threads);
  Arena tile{nullptr};
  take_tile(tile, params, plan);
  return tile.used * num_threads + plan.slots * plan.key_blocks * block_floats(params.problem) * 4;
}

void nsa_select(const NsaSelectParams& params, const Workers& workers) {
  dispatch_dtype(params.problem.dtype,
                 [&](auto element) { run<decltype(element)>(params, workers); });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
