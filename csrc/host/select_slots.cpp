#include "host/select_slots.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "host/errors.h"

namespace attnforge::host {

std::vector<int64_t> select_slots(std::span<const double> scores, int64_t keep, int64_t sink,
                                  int64_t recent) {
  const auto n = static_cast<int64_t>(scores.size());
  if (keep < 0 || sink < 0 || recent < 0) {
    refuse("compact: keep ", keep, ", sink ", sink, " and recent ", recent,
           " must not be negative");
  }
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(scores[i])) {
      refuse("compact: the score of token ", i, " is NaN; scores order tokens, so mask them first");
    }
  }
  const int64_t budget = std::min(keep, n);
  const int64_t head = std::min(sink, n), tail = std::min(recent, n - head);
  if (head + tail > budget) {
    refuse("compact: sink ", sink, " and recent ", recent, " keep ", head + tail,
           " tokens already, more than keep ", keep, "; raise keep");
  }
  std::vector<int64_t> kept(static_cast<size_t>(n - head - tail));
  std::iota(kept.begin(), kept.end(), head);
  const auto best = kept.begin() + (budget - head - tail);
  std::nth_element(kept.begin(), best, kept.end(), [&](int64_t a, int64_t b) {
    return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
  });
  kept.erase(best, kept.end());
  for (int64_t i = 0; i < head; ++i) kept.push_back(i);
  for (int64_t i = n - tail; i < n; ++i) kept.push_back(i);
  std::sort(kept.begin(), kept.end());
  return kept;
}

}  // namespace attnforge::host
