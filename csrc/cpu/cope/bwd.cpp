// Attention under contextual position encoding (CoPE), backward. With dS = P (dP - delta), the
// gradient of a visible logit in natural units, and z' the slope of the row's table at p_ij:
//
//   dp_ij = dS_ij z'(p_ij), 0 at the last position      dx_it = dS_it + g_it (1 - g_it) sum dp_ij,
//   j <= t dT_i  = dS_ij shared out between floor and ceiling  dQ = scale dX K + dT E^T dK = scale
//   dX^T Q    dV = P^T dO                    dE = Q^T dT
//
// Algorithm: a task takes some of the query tiles of a (batch, kv head), one after another. Of each
// it first walks the key blocks from right to left for the gates' sums alone, which it keeps per
// block, until all rows are past the last position; then from left to right for everything else,
// carrying the sums of dp. At a whole position the slope is that to the right.
//
//   phases     1  K and V of a wave of pairs packed     2  the tasks     3  slabs summed and stored
//   chunks     tiles are dealt round-robin to a number of tasks that depends on heads alone: sums,
//              and so results, are the same for any number of threads
//   flops      5 products as in flash, S once more where gates are open, 4 D N per row for the
//   table memory     per wave: fp32 K and V, a slab of dK and dV per chunk; per worker a tile and
//   one
//              number per row and key block: no S x S
//
// Where an operand holds NaN or infinity and a block is hidden in part, products run over visible
// pairs only.
#include "cpu/cope/positions_bwd.h"
#include "cpu/cope/tile.h"
#include "cpu/kernels.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

struct Plan {
  int64_t blocks, tiles, chunks, slots;
  int64_t ldd, ldv;
};

// Packed keys of one (batch, kv head), block after block, and the sums over its queries.
struct Head {
  float *k_panels, *k_columns, *v_panels;
  uint8_t* finite;  // [blocks]: of K
  float *dk, *dv;   // [chunks][blocks * kBlockN + kMR][ldd or ldv]
};

// One worker's: the tile, its dO and gradients.
struct Work {
  Tile tile;
  float *q_panels, *do_groups, *do_panels;
  float *dp, *carries;  // [kBlockM][kLds], [blocks][kBlockM]
  float *lse2, *delta, *left;
  float *dq, *dq_table;  // [kBlockM][ldd]
  float* dtable;         // [padded + kMR][kBlockM]
  float* demb;           // [padded + kMR][ldd]
  float *through, *bent, *above;
  int32_t* index;
};

AF_INLINE int64_t slab_rows(const Plan& plan) {
  return plan.blocks * kBlockN + kMR;
}

AF_INLINE Head take_head(Arena& a, const FlashProblem& p, const Plan& plan) {
  Head head;
  const int64_t keys = plan.blocks * kBlockN;
  head.k_panels = a.take<float>(keys * p.head_dim);
  head.k_columns = a.take<float>(keys * plan.ldd);
  head.v_panels = a.take<float>(keys * p.v_head_dim);
  head.finite = a.take<uint8_t>(plan.blocks);
  head.dk = a.take<float>(plan.chunks * slab_rows(plan) * plan.ldd);
  head.dv = a.take<float>(plan.chunks * slab_rows(plan) * plan.ldv);
  return head;
}

AF_INLINE Work take_work(Arena& a, const CopeBwdParams& params, const Plan& plan) {
  const FlashProblem& p = params.problem;
  const int64_t positions = params.table.padded + kMR;
  Work w;
  w.tile = take_tile(a, p, params.table);
  w.q_panels = a.take<float>(kBlockM * plan.ldd);
  w.do_groups = a.take<float>(kBlockM * p.v_head_dim);
  w.do_panels = a.take<float>(kBlockM * plan.ldv);
  w.dp = a.take<float>(kBlockM * kLds);
  w.carries = a.take<float>(plan.blocks * kBlockM);
  w.lse2 = a.take<float>(kBlockM);
  w.delta = a.take<float>(kBlockM);
  w.left = a.take<float>(kBlockM);
  w.dq = a.take<float>(kBlockM * plan.ldd);
  w.dq_table = a.take<float>(kBlockM * plan.ldd);
  w.dtable = a.take<float>(positions * kBlockM);
  w.demb = a.take<float>(positions * plan.ldd);
  w.through = a.take<float>(kBlockN);
  w.bent = a.take<float>(kBlockN);
  w.above = a.take<float>(kBlockN);
  w.index = a.take<int32_t>(kBlockN);
  return w;
}

AF_INLINE Plan make_plan(const CopeBwdParams& params, int64_t threads) {
  const FlashProblem& p = params.problem;
  Plan plan;
  plan.blocks = max64(1, ceil_div(p.seqlen_k, kBlockN));
  plan.tiles = ceil_div(p.seqlen_q, kBlockM);
  plan.chunks = max64(1, min64(params.chunks, plan.tiles * group_size(p)));
  plan.ldd = padded_columns(p.head_dim);
  plan.ldv = padded_columns(p.v_head_dim);
  Arena head{nullptr};
  take_head(head, p, plan);
  const int64_t enough = ceil_div(2 * threads, plan.chunks);
  plan.slots = max64(1, min64(p.batch * p.heads_k, max64(enough, kWaveBytes / head.used)));
  return plan;
}

template <class T>
AF_INLINE void pack_block(const CopeBwdParams& params, const Sequence& seq, int64_t kv_head,
                          int64_t block, const Plan& plan, const Head& head) {
  const FlashProblem& p = params.problem;
  const int64_t key0 = block * kBlockN, n = min64(kBlockN, seq.k_len - key0);
  const T* k = row_ptr<const T>(params.k, seq.batch, seq.k_row + key0, kv_head);
  const T* v = row_ptr<const T>(params.v, seq.batch, seq.k_row + key0, kv_head);
  for (int64_t c = 0; c < n; c += kNR) {
    pack_key_panel(k + c * params.k.seq_stride, params.k.seq_stride, n - c, p.head_dim,
                   head.k_panels + (key0 + c) * p.head_dim);
    pack_key_panel(v + c * params.v.seq_stride, params.v.seq_stride, n - c, p.v_head_dim,
                   head.v_panels + (key0 + c) * p.v_head_dim);
  }
  head.finite[block] = pack_column_panels(k, params.k.seq_stride, n, p.head_dim, 1.0f,
                                          head.k_columns + key0 * plan.ldd, kBlockN * kNR);
}

// dO, delta and LSE of the tile; rows without probabilities see nothing from here on. Whether all
// operands are finite.
template <class T>
AF_INLINE bool prepare_grads(const CopeBwdParams& params, const TileRows& t, const Work& w) {
  const FlashProblem& p = params.problem;
  bool finite = true;
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t i = t.first + r, row = t.seq.q_row + i, batch = t.seq.batch;
    const T* dout = row_ptr<const T>(params.dout, batch, row, t.head);
    const T* out = row_ptr<const T>(params.out, batch, row, t.head);
    const T* lo =
        params.out_lo.data ? row_ptr<const T>(params.out_lo, batch, row, t.head) : nullptr;
    VecF sum{};
    for (int64_t d = 0; d < p.v_head_dim; d += kLanes) {
      const int64_t n = p.v_head_dim - d;
      VecF o = load_partial(out + d, n);
      if (lo) o += load_partial(lo + d, n);
      sum = fma(load_partial(dout + d, n), o, sum);
    }
    w.delta[r] = reduce_add(sum);
    if (params.dlse.data) w.delta[r] -= *stat_ptr(params.dlse, t.seq, t.head, i);
    w.lse2[r] = *stat_ptr(params.lse, t.seq, t.head, i) * kLog2E;
    w.left[r] = 0.0f;
    if (w.lse2[r] == -kInf) w.tile.keys[r] = {0, 0};
    pack_row(dout, p.v_head_dim, 1.0f, r, w.do_groups);
    finite &=
        pack_column_panels(dout, 0, 1, p.v_head_dim, 1.0f, w.do_panels + r * kNR, kBlockM * kNR);
    const T* q = row_ptr<const T>(params.q, batch, row, t.head);
    finite &= pack_column_panels(q, 0, 1, p.head_dim, 1.0f, w.q_panels + r * kNR, kBlockM * kNR);
  }
  zero_rows(t.rows, round_up(t.rows, kMR), p.v_head_dim, w.do_groups);
  return finite;
}

// The sums of gates right of each block of [first, end), as position_row() would carry them.
AF_INLINE void count_gates(const TileRows& t, const CopeTable& table, const Head& head,
                           const Work& w, int64_t first, int64_t end) {
  const float scale2 = base2_scale(t.p), top = static_cast<float>(table.positions - 1);
  for (int64_t block = end - 1; block >= first; --block) {
    const int64_t key0 = block * kBlockN, keys = min64(kBlockN, t.seq.k_len - key0);
    bool open = false;
    for (int64_t r = 0; r < t.rows; ++r) {
      w.carries[block * kBlockM + r] = w.tile.carry[r];
      open |= !(w.tile.carry[r] >= top) && w.tile.keys[r].lo < w.tile.keys[r].hi;
    }
    if (!open || block == first) continue;
    multiply(t, w.tile, head.k_panels + key0 * t.p.head_dim, keys);
    for (int64_t r = 0; r < t.rows; ++r) {
      count_row(w.tile.s + r * kLds, row_span(w.tile, r, key0, keys), scale2,
                w.tile.table(r, table.positions), w.tile.carry[r]);
    }
  }
}

AF_INLINE void axpy_panels(float a, const float* panels, int64_t panel_stride, int64_t dim,
                           float* y) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    const float* x = panels + d / kNR * panel_stride + d % kNR;
    store(y + d, fma(splat(a), load(x), load(y + d)));
  }
}

// P and dX of a block into dV, dK and dQ.
AF_INLINE void add_products(const TileRows& t, const Plan& plan, const Work& w, int64_t key0,
                            int64_t keys, const float* k_columns, bool by_pairs, float* dk,
                            float* dv) {
  const int64_t d = t.p.head_dim, v_dim = t.p.v_head_dim;
  const float *s = w.tile.s, *dp = w.dp;
  if (!by_pairs) {
    gemm<1, kLds>(keys, vectors_of(v_dim), t.rows, s, 1, w.do_panels, kBlockM * kNR, dv, plan.ldv,
                  true);
    gemm<1, kLds>(keys, vectors_of(d), t.rows, dp, 1, w.q_panels, kBlockM * kNR, dk, plan.ldd,
                  true);
    gemm<kLds, 1>(t.rows, vectors_of(d), keys, dp, kLds, k_columns, kBlockN * kNR, w.dq, plan.ldd,
                  true);
    return;
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    const RowSpan span = row_span(w.tile, r, key0, keys);
    for (int64_t c = span.lo; c < span.hi; ++c) {
      const float prob = s[r * kLds + c], dx = dp[r * kLds + c];
      axpy_panels(prob, w.do_panels + r * kNR, kBlockM * kNR, v_dim, dv + c * plan.ldv);
      axpy_panels(dx, w.q_panels + r * kNR, kBlockM * kNR, d, dk + c * plan.ldd);
      axpy_panels(dx, k_columns + c * kNR, kBlockN * kNR, d, w.dq + r * plan.ldd);
    }
  }
}

template <class T>
AF_INLINE void run_tile(const CopeBwdParams& params, const Plan& plan, const TileRows& t,
                        const PackedTable& packed, const Head& head, int64_t chunk, const Work& w) {
  const FlashProblem& p = params.problem;
  const CopeTable& table = params.table;
  const float scale2 = base2_scale(p);
  const Interval some = prepare_rows<T>(t, params.q, table, packed, w.tile);
  const bool finite = prepare_grads<T>(params, t, w);
  const int64_t first = some.lo / kBlockN, end = ceil_div(some.hi, kBlockN);
  count_gates(t, table, head, w, first, end);
  fill(w.dq, 0, kBlockM * plan.ldd, 0.0f);
  fill(w.dtable, 0, (table.padded + kMR) * kBlockM, 0.0f);
  float* dk = head.dk + chunk * slab_rows(plan) * plan.ldd;
  float* dv = head.dv + chunk * slab_rows(plan) * plan.ldv;
  for (int64_t block = first; block < end; ++block) {
    const int64_t key0 = block * kBlockN, keys = min64(kBlockN, t.seq.k_len - key0);
    multiply(t, w.tile, head.k_panels + key0 * p.head_dim, keys);
    gemm<1, kMR>(t.rows, vectors_of(round_up(keys, kNR)), p.v_head_dim, w.do_groups, p.v_head_dim,
                 head.v_panels + key0 * p.v_head_dim, p.v_head_dim * kNR, w.dp, kLds, false);
    for (int64_t r = 0; r < t.rows; ++r) {
      const RowSpan span = row_span(w.tile, r, key0, keys);
      float *s = w.tile.s + r * kLds, *dp = w.dp + r * kLds;
      if (span.lo == span.hi) {
        fill(s, 0, span.n, 0.0f);
        fill(dp, 0, span.n, 0.0f);
        continue;
      }
      const CopeGradRow row = {s,       dp,        w.through,  w.bent,       w.above,
                               w.index, w.lse2[r], w.delta[r], w.dtable + r, kBlockM};
      differentiate_positions(row, span, scale2, w.tile.table(r, table.positions),
                              w.carries[block * kBlockM + r], w.left[r]);
    }
    const bool by_pairs = !(finite && head.finite[block]) && !sees_whole(t, w.tile, key0, keys);
    add_products(t, plan, w, key0, keys, head.k_columns + key0 * plan.ldd, by_pairs,
                 dk + key0 * plan.ldd, dv + key0 * plan.ldv);
  }
  gemm<1, kBlockM>(t.rows, vectors_of(p.head_dim), table.padded, w.dtable, 1, packed.rows,
                   table.padded * kNR, w.dq_table, plan.ldd, false);
  for (int64_t r = 0; r < t.rows; ++r) {
    float *dq = w.dq + r * plan.ldd, *add = w.dq_table + r * plan.ldd;
    for (int64_t d = 0; d < plan.ldd; d += kLanes) {
      store(dq + d, fma(load(dq + d), splat(p.softmax_scale), load(add + d)));
    }
    store_output<T>(dq, 1.0f, p.head_dim,
                    row_ptr<T>(params.dq, t.seq.batch, t.seq.q_row + t.first + r, t.head), nullptr);
  }
  for (int64_t r = 0; r < t.rows; ++r) {  // a NaN in a row that sees nothing is not for dE
    if (w.tile.keys[r].lo < w.tile.keys[r].hi) continue;
    for (int64_t d = 0; d < plan.ldd; d += kNR) {
      fill(w.q_panels + d * kBlockM + r * kNR, 0, kNR, 0.0f);
    }
  }
  gemm<kBlockM, 1>(table.padded, vectors_of(p.head_dim), t.rows, w.dtable, kBlockM, w.q_panels,
                   kBlockM * kNR, w.demb, plan.ldd, false);
  float* demb = params.dtable + ((t.seq.batch * p.heads_q + t.head) * params.chunks + chunk) *
                                    table.padded * p.head_dim;
  for (int64_t n = 0; n < table.positions; ++n) {
    for (int64_t d = 0; d < p.head_dim; d += kLanes) {
      float* sum = demb + n * p.head_dim + d;
      store_partial(sum, load_partial(sum, p.head_dim - d) + load(w.demb + n * plan.ldd + d),
                    p.head_dim - d);
    }
  }
}

// Phase 3: the slabs of a block of keys, summed in order; keys that nobody may see get zeros.
template <class T>
AF_INLINE void store_block(const CopeBwdParams& params, const Sequence& seq, int64_t kv_head,
                           int64_t block, const Plan& plan, const Head& head) {
  const FlashProblem& p = params.problem;
  const int64_t end = min64(seq.k_rows, (block + 1) * kBlockN);
  auto sum_row = [&](const TensorRef& out, const float* slab, int64_t ld, int64_t dim, float factor,
                     int64_t key) {
    T* row = row_ptr<T>(out, seq.batch, seq.k_row + key, kv_head);
    const bool real = key < seq.k_len && seq.q_len > 0;
    for (int64_t d = 0; d < dim; d += kLanes) {
      VecF sum{};
      for (int64_t c = 0; c < plan.chunks && real; ++c) {
        sum += load(slab + (c * slab_rows(plan) + key) * ld + d);
      }
      store_partial(row + d, sum * splat(factor), dim - d);
    }
  };
  for (int64_t key = block * kBlockN; key < end; ++key) {
    sum_row(params.dk, head.dk, plan.ldd, p.head_dim, p.softmax_scale, key);
    sum_row(params.dv, head.dv, plan.ldv, p.v_head_dim, 1.0f, key);
  }
}

struct Memory {
  char *tables, *works, *heads;
  int64_t work_bytes, head_bytes;
};

AF_INLINE int64_t place(Memory& memory, const CopeBwdParams& params, const Plan& plan,
                        int64_t threads) {
  Arena work{nullptr}, head{nullptr};
  take_work(work, params, plan);
  take_head(head, params.problem, plan);
  memory.work_bytes = work.used, memory.head_bytes = head.used;
  memory.tables = static_cast<char*>(params.workspace);
  memory.works = memory.tables + tables_bytes(params.problem, params.table);
  memory.heads = memory.works + work.used * threads;
  return memory.heads - memory.tables + head.used * plan.slots;
}

template <class T>
AF_INLINE void run(const CopeBwdParams& params, const Workers& workers) {
  const FlashProblem& p = params.problem;
  const Plan plan = make_plan(params, workers.num_threads);
  Memory memory;
  place(memory, params, plan, workers.num_threads);
  auto head_at = [&](int64_t slot) {
    Arena a{memory.heads + slot * memory.head_bytes};
    return take_head(a, p, plan);
  };
  pack_tables(workers, memory.tables, p, params.table);
  const int64_t pairs = p.batch * p.heads_k, group = group_size(p);
  for (int64_t pair0 = 0; pair0 < pairs; pair0 += plan.slots) {
    const int64_t slots = min64(plan.slots, pairs - pair0);
    parallel_tasks(workers, slots * plan.blocks, [&](int64_t task, int64_t) {
      const int64_t slot = task / plan.blocks, block = task % plan.blocks, pair = pair0 + slot;
      const Sequence seq = sequence(p, pair / p.heads_k);
      if (seq.q_len == 0 || block * kBlockN >= seq.k_len) return;
      pack_block<T>(params, seq, pair % p.heads_k, block, plan, head_at(slot));
    });
    parallel_tasks(workers, slots * plan.chunks, [&](int64_t task, int64_t worker) {
      const int64_t slot = task / plan.chunks, chunk = task % plan.chunks, pair = pair0 + slot;
      const Sequence seq = sequence(p, pair / p.heads_k);
      const Head head = head_at(slot);
      Arena a{memory.works + worker * memory.work_bytes};
      const Work w = take_work(a, params, plan);
      fill(head.dk + chunk * slab_rows(plan) * plan.ldd, 0, slab_rows(plan) * plan.ldd, 0.0f);
      fill(head.dv + chunk * slab_rows(plan) * plan.ldv, 0, slab_rows(plan) * plan.ldv, 0.0f);
      const int64_t tiles = ceil_div(seq.q_len, kBlockM);
      for (int64_t index = chunk; index < tiles * group; index += plan.chunks) {
        const int64_t q_head = pair % p.heads_k * group + index / tiles;
        const int64_t first = index % tiles * kBlockM;
        const TileRows t{p, seq, q_head, first, min64(kBlockM, seq.q_len - first)};
        run_tile<T>(params, plan, t, table_of(memory.tables, p, params.table, q_head), head, chunk,
                    w);
      }
    });
    parallel_tasks(workers, slots * plan.blocks, [&](int64_t task, int64_t) {
      const int64_t slot = task / plan.blocks, pair = pair0 + slot;
      const Sequence seq = sequence(p, pair / p.heads_k);
      store_block<T>(params, seq, pair % p.heads_k, task % plan.blocks, plan, head_at(slot));
    });
  }
}

}  // namespace

int64_t cope_bwd_workspace(const CopeBwdParams& params, int64_t num_threads) {
  Memory memory;
  return place(memory, params, make_plan(params, num_threads), num_threads);
}

void cope_bwd(const CopeBwdParams& params, const Workers& workers) {
  dispatch_dtype(params.problem.dtype,
                 [&](auto element) { run<decltype(element)>(params, workers); });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
