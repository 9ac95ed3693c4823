// NSA's compressed branch together with the choice of blocks that follows from it.
//
//   o_h = sum_i P_hi v_i,  P_hi = 2^(s_hi - m_h) / l_h       windows that the query sees
//   p_j = sum_i overlap(i, j) sum_h P_hi                     scores of blocks, see select.cpp
//
// A task is a few tokens with all heads of a KV head. Its scores S of all windows stay where they
// are: the maximum, weights and sums, P V, and the weights over the heads once their sums are
// known. So Q K^T and its exponentials are computed once for attention and choice.
//
//   tile     48 rows (heads x tokens) x all windows: S takes 200 KiB at 1024 windows. Where it
//            exceeds the caches it is written and read once more, 12 bytes for the 2 D flops of a
//            score that is not computed again
//   flops    2 (D + Dv) per (query, visible window), one exp2 each
//   bytes    Q, O once; K, V packed once per KV head, then from cache once per tile
//   order    (batch, KV head) in waves whose packed keys stay inside kWaveBytes
//
// A row's result depends on its own query and the windows that it sees alone: the same bits for any
// number of threads and any batch. NaN in a window that a query does not see is masked.
#include "cpu/flash/operands.h"
#include "cpu/kernels.h"
#include "cpu/nsa/choice.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kRows = 48;
constexpr int64_t kWaveBytes = 8 << 20;

// Packed K and V of one KV head, block after block.
struct PackedHead {
  float* k;         // [blocks][kWindows / kNR][D][kNR]
  float* v;         // [blocks][Dv / kNR][kWindows][kNR]
  uint8_t* finite;  // [blocks]: every V element of the block is finite
};

struct Tile {
  float* q;  // row groups, scaled
  float* s;  // [blocks][rows][kWindowLds]
  float* o;  // [rows][ldo]
  float* m;
  float* l;
  float* part;  // what a weight is multiplied by: 1 / l
  Choice choice;
};

struct Plan : TaskPlan {
  int64_t ldo, k_floats, v_floats;  // of a key block
};

AF_INLINE Plan make_plan(const NsaAttendParams& params, int64_t threads) {
  const FlashProblem& p = params.select.problem;
  const int64_t ldo = padded_columns(p.v_head_dim);
  const int64_t k_floats = kWindows * p.head_dim, v_floats = kWindows * ldo;
  return {plan_tasks(p, kRows, k_floats + v_floats, kWaveBytes, threads), ldo, k_floats, v_floats};
}

AF_INLINE PackedHead take_head(Arena& a, const Plan& plan) {
  PackedHead head;
  head.k = a.take<float>(plan.key_blocks * plan.k_floats);
  head.v = a.take<float>(plan.key_blocks * plan.v_floats);
  head.finite = a.take<uint8_t>(plan.key_blocks);
  return head;
}

AF_INLINE Tile take_tile(Arena& a, const NsaAttendParams& params, const Plan& plan) {
  Tile tile;
  const int64_t rows = round_up(plan.rows, kMR);
  tile.q = a.take<float>(rows * params.select.problem.head_dim);
  tile.s = a.take<float>(plan.key_blocks * rows * kWindowLds);
  tile.o = a.take<float>(rows * plan.ldo);
  tile.m = a.take<float>(rows);
  tile.l = a.take<float>(rows);
  tile.part = a.take<float>(rows);
  tile.choice = take_choice(a, params.select, plan.tokens);
  return tile;
}

template <class T>
AF_INLINE void pack_block(const NsaAttendParams& params, const Plan& plan, const Sequence& seq,
                          int64_t kv_head, int64_t block, const PackedHead& head) {
  const FlashProblem& p = params.select.problem;
  const TensorRef &k = params.select.k, &v = params.v;
  const int64_t key0 = block * kWindows, n = min64(kWindows, seq.k_len - key0);
  const T* k_rows = row_ptr<const T>(k, seq.batch, seq.k_row + key0, kv_head);
  for (int64_t c = 0; c < n; c += kNR) {
    pack_key_panel(k_rows + c * k.seq_stride, k.seq_stride, n - c, p.head_dim,
                   head.k + block * plan.k_floats + c * p.head_dim);
  }
  head.finite[block] =
      pack_column_panels(row_ptr<const T>(v, seq.batch, seq.k_row + key0, kv_head), v.seq_stride, n,
                         p.v_head_dim, 1.0f, head.v + block * plan.v_floats, kWindows * kNR);
}

template <class T>
AF_INLINE void load_rows(const Task& t, const Tile& tile) {
  const NsaSelectParams& params = t.params;
  const int64_t dim = params.problem.head_dim;
  const float scale = params.problem.softmax_scale * kLog2E;
  auto row = [&](int64_t r) __attribute__((always_inline)) {
    const int64_t token = t.seq.q_row + t.token0 + r % t.tokens;
    return row_ptr<const T>(params.q, t.seq.batch, token, t.head(r));
  };
  for (int64_t r = 0; r < t.rows(); ++r) {
    if (r + kRowsAhead < t.rows()) prefetch_row(row(r + kRowsAhead), dim);
    pack_row(row(r), dim, scale, r, tile.q);
    tile.m[r] = -kInf;
    tile.l[r] = 0.0f;
  }
  zero_rows(t.rows(), round_up(t.rows(), kMR), dim, tile.q);
}

// One block of windows for a task's rows: [key0, key0 + n).
struct Block {
  float* s;  // [rows][kWindowLds]
  int64_t key0, n;

  AF_INLINE_MEMBER int64_t seen(const Task& t, int64_t r) const {
    return max64(0, min64(n, t.windows(r % t.tokens) - key0));
  }
};

// Scores, hidden ones -inf, and the maximum so far.
AF_INLINE void score_block(const Task& t, const Tile& tile, const Block& b, const float* panels) {
  const int64_t dim = t.params.problem.head_dim, width = round_up(b.n, kNR);
  gemm<1, kMR>(t.rows(), vectors_of(width), dim, tile.q, dim, panels, dim * kNR, b.s, kWindowLds,
               false);
  for (int64_t r = 0; r < t.rows(); ++r) {
    float* s = b.s + r * kWindowLds;
    mask_row(s, width, 0, b.seen(t, r), -kInf);
    VecF max0 = splat(tile.m[r]), max1 = max0;
    for (int64_t c = 0; c < width; c += kNR) {
      max0 = vmax(load(s + c), max0);
      max1 = vmax(load(s + c + kLanes), max1);
    }
    const float most = reduce_max(vmax(max0, max1));
    if (most > tile.m[r]) tile.m[r] = most;
  }
}

// Scores to weights that lack their sum, and O += P V.
AF_INLINE void weigh_block(const Task& t, const Plan& plan, const Tile& tile, const Block& b,
                           const float* v, bool finite) {
  const int64_t width = round_up(b.n, kNR);
  const int64_t vectors = vectors_of(t.params.problem.v_head_dim);
  for (int64_t r = 0; r < t.rows(); ++r) {
    float* s = b.s + r * kWindowLds;
    const VecF base = splat(tile.m[r] == -kInf ? 0.0f : tile.m[r]);
    VecF sum0{}, sum1{};
    for (int64_t c = 0; c < width; c += kNR) {
      const VecF p0 = exp2(load(s + c) - base), p1 = exp2(load(s + c + kLanes) - base);
      store(s + c, p0);
      store(s + c + kLanes, p1);
      sum0 += p0;
      sum1 += p1;
    }
    tile.l[r] += reduce_add(sum0 + sum1);
  }
  if (finite) {
    gemm<kWindowLds, 1>(t.rows(), vectors, b.n, b.s, kWindowLds, v, kWindows * kNR, tile.o,
                        plan.ldo, true);
    return;
  }
  for (int64_t r = 0; r < t.rows(); ++r) {
    Operands::add_seen_values([](int64_t) { return true; }, b.s + r * kWindowLds, 0, b.seen(t, r),
                              v, kWindows * kNR, vectors, tile.o + r * plan.ldo);
  }
}

// P summed over the heads, for each token.
AF_INLINE void sum_heads(const Task& t, const Tile& tile, const Block& b) {
  const int64_t width = round_up(b.n, kNR), group = t.plan.group;
  for (int64_t token = 0; token < t.tokens; ++token) {
    const float* s = b.s + token * kWindowLds;
    const float* part = tile.part + token;
    float* sum = tile.choice.sums + token * kWindowLds;
    for (int64_t c = 0; c < width; c += kNR) {
      VecF sum0{}, sum1{};
      for (int64_t g = 0; g < group; ++g) {
        const float* row = s + g * t.tokens * kWindowLds + c;
        const VecF scale = splat(part[g * t.tokens]);
        sum0 = fma(load(row), scale, sum0);
        sum1 = fma(load(row + kLanes), scale, sum1);
      }
      store(sum + c, sum0);
      store(sum + c + kLanes, sum1);
    }
  }
}

template <class T>
AF_INLINE void run_task(const NsaAttendParams& params, const Plan& plan, const Task& t,
                        const Tile& tile, const PackedHead& head) {
  const FlashProblem& p = params.select.problem;
  load_rows<T>(t, tile);
  fill(tile.o, 0, round_up(t.rows(), kMR) * plan.ldo, 0.0f);
  fill(tile.choice.scores, 0, t.tokens * params.select.blocks, 0.0f);
  const int64_t windows = t.most_windows(), blocks = ceil_div(windows, kWindows);
  auto block = [&](int64_t i) __attribute__((always_inline)) -> Block {
    const int64_t key0 = i * kWindows;
    return {tile.s + i * round_up(plan.rows, kMR) * kWindowLds, key0,
            min64(kWindows, windows - key0)};
  };
  for (int64_t i = 0; i < blocks; ++i) score_block(t, tile, block(i), head.k + i * plan.k_floats);
  for (int64_t i = 0; i < blocks; ++i)
    weigh_block(t, plan, tile, block(i), head.v + i * plan.v_floats, head.finite[i]);
  for (int64_t r = 0; r < t.rows(); ++r) {
    const int64_t h = t.head(r), token = t.token0 + r % t.tokens;
    const RowEnd end = finish_softmax(tile.m[r], tile.l[r], -kInf);
    *stat_ptr(params.select.lse, t.seq, h, token) = end.lse;
    store_output(tile.o + r * plan.ldo, end.scale, p.v_head_dim,
                 row_ptr<T>(params.out, t.seq.batch, t.seq.q_row + token, h),
                 static_cast<T*>(nullptr));
    tile.part[r] = end.scale;
  }
  for (int64_t i = 0; i < blocks; ++i) {
    const Block b = block(i);
    sum_heads(t, tile, b);
    add_scores(t, tile.choice, b.key0, b.n);
  }
  store_choice(t, tile.choice);
}

template <class T>
AF_INLINE void run(const NsaAttendParams& params, const Workers& workers) {
  const FlashProblem& p = params.select.problem;
  const Plan plan = make_plan(params, workers.num_threads);
  Arena tile{nullptr}, head{nullptr};
  take_tile(tile, params, plan);
  take_head(head, plan);
  char* base = static_cast<char*>(params.select.workspace);
  char* heads = base + tile.used * workers.num_threads;
  auto head_at = [&](int64_t slot) {
    Arena a{heads + slot * head.used};
    return take_head(a, plan);
  };
  const int64_t pairs = p.batch * p.heads_k;
  for (int64_t pair0 = 0; pair0 < pairs; pair0 += plan.slots) {
    const int64_t slots = min64(plan.slots, pairs - pair0);
    for_key_blocks(p, plan, workers, pair0, slots,
                   [&](const Sequence& seq, int64_t kv_head, int64_t block, int64_t slot) {
                     pack_block<T>(params, plan, seq, kv_head, block, head_at(slot));
                   });
    for_tasks(params.select, plan, workers, pair0, slots,
              [&](const Task& t, int64_t slot, int64_t worker) {
                Arena a{base + worker * tile.used};
                run_task<T>(params, plan, t, take_tile(a, params, plan), head_at(slot));
              });
  }
}

}  // namespace

int64_t nsa_attend_workspace(const NsaAttendParams& params, int64_t num_threads) {
  const Plan plan = make_plan(params, num_threads);
  Arena tile{nullptr}, head{nullptr};
  take_tile(tile, params, plan);
  take_head(head, plan);
  return tile.used * num_threads + head.used * plan.slots;
}

void nsa_attend(const NsaAttendParams& params, const Workers& workers) {
  dispatch_dtype(params.select.problem.dtype,
                 [&](auto element) { run<decltype(element)>(params, workers); });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
