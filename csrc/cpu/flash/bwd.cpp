// Flash attention, backward.
//
// Algorithm (FlashAttention-2, Dao 2023, section 3.1.2) on the tiles of gemm.h. From S = Q K^T, the
// stored LSE and delta = rowsum(dO * O) - dLSE:
//   P = 2^(S - LSE)    dP = dO V^T    dS = P * (dP - delta) [* (1 - tanh^2) under a softcap]
//   dV += P^T dO       dK += dS^T Q   dQ += dS K
// O is the forward's output plus its rounding residue, so delta is good to fp32 for 16-bit inputs.
//
//   phases     1  per query tile: Q and dO widened and packed in both operand layouts, delta, LSE
//              2  per (batch, kv head, chunk): for each of its key blocks, all query tiles of all
//                 heads of the group; dK, dV of a block stay in L2, dQ goes to the chunk's fp32
//                 slab
//              3  per query tile: the slabs summed in chunk order, scaled, rounded
//   chunks     key blocks are dealt round-robin to ceil(kChunksWanted / kv heads) chunks: work for
//              all threads where heads are few, balanced under a causal mask, and the same sums for
//              any number of threads and any batch. No atomics
//   dbias      where (batch, kv head) pairs share elements of it, waves of one pair: in order
//   tile       96 queries x 96 keys (64 when D > 96): S and dP 84 KiB, operands stream from L2;
//              tuning may choose others (FlashTiles)
//   transpose  P^T and dS^T are the same tiles read with swapped compile-time strides
//   flops      5 products: 10 D per visible pair (6 D + 4 Dv when they differ)
//   bytes      Q, K, V, O, dO once, dQ, dK, dV once; packed fp32 copies from cache
//   memory     per wave of heads: 4 fp32 copies of Q / dO rows and one dQ slab per chunk
//
// Masked pairs are skipped or exactly zero; where an operand holds NaN or infinity and a tile is
// masked in part, products run over visible pairs only, so that nothing leaks through 0 * NaN.
#include "cpu/flash/bwd_layout.h"
#include "cpu/flash/score_row_bwd.h"
#include "cpu/kernels.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/parallel.h"
#include "cpu/micro/softmax.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

// Phase 1: packs one query tile and computes its row statistics.
template <class T>
AF_INLINE void prepare_tile(const Pair& pair, int64_t index, const Scratch& w) {
  const FlashBwdParams& params = pair.params;
  const FlashProblem& p = params.problem;
  const QueryTile tile = pair.tile(index);
  const int64_t first = pair.tiling.first_row(index), rows = pair.tiling.rows(index);
  const Plan& plan = pair.layout.plan;
  const float q_scale = score_map(p).q_scale;
  bool finite = true;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = pair.head(first + r), i = pair.query(first + r);
    const int64_t row = pair.seq.q_row + i, batch = pair.seq.batch;
    const T* q = row_ptr<const T>(params.q, batch, row, head);
    const T* dout = row_ptr<const T>(params.dout, batch, row, head);
    const float own = row_scale(p, pair.seq, head, i);
    with_query(p, pair.seq, head, i, q, w.rotated, [&](auto* x) {
      pack_row(x, p.head_dim, q_scale * own, r, tile.q_groups);
      finite &= pack_column_panels(x, 0, 1, p.head_dim, p.softmax_scale * own,
                                   tile.q_panels + r * kNR, plan.block_m * kNR);
    });
    pack_row(dout, p.v_head_dim, 1.0f, r, tile.do_groups);
    finite &= pack_column_panels(dout, 0, 1, p.v_head_dim, 1.0f, tile.do_panels + r * kNR,
                                 plan.block_m * kNR);
    const T* lo = params.out_lo.data ? row_ptr<const T>(params.out_lo, batch, row, head) : nullptr;
    float delta =
        dot_residue(dout, row_ptr<const T>(params.out, batch, row, head), lo, p.v_head_dim);
    if (params.dlse.data) delta -= *stat_ptr(params.dlse, pair.seq, head, i);
    *stat_ptr(params.delta, pair.seq, head, i) = delta;
    tile.delta[r] = delta;
    tile.lse2[r] = *stat_ptr(params.lse, pair.seq, head, i) * kLog2E;
    tile.keys[r] = visible_keys(p, pair.seq, head, i);
    // Nothing but -inf, by biases or hidden keys: no probabilities, and no gradient.
    if (p.mods.any && tile.lse2[r] == -kInf) tile.keys[r] = {0, 0};
  }
  zero_rows(rows, round_up(rows, kMR), p.head_dim, tile.q_groups);
  zero_rows(rows, round_up(rows, kMR), p.v_head_dim, tile.do_groups);
  *tile.finite = finite;
}

// One (query tile, key block) of phase 2.
struct Step {
  const Pair& pair;
  const QueryTile& tile;
  const Scratch& scratch;
  const ScoreMap& map;
  int64_t first, rows;  // of the tile
  int64_t key0, keys;   // of the block
  float* dq;            // slab of the tile
  int64_t chunk;
};

// S and dP of row r, columns [c0, c0 + n), become P and dS.
AF_INLINE void differentiate_row(const Step& t, int64_t r, int64_t c0, int64_t n, bool masked) {
  const FlashProblem& p = t.pair.problem();
  float* s = t.scratch.s + r * kLds + c0;
  float* dp = t.scratch.dp + r * kLds + c0;
  int64_t lo = 0, hi = n;
  if (masked) {
    lo = max64(0, min64(n, t.tile.keys[r].lo - t.key0 - c0));
    hi = max64(lo, min64(n, t.tile.keys[r].hi - t.key0 - c0));
    if (lo == hi) {
      fill(s, 0, n, 0.0f);
      fill(dp, 0, n, 0.0f);
      return;
    }
  }
  const float* slope = nullptr;
  if (t.map.cap2 > 0.0f) {
    float* keep = t.scratch.s_cap + r * kLds + c0;
    apply_softcap_with_slope(s, n, t.map.cap2, keep);
    slope = keep;
  }
  if (p.alibi_slopes) {
    int64_t row = t.first + r;
    add_alibi(s, n, alibi_slope2(p, t.pair.seq.batch, t.pair.head(row)),
              t.pair.query(row) + t.pair.seq.offset - (t.key0 + c0));
  }
  if (p.mods.any) {
    const GradRow row = {s,
                         dp,
                         n,
                         t.key0 + c0,
                         min64(n, t.keys - c0),
                         {lo, hi},
                         t.tile.lse2[r],
                         t.tile.delta[r],
                         slope,
                         t.scratch.drop};
    return differentiate_score_row(t.pair.params, t.pair.seq, t.pair.head(t.first + r),
                                   t.pair.query(t.first + r), t.chunk, row);
  }
  softmax_row_backward(s, dp, n, t.tile.lse2[r], t.tile.delta[r], slope);
  if (masked) {
    mask_row(s, n, lo, hi, 0.0f);
    mask_row(dp, n, lo, hi, 0.0f);
  }
}

// A block that every row of the tile sees whole.
AF_INLINE void full_step(const Step& t) {
  const FlashProblem& p = t.pair.problem();
  const Plan& plan = t.pair.layout.plan;
  const Scratch& w = t.scratch;
  const int64_t d = p.head_dim, dv = p.v_head_dim;
  const int64_t n = round_up(t.keys, kNR);
  gemm<1, kMR>(t.rows, vectors_of(n), d, t.tile.q_groups, d, w.k_panels, d * kNR, w.s, kLds, false);
  gemm<1, kMR>(t.rows, vectors_of(n), dv, t.tile.do_groups, dv, w.v_panels, dv * kNR, w.dp, kLds,
               false);
  for (int64_t r = 0; r < t.rows; ++r) differentiate_row(t, r, 0, n, n != t.keys);
  gemm<1, kLds>(t.keys, vectors_of(dv), t.rows, w.s, 1, t.tile.do_panels, plan.block_m * kNR, w.dv,
                plan.ldv, true);
  gemm<1, kLds>(t.keys, vectors_of(d), t.rows, w.dp, 1, t.tile.q_panels, plan.block_m * kNR, w.dk,
                plan.ldd, true);
  gemm<kLds, 1>(t.rows, vectors_of(d), t.keys, w.dp, kLds, w.k_columns, kMaxBlockN * kNR, t.dq,
                plan.ldd, true);
}

// The three sums over visible pairs only: for partly masked tiles with NaN or infinity inside.
AF_INLINE void accumulate_pairs(const Step& t) {
  const FlashProblem& p = t.pair.problem();
  const Plan& plan = t.pair.layout.plan;
  const Scratch& w = t.scratch;
  for (int64_t r = 0; r < t.rows; ++r) {
    int64_t lo = max64(0, t.tile.keys[r].lo - t.key0);
    int64_t hi = min64(t.keys, t.tile.keys[r].hi - t.key0);
    const RowMods mods =
        row_mods(p, t.pair.seq, t.pair.head(t.first + r), t.pair.query(t.first + r));
    for (int64_t c = lo; c < hi; ++c) {
      if (!sees(mods, t.key0 + c)) continue;
      float prob = w.s[r * kLds + c], ds = w.dp[r * kLds + c];
      axpy_panels(prob, t.tile.do_panels + r * kNR, plan.block_m * kNR, p.v_head_dim,
                  w.dv + c * plan.ldv);
      axpy_panels(ds, t.tile.q_panels + r * kNR, plan.block_m * kNR, p.head_dim,
                  w.dk + c * plan.ldd);
      axpy_panels(ds, w.k_columns + c * kNR, kMaxBlockN * kNR, p.head_dim, t.dq + r * plan.ldd);
    }
  }
}

// A block that some row sees in part: products are cut to what groups of rows, or of keys, see.
AF_INLINE void partial_step(const Step& t, bool finite) {
  const FlashProblem& p = t.pair.problem();
  const Plan& plan = t.pair.layout.plan;
  const Scratch& w = t.scratch;
  const int64_t d = p.head_dim, dv = p.v_head_dim;
  const int64_t width = round_up(t.keys, kNR);
  for (int64_t r0 = 0; r0 < t.rows; r0 += kMR) {
    int64_t rows = min64(kMR, t.rows - r0);
    int64_t lo = t.keys, hi = 0;
    for (int64_t r = r0; r < r0 + rows; ++r) {
      if (t.tile.keys[r].lo == t.tile.keys[r].hi) continue;
      lo = min64(lo, t.tile.keys[r].lo - t.key0);
      hi = max64(hi, t.tile.keys[r].hi - t.key0);
    }
    lo = max64(0, lo) / kNR * kNR;
    hi = min64(t.keys, hi);
    int64_t n = lo < hi ? round_up(hi - lo, kNR) : 0;
    if (n > 0) {
      gemm<1, kMR>(rows, vectors_of(n), d, t.tile.q_groups + r0 * d, d, w.k_panels + lo * d,
                   d * kNR, w.s + r0 * kLds + lo, kLds, false);
      gemm<1, kMR>(rows, vectors_of(n), dv, t.tile.do_groups + r0 * dv, dv, w.v_panels + lo * dv,
                   dv * kNR, w.dp + r0 * kLds + lo, kLds, false);
    } else {
      lo = 0;
    }
    for (int64_t r = r0; r < r0 + rows; ++r) {
      differentiate_row(t, r, lo, n, true);
      // The products over keys read whole columns.
      mask_row(w.s + r * kLds, width, lo, lo + n, 0.0f);
      mask_row(w.dp + r * kLds, width, lo, lo + n, 0.0f);
    }
    if (n > 0 && finite) {
      gemm<kLds, 1>(rows, vectors_of(d), hi - lo, w.dp + r0 * kLds + lo, kLds,
                    w.k_columns + lo * kNR, kMaxBlockN * kNR, t.dq + r0 * plan.ldd, plan.ldd, true);
    }
  }
  if (!finite) return accumulate_pairs(t);
  for (int64_t c0 = 0; c0 < t.keys; c0 += kMR) {
    int64_t keys = min64(kMR, t.keys - c0);
    int64_t lo = t.rows, hi = 0;
    for (int64_t r = 0; r < t.rows; ++r) {
      if (t.tile.keys[r].lo >= t.key0 + c0 + keys || t.tile.keys[r].hi <= t.key0 + c0) continue;
      lo = min64(lo, r);
      hi = r + 1;
    }
    if (lo >= hi) continue;
    gemm<1, kLds>(keys, vectors_of(dv), hi - lo, w.s + lo * kLds + c0, 1,
                  t.tile.do_panels + lo * kNR, plan.block_m * kNR, w.dv + c0 * plan.ldv, plan.ldv,
                  true);
    gemm<1, kLds>(keys, vectors_of(d), hi - lo, w.dp + lo * kLds + c0, 1,
                  t.tile.q_panels + lo * kNR, plan.block_m * kNR, w.dk + c0 * plan.ldd, plan.ldd,
                  true);
  }
}

template <class T>
AF_INLINE void store_keys(const Pair& pair, const TensorRef& out, int64_t dim, const float* acc,
                          int64_t ld, int64_t key0, int64_t keys) {
  for (int64_t c = 0; c < keys; ++c) {
    T* row = row_ptr<T>(out, pair.seq.batch, pair.seq.k_row + key0 + c, pair.kv_head);
    store_output<T>(acc + c * ld, 1.0f, dim, row, nullptr);
  }
}

// Phase 2: the key blocks of one chunk against all query tiles.
template <class T>
AF_INLINE void run_chunk(const Pair& pair, int64_t chunk, const Scratch& w) {
  const FlashBwdParams& params = pair.params;
  const FlashProblem& p = params.problem;
  const Plan& plan = pair.layout.plan;
  const Sequence& seq = pair.seq;
  const ScoreMap map = score_map(p);
  const int64_t tiles = pair.tiling.tiles(), chunks = pair.chunks();
  const bool some_hidden = hides(p.mods);
  fill(pair.slab(chunk, 0), 0, tiles * plan.block_m * plan.ldd, 0.0f);
  for (int64_t key0 = chunk * plan.block_n; key0 < seq.k_len; key0 += chunks * plan.block_n) {
    const int64_t keys = min64(plan.block_n, seq.k_len - key0);
    const T* k = row_ptr<const T>(params.k, seq.batch, seq.k_row + key0, pair.kv_head);
    const T* v = row_ptr<const T>(params.v, seq.batch, seq.k_row + key0, pair.kv_head);
    bool k_finite = true;
    with_keys(p, seq, pair.kv_head, {key0, key0 + keys}, k, params.k.seq_stride, w.rotated,
              [&](auto* rows, int64_t stride) {
                for (int64_t c = 0; c < keys; c += kNR) {
                  pack_key_panel(rows + c * stride, stride, keys - c, p.head_dim,
                                 w.k_panels + c * p.head_dim);
                }
                k_finite = pack_column_panels(rows, stride, keys, p.head_dim, 1.0f, w.k_columns,
                                              kMaxBlockN * kNR);
              });
    for (int64_t c = 0; c < keys; c += kNR) {
      pack_key_panel(v + c * params.v.seq_stride, params.v.seq_stride, keys - c, p.v_head_dim,
                     w.v_panels + c * p.v_head_dim);
    }
    fill(w.dk, 0, (keys + kMR) * plan.ldd, 0.0f);
    fill(w.dv, 0, (keys + kMR) * plan.ldv, 0.0f);
    for (int64_t index = 0; index < tiles; ++index) {
      const QueryTile tile = pair.tile(index);
      const int64_t rows = pair.tiling.rows(index);
      bool any = false, all = true;
      for (int64_t r = 0; r < rows; ++r) {
        any |= tile.keys[r].lo < key0 + keys && tile.keys[r].hi > key0;
        all &= tile.keys[r].lo <= key0 && tile.keys[r].hi >= key0 + keys;
      }
      if (!any) continue;
      Step step{pair,
                tile,
                w,
                map,
                pair.tiling.first_row(index),
                rows,
                key0,
                keys,
                pair.slab(chunk, index),
                chunk};
      if (all && !some_hidden) {
        full_step(step);
      } else {
        partial_step(step, k_finite && *tile.finite);
      }
    }
    for (int64_t c = 0; c < keys && p.mods.rope_cos; ++c) {
      rotate(key_rotation(p, seq, pair.kv_head, key0 + c), -1.0f, w.dk + c * plan.ldd);
    }
    store_keys<T>(pair, params.dk, p.head_dim, w.dk, plan.ldd, key0, keys);
    store_keys<T>(pair, params.dv, p.v_head_dim, w.dv, plan.ldv, key0, keys);
  }
}

// Keys that exist in memory behind k_len, or that no query can see: zero gradients.
template <class T>
AF_INLINE void zero_keys(const Pair& pair, const Scratch& w, int64_t begin) {
  const FlashProblem& p = pair.problem();
  const Plan& plan = pair.layout.plan;
  fill(w.dk, 0, plan.ldd, 0.0f);
  fill(w.dv, 0, plan.ldv, 0.0f);
  for (int64_t key = begin; key < pair.seq.k_rows; ++key) {
    store_keys<T>(pair, pair.params.dk, p.head_dim, w.dk, plan.ldd, key, 1);
    store_keys<T>(pair, pair.params.dv, p.v_head_dim, w.dv, plan.ldv, key, 1);
  }
}

// Phase 3: dQ of one tile, the slabs summed in chunk order.
template <class T>
AF_INLINE void finish_tile(const Pair& pair, int64_t index) {
  const FlashProblem& p = pair.problem();
  const Plan& plan = pair.layout.plan;
  const int64_t first = pair.tiling.first_row(index), rows = pair.tiling.rows(index);
  const int64_t chunks = pair.chunks();
  float* sum = pair.slab(0, index);
  for (int64_t chunk = 1; chunk < chunks && pair.seq.k_len > 0; ++chunk) {
    const float* part = pair.slab(chunk, index);
    for (int64_t e = 0; e < rows * plan.ldd; e += kLanes)
      store(sum + e, load(sum + e) + load(part + e));
  }
  for (int64_t r = 0; r < rows; ++r) {
    const FlashBwdParams& params = pair.params;
    const int64_t head = pair.head(first + r), i = pair.query(first + r);
    const int64_t batch = pair.seq.batch, row = pair.seq.q_row + i;
    float* dq = sum + r * plan.ldd;
    if (p.mods.rope_cos) rotate(query_rotation(p, pair.seq, head, i), -1.0f, dq);
    if (params.drow_scale.data) {  // sum of dS' scale <q, k>: q times the sum of dS' k
      const T* q = row_ptr<const T>(params.q, batch, row, head);
      *stat_ptr(params.drow_scale, pair.seq, head, i) =
          p.softmax_scale * dot_residue(q, dq, static_cast<const float*>(nullptr), p.head_dim);
    }
    store_output<T>(dq, p.softmax_scale * row_scale(p, pair.seq, head, i), p.head_dim,
                    row_ptr<T>(params.dq, batch, row, head), nullptr);
  }
}

template <class T>
AF_INLINE void run(const FlashBwdParams& params, const Workers& workers) {
  const FlashProblem& p = params.problem;
  const Layout layout = make_layout(params, workers.num_threads);
  const Plan& plan = layout.plan;
  char* scratch = static_cast<char*>(params.workspace);
  char* heads = scratch + workers.num_threads * layout.scratch_bytes;
  const int64_t pairs = p.batch * p.heads_k;
  for (int64_t pair0 = 0; pair0 < pairs; pair0 += plan.slots) {
    const int64_t slots = min64(plan.slots, pairs - pair0);
    auto pair_at = [&](int64_t slot) {
      Sequence seq = sequence(p, (pair0 + slot) / p.heads_k);
      return Pair{params,
                  layout,
                  seq,
                  row_tiling(seq.q_len, plan.group, plan.block_m),
                  (pair0 + slot) % p.heads_k,
                  heads + slot * layout.head_bytes};
    };
    auto scratch_of = [&](int64_t worker) {
      Arena a{scratch + worker * layout.scratch_bytes};
      return take_scratch(a, p, plan);
    };
    parallel_tasks(workers, slots * plan.max_tiles, [&](int64_t task, int64_t worker) {
      const Pair pair = pair_at(task / plan.max_tiles);
      int64_t index = task % plan.max_tiles;
      if (pair.seq.q_len == 0 || index >= pair.tiling.tiles()) return;
      prepare_tile<T>(pair, index, scratch_of(worker));
    });
    parallel_tasks(workers, slots * plan.chunks, [&](int64_t task, int64_t worker) {
      const Pair pair = pair_at(task / plan.chunks);
      int64_t chunk = task % plan.chunks;
      const Scratch w = scratch_of(worker);
      if (pair.seq.q_len == 0) {
        if (chunk == 0) zero_keys<T>(pair, w, 0);
        return;
      }
      if (chunk == 0) zero_keys<T>(pair, w, pair.seq.k_len);
      if (chunk < pair.chunks()) run_chunk<T>(pair, chunk, w);
    });
    parallel_tasks(workers, slots * plan.max_tiles, [&](int64_t task, int64_t) {
      const Pair pair = pair_at(task / plan.max_tiles);
      int64_t index = task % plan.max_tiles;
      if (pair.seq.q_len > 0 && index < pair.tiling.tiles()) finish_tile<T>(pair, index);
    });
  }
}

}  // namespace

int64_t flash_bwd_workspace(const FlashBwdParams& params, int64_t num_threads) {
  return make_layout(params, num_threads).total;
}

void flash_bwd(const FlashBwdParams& params, const Workers& workers) {
  dispatch_dtype(params.problem.dtype,
                 [&](auto element) { run<decltype(element)>(params, workers); });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
