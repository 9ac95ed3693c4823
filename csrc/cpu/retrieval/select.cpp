// Selection of columns: the k largest, those at or above a threshold, the fewest with a share of
// the softmax. All end in ascending ids and a length, without a sort of the row:
//
//   order       a float's bits, turned so that they compare as integers; -inf and NaN are none
//   top k       three histograms, of 11, 11 and 10 bits, find the key of the k-th largest; of the
//   columns that
//               equal it the last ones are taken, as the later key wins a tie
//   top p       the same histograms, of exp(s - max) instead of counts
//   threshold   one pass
//   passes      in vectors: most hold no column of the ranks that are asked for
//
// A row is one task. Columns that are forced come first and count towards k.
#include "cpu/kernels.h"
#include "cpu/micro/parallel.h"
#include "cpu/micro/softmax.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

struct RowView {
  const float* scores;
  int64_t used;
  int64_t first_end, last_begin;  // forced: [0, first_end) and [last_begin, used)

  AF_INLINE_MEMBER bool forced(int64_t c) const { return c < first_end || c >= last_begin; }
};

AF_INLINE RowView view_of(const SelectParams& params, int64_t row) {
  RowView v;
  v.scores = params.scores + row * params.columns;
  v.used = params.used ? max64(0, min64(params.used[row], params.columns)) : params.columns;
  v.first_end = min64(params.first, v.used);
  v.last_begin = max64(v.first_end, v.used - params.last);
  return v;
}

// 0 is never chosen.
AF_INLINE VecU ranks_of(VecF x) {
  const VecU bits = float_to_bits(x);
  const VecU turned = bits ^ ((VecU)((VecI)bits >> 31) | 0x80000000u);
  return turned & (VecU)(x > splat(-kInf));
}

AF_INLINE uint32_t rank_of(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x || bits == 0xff800000u) return 0;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Calls f(column of lane 0, ranks, lanes) for the vectors that hold ranks in [lo, hi], lo > 0, of
// columns that are not forced; lanes has a bit for each.
template <class F>
AF_INLINE void for_vectors(const RowView& v, uint32_t lo, uint32_t hi, const F& f) {
  const VecU least = VecU{} + lo, most = VecU{} + hi;
  for (int64_t c = v.first_end; c < v.last_begin; c += kLanes) {
    VecF x = splat(-kInf);
    if (c + kLanes <= v.last_begin) {
      x = load(v.scores + c);
    } else {
      for (int64_t i = c; i < v.last_begin; ++i) x[i - c] = v.scores[i];
    }
    const VecU rank = ranks_of(x);
    const uint32_t found = lane_bits((VecI)((rank >= least) & (rank <= most)));
    if (found) f(c, rank, found);
  }
}

// The same, column by column: f(column, rank).
template <class F>
AF_INLINE void for_ranks(const RowView& v, uint32_t lo, uint32_t hi, const F& f) {
  for_vectors(v, lo, hi, [&](int64_t c, VecU rank, uint32_t found) __attribute__((always_inline)) {
    uint32_t ranks[kLanes];
    store_raw(ranks, rank);
    if (found == (1u << kLanes) - 1) {
      for (int i = 0; i < kLanes; ++i) f(c + i, ranks[i]);
      return;
    }
    for (; found; found &= found - 1) {
      const int i = __builtin_ctz(found);
      f(c + i, ranks[i]);
    }
  });
}

constexpr int kDigits[] = {11, 11, 10};  // bits of a rank, from the highest

// Finds the rank at which what is above it falls short of `want` and with it does not, where each
// candidate weighs weight(score). above: the weight of larger ranks.
template <class Sum, class Weight>
AF_INLINE uint32_t find_rank(const RowView& v, Sum want, Sum& above, const Weight& weight) {
  uint32_t prefix = 0;
  int left = 32;
  above = 0;
  for (const int bits : kDigits) {
    const uint32_t lo = left < 32 ? prefix << left : 0, width = left < 32 ? 1u << left : 0;
    left -= bits;
    const uint32_t mask = (1u << bits) - 1;
    Sum sums[1 << kDigits[0]] = {};
    for_ranks(v, lo == 0 ? 1 : lo, lo + (width - 1),
              [&](int64_t c, uint32_t rank) { sums[rank >> left & mask] += weight(v.scores[c]); });
    int digit = static_cast<int>(mask);
    for (; digit > 0 && above + sums[digit] < want; --digit) above += sums[digit];
    prefix = prefix << bits | static_cast<uint32_t>(digit);
  }
  return prefix;
}

// What is chosen: forced columns, ranks above `rank`, and of those equal to it the last `equal`.
struct Choice {
  uint32_t rank;
  int64_t equal;
};

AF_INLINE int64_t count_ranks(const RowView& v, uint32_t lo, uint32_t hi) {
  int64_t n = 0;
  for_vectors(v, lo, hi, [&](int64_t, VecU, uint32_t found) { n += __builtin_popcount(found); });
  return n;
}

AF_INLINE int64_t count_equal(const RowView& v, uint32_t rank) {
  return rank == 0 ? 0 : count_ranks(v, rank, rank);
}

AF_INLINE Choice choose_k(const RowView& v, int64_t k) {
  const int64_t want = k - (v.first_end + v.used - v.last_begin);
  if (want <= 0) return {0xffffffffu, 0};
  if (v.last_begin - v.first_end <= want || count_ranks(v, 1, ~0u) <= want) return {0, 0};
  int32_t above = 0;
  const uint32_t rank =
      find_rank<int32_t>(v, static_cast<int32_t>(want), above, [](float) { return int32_t{1}; });
  return {rank, want - above};
}

AF_INLINE Choice choose_mass(const RowView& v, double mass) {
  float top = -kInf;
  for (int64_t c = 0; c < v.used; ++c) {
    if (rank_of(v.scores[c]) && v.scores[c] > top) top = v.scores[c];
  }
  if (top == -kInf) return {0xffffffffu, 0};
  auto weight = [top](float x) {
    return x == top ? 1.0 : static_cast<double>(exp2(splat((x - top) * kLog2E))[0]);
  };
  double total = 0.0, forced = 0.0;
  for (int64_t c = 0; c < v.used; ++c) {
    if (rank_of(v.scores[c]) == 0) continue;
    const double w = weight(v.scores[c]);
    total += w;
    if (v.forced(c)) forced += w;
  }
  if (mass >= 1.0) return {0, 0};
  const double want = mass * total - forced;
  if (want <= 0.0) return {0xffffffffu, 0};
  double above = 0.0;
  const uint32_t rank = find_rank<double>(v, want, above, weight);
  const int64_t equal = count_equal(v, rank);
  if (equal == 0) return {rank, 0};
  const float at = __builtin_bit_cast(float, rank & 0x80000000u ? rank ^ 0x80000000u : ~rank);
  const double one = weight(at), rest = want - above;
  int64_t taken = one > 0.0 ? static_cast<int64_t>(rest / one) : equal;
  if (taken < equal && static_cast<double>(taken) * one < rest) ++taken;
  return {rank, min64(equal, max64(1, taken))};
}

AF_INLINE Choice choose_above(const RowView&, float threshold) {
  if (threshold != threshold) return {0xffffffffu, 0};
  const uint32_t rank = rank_of(threshold == 0.0f ? -0.0f : threshold);  // -0 is not below 0
  return {rank == 0 ? 0 : rank - 1, 0};
}

// Ascending ids of the choice; what finds no room is left out.
AF_INLINE void emit(const SelectParams& params, int64_t row, const RowView& v, Choice choice) {
  int32_t* ids = params.ids + row * params.slots;
  int64_t skip = choice.equal > 0 ? count_equal(v, choice.rank) - choice.equal : 0, n = 0;
  auto add = [&](int64_t c) __attribute__((always_inline)) {
    if (n < params.slots) ids[n++] = static_cast<int32_t>(c);
  };
  for (int64_t c = 0; c < v.first_end; ++c) add(c);
  for_ranks(v, choice.rank == 0 ? 1 : choice.rank, ~0u, [&](int64_t c, uint32_t rank) {
    if (rank != choice.rank || (choice.equal > 0 && skip-- <= 0)) add(c);
  });
  for (int64_t c = v.last_begin; c < v.used; ++c) add(c);
  params.lens[row] = static_cast<int32_t>(n);
  for (; n < params.slots; ++n) ids[n] = -1;
}

}  // namespace

void select_columns(const SelectParams& params, const Workers& workers) {
  parallel_tasks(workers, params.rows, [&](int64_t row, int64_t) {
    const RowView v = view_of(params, row);
    Choice choice = {0, 0};
    switch (params.kind) {
      case SelectKind::kTopK:
        choice = choose_k(v, params.k);
        break;
      case SelectKind::kThreshold:
        choice = choose_above(v, params.threshold[row * params.threshold_stride]);
        break;
      case SelectKind::kTopP:
        choice = choose_mass(v, params.mass);
        break;
    }
    emit(params, row, v, choice);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
