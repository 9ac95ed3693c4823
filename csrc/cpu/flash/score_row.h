// One row of scores to weights where a call does more than softmax: forward and decode.
#pragma once

#include "cpu/flash/mods.h"
#include "cpu/micro/weights.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// n scores, a multiple of kNR, under softcap and ALiBi; column c is key key0 + c, and of the
// columns the row may see `seen`.
struct ScoreRow {
  float* s;
  int64_t n, key0;
  Interval seen;
  float* drop;  // room for n floats, with dropout
};

// Updates m and l; what was accumulated before wants the factor that comes back.
[[gnu::noinline]] static float weigh_score_row(const FlashProblem& p, const Sequence& seq,
                                               int64_t head, int64_t i, const ScoreRow& row,
                                               float& m, float& l) {
  const RowMods mods = row_mods(p, seq, head, i);
  add_biases(mods, row.s, row.n, row.key0);
  mask_row(row.s, row.n, row.seen.lo, row.seen.hi, -kInf);
  hide_columns(mods, row.s, row.n, row.key0, -kInf);
  const float alpha = weigh_row(p.mods.score_fn, row.s, row.n, m, l);
  if (p.mods.dropout) {
    dropout_factors(row_dropout(p, seq, head, i), row.key0, row.n, row.drop);
    multiply_row(row.s, row.drop, row.n);
  }
  return alpha;
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
