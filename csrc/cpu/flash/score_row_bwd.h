// One row of the backward where a call does more than softmax: S and dP to P and dS, and what dS
// adds to the gradients of the mods. No two tasks of a run add to the same element.
#pragma once

#include "cpu/flash/mods.h"
#include "cpu/micro/weights.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// n columns of S (under softcap and ALiBi) and of dP; column c is key key0 + c, `count` of them are
// keys of the task, and of those the row may see `seen`.
struct GradRow {
  float *s, *dp;
  int64_t n, key0, count;
  Interval seen;
  float lse2, delta;
  const float* slope;  // of the softcap, or null
  float* drop;         // room for n floats, with dropout
};

AF_INLINE void add_row(const float* x, float* sum, int64_t n) {
  for (int64_t c = 0; c < n; c += kLanes) {
    store_partial(sum + c, load_partial(sum + c, n - c) + load(x + c), n - c);
  }
}

// rel_bias read the clamped distance of each column; its gradient adds there.
AF_INLINE void add_rel_row(const float* ds, int64_t first, int64_t end, float* sum, int64_t n) {
  const int64_t lo = max64(0, min64(n, -first)), hi = max64(lo, min64(n, end - first + 1));
  for (int64_t c = 0; c < lo; ++c) sum[0] += ds[c];
  for (int64_t c = lo; c < hi; ++c) sum[first + c] += ds[c];
  for (int64_t c = hi; c < n; ++c) sum[end] += ds[c];
}

// dS of one row and one key block, in natural units, before the softcap's slope.
AF_INLINE void add_mod_grads(const FlashBwdParams& params, const Sequence& s, int64_t head,
                             int64_t i, int64_t chunk, const GradRow& row) {
  const FlashProblem& p = params.problem;
  if (params.dcolumns) {
    add_row(row.dp,
            params.dcolumns + s.batch * params.dcolumns_batch + head * params.dcolumns_head +
                s.k_row + row.key0,
            row.count);
  }
  if (params.drows) {
    VecF sum{};
    for (int64_t c = 0; c < row.n; c += kLanes) sum += load(row.dp + c);
    params.drows[s.batch * params.drows_batch + head * params.drows_head +
                 chunk * params.drows_chunk + s.q_row + i] += reduce_add(sum);
  }
  if (params.dbias) {
    add_row(row.dp,
            params.dbias + s.batch * params.dbias_batch + head * params.dbias_head +
                i * params.dbias_row + row.key0,
            row.count);
  }
  if (params.drel_bias) {
    const int64_t radius = p.mods.rel_radius, width = 2 * radius + 1;
    const int64_t table = (s.batch * p.heads_q + head) * params.max_chunks + chunk;
    add_rel_row(row.dp, row.key0 - (i + s.offset) + radius, 2 * radius,
                params.drel_bias + table * width, row.count);
  }
}

[[gnu::noinline]] static void differentiate_score_row(const FlashBwdParams& params,
                                                      const Sequence& seq, int64_t head, int64_t i,
                                                      int64_t chunk, const GradRow& row) {
  const FlashProblem& p = params.problem;
  const RowMods mods = row_mods(p, seq, head, i);
  auto hide = [&](float* x) {
    mask_row(x, row.n, row.seen.lo, row.seen.hi, 0.0f);
    hide_columns(mods, x, row.n, row.key0, 0.0f);
  };
  add_biases(mods, row.s, row.n, row.key0);
  if (p.mods.dropout) {
    dropout_factors(row_dropout(p, seq, head, i), row.key0, row.n, row.drop);
    multiply_row(row.dp, row.drop, row.n);
  }
  differentiate_weights(p.mods.score_fn, row.s, row.dp, row.n, row.lse2, row.delta);
  if (p.mods.dropout) multiply_row(row.s, row.drop, row.n);
  hide(row.s);
  hide(row.dp);
  add_mod_grads(params, seq, head, i, chunk, row);
  if (row.slope) {
    multiply_row(row.dp, row.slope, row.n);
    hide(row.dp);  // the slope at a hidden score may be NaN
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
