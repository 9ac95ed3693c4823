// Which tokens of a sequence to keep when its cache is cut to a budget, by a score per token:
// accumulated attention mass (H2O, Zhang et al. 2023), attention of the last queries (SnapKV, Li et
// al. 2024), or anything else where more means more worth keeping.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace attnforge::host {

// The `keep` tokens of highest score, ascending. The first `sink` and last `recent` tokens are kept
// in any case and count towards `keep`. Ties keep the earlier token. Scores are finite or -inf.
std::vector<int64_t> select_slots(std::span<const double> scores, int64_t keep, int64_t sink,
                                  int64_t recent);

}  // namespace attnforge::host
