// Upper bounds of the logits in some pages, for the rows of a KV head: what the two ways of
// computing them share.
//
//   sum over channels of max(q low, q high) = max(0, q) high + min(0, q) low
//
// Where infinite bounds meet a 0 of q the two products are not finite: then the formula itself.
// Bounds in int8 stand for themselves times a scale per page, which meets the sums.
#pragma once

#include "attnforge/retrieval.h"
#include "cpu/flash/problem.h"
#include "cpu/retrieval/rows.h"
#include "cpu/simd/codes.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

// Some pages of a KV head; those past the last one are that one again.
template <class E, int64_t N>
struct Pages {
  const E *low[N], *high[N];
};

// The formula itself, for a scaled row with zeros behind it.
template <class E>
[[gnu::noinline]] static float bound_page(const float* q, const E* low, const E* high,
                                          int64_t dim) {
  VecF sum{};
  for (int64_t d = 0; d < dim; d += kLanes) {
    const VecF x = load(q + d);
    const VecF a = x * load_partial(low + d, dim - d), b = x * load_partial(high + d, dim - d);
    sum += a > b ? a : b;
  }
  return reduce_add(sum);
}

}  // namespace
}  // namespace attnforge::cpu::ATTNFORGE_ISA
