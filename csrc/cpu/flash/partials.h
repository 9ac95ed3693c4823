// What the splits of a sequence's keys leave for the rows of one kv head, and their merge.
#pragma once

#include "cpu/flash/problem.h"
#include "cpu/micro/parallel.h"
#include "cpu/micro/softmax.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// Of one split and kv head; rows are head-major within the group.
struct Partial {
  float* m;
  float* l;
  float* z;  // what the zeros of codes would have added to every column of o
  float* o;  // [rows][ldo], not normalised
};

AF_INLINE Partial take_partial(Arena& a, int64_t rows, int64_t ldo) {
  Partial part;
  part.m = a.take<float>(rows);
  part.l = a.take<float>(rows);
  part.z = a.take<float>(rows);
  part.o = a.take<float>(rows * ldo);
  return part;
}

AF_INLINE void clear(const Partial& part, int64_t rows, int64_t ldo) {
  fill(part.m, 0, rows, -kInf);
  fill(part.l, 0, rows, 0.0f);
  fill(part.z, 0, rows, 0.0f);
  fill(part.o, 0, rows * ldo, 0.0f);
}

struct Partials {
  char* base;
  int64_t rows, ldo, splits;  // of every pair of a sequence and a kv head

  AF_INLINE_MEMBER int64_t bytes() const {  // of one
    Arena a{nullptr};
    take_partial(a, rows, ldo);
    return a.used;
  }
  AF_INLINE_MEMBER Partial at(int64_t pair, int64_t split) const {
    Arena a{base + (pair * splits + split) * bytes()};
    return take_partial(a, rows, ldo);
  }
};

// Merges the first `splits` of a pair in ascending order; finish(r, m, l, z, o) gets each row.
template <class F>
AF_INLINE void merge_rows(const Partials& parts, int64_t pair, int64_t splits, int64_t rows,
                          const F& finish) {
  const Partial total = parts.at(pair, 0);
  for (int64_t r = 0; r < rows; ++r) {
    float m = total.m[r], l = total.l[r], z = total.z[r];
    float* o = total.o + r * parts.ldo;
    for (int64_t split = 1; split < splits; ++split) {
      const Partial part = parts.at(pair, split);
      if (part.l[r] == 0.0f) continue;  // saw nothing; NaN goes on
      const float top = part.m[r] > m ? part.m[r] : m;
      const float base = top == -kInf ? 0.0f : top;
      const float keep = l == 0.0f ? 0.0f : exp2(splat(m - base))[0];
      const float add = exp2(splat(part.m[r] - base))[0];
      const float* x = part.o + r * parts.ldo;
      for (int64_t d = 0; d < parts.ldo; d += kLanes) {
        store(o + d, fma(splat(add), load(x + d), splat(keep) * load(o + d)));
      }
      l = l * keep + part.l[r] * add;
      z = z * keep + part.z[r] * add;
      m = top;
    }
    finish(r, m, l, z, o);
  }
}

AF_INLINE int64_t longest_keys(const FlashProblem& p, int64_t batch) {
  int64_t longest = 0;
  for (int64_t h = 0; h < (p.seqused_head ? p.heads_k : 1); ++h) {
    longest = max64(longest, sequence(p, batch, h).k_len);
  }
  return longest;
}

// Keys of a split of one sequence, where `fixed` is the length without num_splits and plan.
AF_INLINE int64_t split_length(const FlashFwdParams& params, int64_t fixed, int64_t batch) {
  if (params.num_splits == 0) return fixed;
  return max64(1, ceil_div(longest_keys(params.problem, batch), params.num_splits));
}

// The keys of one split of a sequence of k_len keys; empty where it has no such split.
AF_INLINE Interval split_keys_of(const FlashFwdParams& params, int64_t fixed, int64_t batch,
                                 int64_t split) {
  if (const SplitTable& plan = params.plan; plan.first) {
    const int64_t piece = plan.first[batch] + split;
    if (piece >= plan.first[batch + 1]) return {0, 0};
    return {plan.begin[piece], plan.end[piece]};
  }
  const int64_t length = split_length(params, fixed, batch), lo = split * length;
  return {lo, max64(lo, min64(lo + length, longest_keys(params.problem, batch)))};
}

// Splits of a sequence that leave a partial: at least one, for a sequence without keys.
AF_INLINE int64_t split_count(const FlashFwdParams& params, int64_t fixed, int64_t batch) {
  if (const SplitTable& plan = params.plan; plan.first) {
    return max64(1, plan.first[batch + 1] - plan.first[batch]);
  }
  return max64(1,
               ceil_div(longest_keys(params.problem, batch), split_length(params, fixed, batch)));
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
