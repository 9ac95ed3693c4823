// Attention under contextual position encoding (CoPE; Golovneva et al., 2024), forward.
//
//   s_ij = x_ij + z_i(p_ij),  p_ij = sum of sigmoid(x_it) over visible t >= j, capped
//   O = softmax(S) V
//
// Algorithm: tiles of 48 query rows of one head against blocks of 96 keys, from right to left, so
// that the sum of gates right of a block is all that a row carries besides its softmax state. The
// table z_i is linear between T = Q E, one product per tile. Online softmax and O += P V go as in
// flash; the order of keys does not matter to them.
//
//   packing    K and V of each (batch, kv head) once, in waves inside kWaveBytes, as in flash
//   flops      2 (D + Dv) per visible pair, 2 D N per row for its table of N positions; per score a
//              logistic function, a scan over the lanes and two table look-ups, until the gates of
//              a row have added up to the last position
//   memory     packed fp32 K and V of a wave, a tile and its tables per worker: no S x S
//
// A hidden key has no gate, and its NaN reaches nobody. Results depend on neither batch nor
// threads.
#include "cpu/cope/tile.h"
#include "cpu/kernels.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

struct Plan {
  int64_t blocks, tiles, slots, ldo;
};

struct PackedHead {
  float* k;         // [blocks][kBlockN / kNR][D][kNR]
  float* v;         // [blocks][Dv / kNR][kBlockN][kNR]
  uint8_t* finite;  // [blocks]: of V
};

struct Sums {
  float *o, *m, *l;  // [kBlockM][ldo], [kBlockM]
};

AF_INLINE PackedHead take_head(Arena& a, const FlashProblem& p, const Plan& plan) {
  PackedHead head;
  head.k = a.take<float>(plan.blocks * kBlockN * p.head_dim);
  head.v = a.take<float>(plan.blocks * kBlockN * plan.ldo);
  head.finite = a.take<uint8_t>(plan.blocks);
  return head;
}

AF_INLINE Sums take_sums(Arena& a, const Plan& plan) {
  Sums sums;
  sums.o = a.take<float>(kBlockM * plan.ldo);
  sums.m = a.take<float>(kBlockM);
  sums.l = a.take<float>(kBlockM);
  return sums;
}

AF_INLINE Plan make_plan(const FlashProblem& p, int64_t threads) {
  Plan plan;
  plan.blocks = max64(1, ceil_div(p.seqlen_k, kBlockN));
  plan.tiles = ceil_div(p.seqlen_q, kBlockM);
  plan.ldo = padded_columns(p.v_head_dim);
  const int64_t bytes = plan.blocks * kBlockN * (p.head_dim + plan.ldo) * 4;
  const int64_t enough = ceil_div(4 * threads, max64(1, plan.tiles * group_size(p)));
  plan.slots = max64(1, min64(p.batch * p.heads_k, max64(enough, kWaveBytes / bytes)));
  return plan;
}

template <class T>
AF_INLINE void pack_block(const CopeFwdParams& params, const Plan& plan, const Sequence& seq,
                          int64_t kv_head, int64_t block, const PackedHead& head) {
  const FlashProblem& p = params.problem;
  const int64_t key0 = block * kBlockN, n = min64(kBlockN, seq.k_len - key0);
  const T* k = row_ptr<const T>(params.k, seq.batch, seq.k_row + key0, kv_head);
  for (int64_t c = 0; c < n; c += kNR) {
    pack_key_panel(k + c * params.k.seq_stride, params.k.seq_stride, n - c, p.head_dim,
                   head.k + (key0 + c) * p.head_dim);
  }
  const T* v = row_ptr<const T>(params.v, seq.batch, seq.k_row + key0, kv_head);
  head.finite[block] = pack_column_panels(v, params.v.seq_stride, n, p.v_head_dim, 1.0f,
                                          head.v + key0 * plan.ldo, kBlockN * kNR);
}

// Products of a row to base-2 scores, right to left.
[[gnu::noinline]] static void position_row(float* s, const RowSpan& span, float scale2,
                                           const RowTable& t, float& carry) {
  const float top = static_cast<float>(t.top);
  for (int64_t c = span.n - kLanes; c >= 0; c -= kLanes) {
    const VecI seen = span.seen(c);
    if (carry >= top) {
      const VecF x = fma(load(s + c), splat(scale2), splat(t.value[t.top]));
      store(s + c, seen ? x : splat(-kInf));
    } else {
      store(s + c, gated(load(s + c), scale2, seen, t, carry).score);
    }
  }
}

// O += P V of one row over exactly the keys it sees.
AF_INLINE void accumulate_row(const Plan& plan, const float* v, const float* weights,
                              const RowSpan& span, float* o) {
  for (int64_t c = span.lo; c < span.hi; ++c) {
    for (int64_t d = 0; d < plan.ldo; d += kLanes) {
      const float* x = v + d / kNR * (kBlockN * kNR) + c * kNR + d % kNR;
      store(o + d, fma(splat(weights[c]), load(x), load(o + d)));
    }
  }
}

template <class T>
AF_INLINE void run_tile(const CopeFwdParams& params, const Plan& plan, const TileRows& t,
                        const PackedTable& packed, const PackedHead& head, const Tile& tile,
                        const Sums& sums) {
  const FlashProblem& p = params.problem;
  const float scale2 = base2_scale(p);
  const Interval some = prepare_rows<T>(t, params.q, params.table, packed, tile);
  fill(sums.o, 0, round_up(t.rows, kMR) * plan.ldo, 0.0f);
  fill(sums.m, 0, t.rows, -kInf);
  fill(sums.l, 0, t.rows, 0.0f);
  const int64_t first = some.lo / kBlockN;
  for (int64_t block = ceil_div(some.hi, kBlockN) - 1; block >= first; --block) {
    const int64_t key0 = block * kBlockN, keys = min64(kBlockN, t.seq.k_len - key0);
    const float* v = head.v + key0 * plan.ldo;
    multiply(t, tile, head.k + key0 * p.head_dim, keys);
    const bool finite = head.finite[block] || sees_whole(t, tile, key0, keys);
    for (int64_t r = 0; r < t.rows; ++r) {
      float* s = tile.s + r * kLds;
      const RowSpan span = row_span(tile, r, key0, keys);
      if (span.lo == span.hi) {
        fill(s, 0, span.n, 0.0f);
        continue;
      }
      position_row(s, span, scale2, tile.table(r, params.table.positions), tile.carry[r]);
      const float alpha = softmax_row(s, span.n, sums.m[r], sums.l[r]);
      float* o = sums.o + r * plan.ldo;
      for (int64_t d = 0; d < plan.ldo && alpha != 1.0f; d += kLanes) {
        store(o + d, load(o + d) * splat(alpha));
      }
      if (!finite) accumulate_row(plan, v, s, span, o);
    }
    if (finite) {
      gemm<kLds, 1>(t.rows, vectors_of(p.v_head_dim), keys, tile.s, kLds, v, kBlockN * kNR, sums.o,
                    plan.ldo, true);
    }
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t i = t.first + r, row = t.seq.q_row + i, batch = t.seq.batch;
    const RowEnd end = finish_softmax(sums.m[r], sums.l[r], -kInf);
    *stat_ptr(params.lse, t.seq, t.head, i) = end.lse;
    T* lo = params.out_lo.data ? row_ptr<T>(params.out_lo, batch, row, t.head) : nullptr;
    store_output(sums.o + r * plan.ldo, end.scale, p.v_head_dim,
                 row_ptr<T>(params.out, batch, row, t.head), lo);
  }
}

struct Memory {
  char *tables, *tiles, *heads;
  int64_t tile_bytes, head_bytes;
};

AF_INLINE int64_t place(Memory& memory, const CopeFwdParams& params, const Plan& plan,
                        int64_t threads) {
  const FlashProblem& p = params.problem;
  Arena tile{nullptr}, head{nullptr};
  take_tile(tile, p, params.table);
  take_sums(tile, plan);
  take_head(head, p, plan);
  memory.tile_bytes = tile.used, memory.head_bytes = head.used;
  memory.tables = static_cast<char*>(params.workspace);
  memory.tiles = memory.tables + tables_bytes(p, params.table);
  memory.heads = memory.tiles + tile.used * threads;
  return memory.heads - memory.tables + head.used * plan.slots;
}

template <class T>
AF_INLINE void run(const CopeFwdParams& params, const Workers& workers) {
  const FlashProblem& p = params.problem;
  const Plan plan = make_plan(p, workers.num_threads);
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
      pack_block<T>(params, plan, seq, pair % p.heads_k, block, head_at(slot));
    });
    parallel_tasks(workers, slots * group * plan.tiles, [&](int64_t task, int64_t worker) {
      // Late tiles see the most keys under a causal mask: they go first.
      const int64_t slot = task % slots, pair = pair0 + slot;
      const int64_t first = (plan.tiles - 1 - task / slots / group) * kBlockM;
      const Sequence seq = sequence(p, pair / p.heads_k);
      if (first >= seq.q_len) return;
      const int64_t head = pair % p.heads_k * group + task / slots % group;
      const TileRows t{p, seq, head, first, min64(kBlockM, seq.q_len - first)};
      Arena a{memory.tiles + worker * memory.tile_bytes};
      const Tile tile = take_tile(a, p, params.table);
      const PackedTable packed = table_of(memory.tables, p, params.table, head);
      run_tile<T>(params, plan, t, packed, head_at(slot), tile, take_sums(a, plan));
    });
  }
}

}  // namespace

int64_t cope_fwd_workspace(const CopeFwdParams& params, int64_t num_threads) {
  Memory memory;
  return place(memory, params, make_plan(params.problem, num_threads), num_threads);
}

void cope_fwd(const CopeFwdParams& params, const Workers& workers) {
  dispatch_dtype(params.problem.dtype,
                 [&](auto element) { run<decltype(element)>(params, workers); });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
