// Spans of keys: the pieces of a row that lie in one span each.
#pragma once

#include "cpu/reductions/walk.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// Calls f(span, lo, hi) for the columns [lo, hi) of each span that meets columns `seen` of the
// block at key0. boundaries [spans + 1] rise; values outside of the keys do no harm.
template <class F>
AF_INLINE void for_each_span(const int32_t* boundaries, int64_t spans, int64_t key0, Interval seen,
                             const F& f) {
  // The first span that ends past the first seen key.
  int64_t low = 0, high = spans;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (boundaries[middle + 1] > key0 + seen.lo) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  for (int64_t span = low; span < spans && boundaries[span] < key0 + seen.hi; ++span) {
    const int64_t lo = max64(seen.lo, boundaries[span] - key0);
    const int64_t hi = min64(seen.hi, boundaries[span + 1] - key0);
    if (lo < hi) f(span, lo, hi);
  }
}

AF_INLINE float sum_columns(const float* s, int64_t lo, int64_t hi) {
  VecF sum{};
  int64_t c = lo;
  for (; c + kLanes <= hi; c += kLanes) sum += load(s + c);
  float total = reduce_add(sum);
  for (; c < hi; ++c) total += s[c];
  return total;
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
