// Selection of columns: the k largest, those at or above a threshold, the fewest with a share of
// the softmax. All end in ascending ids and a length, without a sort and without a synchronisation.
//
//   rank        a score's bits, turned so that they compare as integers; -inf and NaN have none (0)
//   weight      1, or for top-p exp(s - max) as an integer of `unit` for 1: sums of integers are
//               exact, so that the order of atomics does not matter
//   find        three histograms, of 11, 11 and 10 bits of the ranks, find the largest rank at and
//               above which columns weigh enough. Of those that have that very rank the last ones
//               are taken, as the later column wins a tie
//   emit        one pass, numbered by prefix sums. A threshold needs that pass alone
//
// A block has a row. Forced columns come first and count. bytes: a row 4 times, top-p 6 times, from
// L2 after the first. Source: radix selection is folklore, top-p as Twilight (Lin et al., 2025).
#include "attnforge/retrieval.h"
#include "cuda/launch.h"
#include "cuda/retrieval/launch.h"
#include "cuda/tile/element.h"
#include "cuda/tile/scan.h"
#include "cuda/tile/sequence.h"

namespace attnforge::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kDigits = 2048, kOwn = kDigits / kThreads;  // of a histogram; of a thread
constexpr int kEach = 4;                                  // neighbouring columns of a thread
constexpr int kHistogram = 0, kFound = 8 * kDigits, kScratch = kFound + 32;
constexpr int kSharedBytes = kScratch + 8 * kWarps;
constexpr int kNobody = 0x7fffffff;

AF_DEVICE uint32_t rank_of(float x) {
  const uint32_t bits = ptx::bits_of_float(x);
  if (x != x || bits == 0xff800000u) return 0;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
AF_DEVICE float score_of(uint32_t rank) {
  return ptx::float_from_bits(rank & 0x80000000u ? rank ^ 0x80000000u : ~rank);
}

struct Row {
  const float* scores;
  int used, first_end, last_begin;  // forced: before first_end, and from last_begin on

  AF_DEVICE static Row of(const SelectParams& p, int64_t row) {
    const auto most = [](int64_t n, int limit) {
      return static_cast<int>(at_most<int64_t>(n, limit));
    };
    Row r;
    r.scores = p.scores + row * p.columns;
    r.used = static_cast<int>(p.columns);
    if (p.used != nullptr) r.used = at_least(0, at_most(p.used[row], r.used));
    r.first_end = most(p.first, r.used);
    r.last_begin = at_least(r.first_end, r.used - most(p.last, r.used));
    return r;
  }
  AF_DEVICE bool forced(int c) const { return c < first_end || c >= last_begin; }
  // f(column) for the columns of this thread.
  template <class F>
  AF_DEVICE void each(const F& f) const {
    for (int c = static_cast<int>(threadIdx.x); c < used; c += kThreads) f(c);
  }
};

// What is chosen: forced columns, ranks above `rank`, and of those equal to it all but the first
// `skip`.
struct Choice {
  uint32_t rank;
  int skip;
};
constexpr Choice kForcedAlone = {0xffffffffu, kNobody}, kAll = {0, kNobody};

struct Weights {
  float top;      // the largest score
  int unit_bits;  // 0: every column weighs 1

  AF_DEVICE uint64_t of(float x) const {
    const uint64_t unit = uint64_t{1} << unit_bits;
    if (unit_bits == 0 || x == top) return unit;
    return static_cast<uint64_t>(ptx::exp2_approx((x - top) * kLog2E) * static_cast<float>(unit));
  }
};

// 64 bits by two atomics: who carries sees it in what was there before.
AF_DEVICE void add_to(uint32_t digit, uint64_t weight) {
  const auto low = static_cast<uint32_t>(weight);
  const uint32_t old = ptx::fetch_add_shared(digit, low);
  const uint32_t high = static_cast<uint32_t>(weight >> 32) + (old + low < old);
  if (high != 0) ptx::fetch_add_shared(digit + 4, high);
}

// The largest rank at and above which free columns weigh `want` > 0; all if they are too light.
AF_DEVICE Choice find(const Row& row, const Weights& weights, uint64_t want) {
  const uint32_t shared = ptx::dynamic_shared_memory();
  const Block block = {kWarps, shared + kScratch};
  constexpr int kShifts[] = {21, 10, 0};
  uint32_t prefix = 0;
  uint64_t above = 0, equal = 0;  // weights of larger ranks, and of those that have the prefix
#pragma unroll 1
  for (int level = 0; level < 3; ++level) {
    const int shift = kShifts[level];
    const uint32_t known = level == 0 ? 0u : ~0u << kShifts[level - 1];
    const uint32_t digits = level == 2 ? kDigits / 2 - 1 : kDigits - 1;
    const auto digit_at = [&](int n) {  // from the largest digit on
      return shared + kHistogram + 8 * (kDigits - 1 - n);
    };
    const int first = static_cast<int>(threadIdx.x) * kOwn;
    for (int i = 0; i < kOwn; ++i) ptx::store_shared(digit_at(first + i), ptx::U32x2{{0, 0}});
    if (threadIdx.x == 0) ptx::store_shared(shared + kFound, int{kNobody});
    ptx::sync_threads();
    row.each([&](int c) {
      const float x = row.scores[c];
      const uint32_t rank = rank_of(x);
      if (rank == 0 || row.forced(c) || (rank & known) != prefix) return;
      add_to(shared + kHistogram + 8 * (rank >> shift & digits), weights.of(x));
    });
    ptx::sync_threads();
    uint64_t own[kOwn], sum = 0, all;
    for (int i = 0; i < kOwn; ++i) sum += own[i] = ptx::load_shared<uint64_t>(digit_at(first + i));
    uint64_t before = above + block.sum_before(sum, all);
    for (int i = 0; i < kOwn; ++i) {
      if (before < want && before + own[i] >= want) {  // one thread has it
        ptx::store_shared(shared + kFound, kDigits - 1 - (first + i));
        ptx::store_shared(shared + kFound + 8, before);
        ptx::store_shared(shared + kFound + 16, own[i]);
      }
      before += own[i];
    }
    ptx::sync_threads();
    const int digit = ptx::load_shared<int>(shared + kFound);
    if (digit == kNobody) return kAll;  // at the first level: later ones hold what it has found
    prefix |= static_cast<uint32_t>(digit) << shift;
    above = ptx::load_shared<uint64_t>(shared + kFound + 8);
    equal = ptx::load_shared<uint64_t>(shared + kFound + 16);
    ptx::sync_threads();
  }
  const uint64_t one = weights.of(score_of(prefix));
  const uint64_t taken = (want - above + one - 1) / one;
  return {prefix, static_cast<int>(equal / one - taken)};
}

AF_DEVICE Choice choose_k(const Row& row, int64_t k) {
  const int64_t want = k - (row.first_end + row.used - row.last_begin);
  if (want <= 0) return kForcedAlone;
  return find(row, {0.0f, 0}, static_cast<uint64_t>(want));
}

AF_DEVICE Choice choose_mass(const Row& row, double mass, int unit_bits) {
  if (mass >= 1.0) return kAll;
  const uint32_t shared = ptx::dynamic_shared_memory();
  const Block block = {kWarps, shared + kScratch};
  uint32_t top = 0;
  row.each([&](int c) { top = at_least(top, rank_of(row.scores[c])); });
  top = block.over(top, [](uint32_t a, uint32_t b) { return at_least(a, b); });
  if (top == 0) return kForcedAlone;
  const Weights weights = {score_of(top), unit_bits};
  uint64_t free = 0, forced = 0, total, total_forced;
  row.each([&](int c) {
    if (rank_of(row.scores[c]) == 0) return;
    (row.forced(c) ? forced : free) += weights.of(row.scores[c]);
  });
  block.sum_before(free, total);
  block.sum_before(forced, total_forced);
  const double need =
      mass * static_cast<double>(total + total_forced) - static_cast<double>(total_forced);
  if (need <= 0.0) return kForcedAlone;
  const auto want = static_cast<uint64_t>(need);
  return find(row, weights, want + (static_cast<double>(want) < need));
}

AF_DEVICE Choice choose_above(float threshold) {
  if (threshold != threshold) return kForcedAlone;
  const uint32_t rank = rank_of(threshold == 0.0f ? -0.0f : threshold);  // -0 is not below 0
  return {rank == 0 ? 0 : rank - 1, kNobody};
}

// Ascending ids of the choice; what finds no room is left out.
AF_DEVICE void emit(const SelectParams& p, int64_t number, const Row& row, const Choice& choice) {
  const Block block = {kWarps, ptx::dynamic_shared_memory() + kScratch};
  int32_t* ids = p.ids + number * p.slots;
  const int slots = static_cast<int>(p.slots);
  int found = 0, ties = 0;  // before this step: chosen but for ties, and ties
  for (int start = 0; start < row.used; start += kThreads * kEach) {
    const int first = start + static_cast<int>(threadIdx.x) * kEach;
    bool chosen[kEach], tied[kEach];
    uint32_t count = 0, all;  // ties in the upper half
    for (int i = 0; i < kEach; ++i) {
      const int c = first + i;
      const bool real = c < row.used, forced = real && row.forced(c);
      const uint32_t rank = real ? rank_of(row.scores[c]) : 0;
      chosen[i] = forced || rank > choice.rank;
      tied[i] = !forced && rank != 0 && rank == choice.rank;
      count += uint32_t{chosen[i]} + (uint32_t{tied[i]} << 16);
    }
    const uint32_t before = block.sum_before(count, all);
    int place = found + static_cast<int>(before & 0xffff);
    int tie = ties + static_cast<int>(before >> 16);
    for (int i = 0; i < kEach; ++i) {
      const int at = place + at_least(0, tie - choice.skip);
      const bool mine = chosen[i] || (tied[i] && tie >= choice.skip);
      if (mine && at < slots) ids[at] = first + i;
      place += chosen[i];
      tie += tied[i];
    }
    found += static_cast<int>(all & 0xffff);
    ties += static_cast<int>(all >> 16);
  }
  found = at_most(found + at_least(0, ties - choice.skip), slots);
  if (threadIdx.x == 0) p.lens[number] = found;
  for (int n = found + static_cast<int>(threadIdx.x); n < slots; n += kThreads) ids[n] = -1;
}

__global__ void __launch_bounds__(kThreads)
    select_columns_kernel(const __grid_constant__ SelectParams p, int unit_bits) {
  const int64_t number = blockIdx.x;
  const Row row = Row::of(p, number);
  Choice choice = kAll;
  if (p.kind == SelectKind::kTopK) choice = choose_k(row, p.k);
  if (p.kind == SelectKind::kTopP) choice = choose_mass(row, p.mass, unit_bits);
  if (p.kind == SelectKind::kThreshold) {
    choice = choose_above(p.threshold[number * p.threshold_stride]);
  }
  emit(p, number, row, choice);
}

}  // namespace

int select_columns(const SelectParams& params, void* stream) {
  if (params.rows == 0) return 0;
  int unit_bits = 62;  // so that a row's sum has room in 64 bits
  while (params.columns >> (62 - unit_bits) != 0) --unit_bits;
  return ATTNFORGE_LAUNCH((select_columns_kernel), dim3(static_cast<unsigned>(params.rows)),
                          dim3(kThreads), kSharedBytes, stream, params, unit_bits);
}

}  // namespace attnforge::cuda
