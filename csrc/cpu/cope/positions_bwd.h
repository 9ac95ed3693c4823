// One row of scores backwards: sums of gates alone, then gradients through positions and gates.
#pragma once

#include "cpu/cope/positions.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// Only the sum of gates: what a backward needs of the keys right of a block.
[[gnu::noinline]] static void count_row(const float* s, const RowSpan& span, float scale2,
                                        const RowTable& t, float& carry) {
  const float top = static_cast<float>(t.top);
  for (int64_t c = span.n - kLanes; c >= 0 && !(carry >= top); c -= kLanes) {
    const VecF gate = gate_of(load(s + c) * splat(scale2));
    carry = (suffix_sums(span.seen(c) ? gate : VecF{}) + splat(carry))[0];
  }
}

// One row of the backward.
struct CopeGradRow {
  float *s, *dp;  // products and dP; become P and the gradient of x
  // [n] scratch: gradients of positions, slopes of gates, what goes to the position above, floors.
  float *through, *bent, *above;
  int32_t* index;
  float lse2, delta;
  float* dtable;  // gradient of the row's table, entries `stride` apart
  int64_t stride;
};

// right: the sum of gates right of the block; left: of the gradients of positions left of it,
// updated.
[[gnu::noinline]] static void differentiate_positions(const CopeGradRow& row, const RowSpan& span,
                                                      float scale2, const RowTable& t, float right,
                                                      float& left) {
  const float top = static_cast<float>(t.top);
  int64_t c = span.n - kLanes;
  for (; c >= 0 && !(right >= top); c -= kLanes) {
    const Gated g = gated(load(row.s + c), scale2, span.seen(c), t, right);
    const VecF slope = gather(t.slope, g.index) * splat(kLn2);
    const VecI moves = (g.position < splat(top)) | (g.position != g.position);
    store(row.s + c, g.score);
    store(row.through + c, moves ? slope : VecF{});
    store(row.bent + c, g.gate * (splat(1.0f) - g.gate));
    store(row.above + c, g.weight);
    store_raw(row.index + c, g.index);
  }
  const int64_t first = c + kLanes;  // of the columns that have gates
  const VecF lse2 = splat(row.lse2), delta = splat(row.delta);
  VecF constant{};  // gradient of the last position's value
  auto weigh = [&](int64_t c, VecF score) __attribute__((always_inline)) {
    const VecI seen = span.seen(c);
    const VecF prob = seen ? exp2(score - lse2) : VecF{};
    const VecF ds = seen ? prob * (load(row.dp + c) - delta) : VecF{};
    store(row.s + c, prob);
    store(row.dp + c, ds);
    return ds;
  };
  for (c = 0; c < first; c += kLanes) {
    constant += weigh(c, fma(load(row.s + c), splat(scale2), splat(t.value[t.top])));
  }
  for (c = first; c < span.n; c += kLanes) {
    const VecF ds = weigh(c, load(row.s + c));
    store(row.through + c, load(row.through + c) * ds);
    store(row.above + c, load(row.above + c) * ds);
  }
  if (first > 0) row.dtable[t.top * row.stride] += reduce_add(constant);
  for (c = first; c < span.n; ++c) {
    float* entry = row.dtable + row.index[c] * row.stride;
    entry[0] += row.dp[c] - row.above[c];
    entry[row.stride] += row.above[c];
  }
  for (c = first; c < span.n; c += kLanes) {
    const VecF sums = prefix_sums(load(row.through + c)) + splat(left);
    left = sums[kLanes - 1];
    store(row.dp + c, fma(load(row.bent + c), sums, load(row.dp + c)));
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
