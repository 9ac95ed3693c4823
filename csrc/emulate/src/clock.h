// Vector clocks: what a thread knows to have happened.
//
// An agent is a thread of the block, or an mbarrier, to which bulk copies are attributed. Agent a
// counts its own time in clock[a]; an event of a at time c happened before whatever holds a clock
// with clock[a] >= c. Clocks travel along barriers only, so an order that the schedule happened to
// give is no order here.
//
// The async proxy (TMA, wgmma) does not see a generic write because a barrier ordered it: a proxy
// fence has to stand between. `fenced` is the second clock of that: writes at or before fenced[a]
// are visible to the async proxy.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace attnforge::emulate {

using Time = uint32_t;

struct Clock {
  std::vector<Time> seen;
  std::vector<Time> fenced;

  Clock() = default;
  explicit Clock(size_t agents) : seen(agents), fenced(agents) {}

  void join(const Clock& other) {
    join_times(seen, other.seen);
    join_times(fenced, other.fenced);
  }

  void clear() {
    std::fill(seen.begin(), seen.end(), 0);
    std::fill(fenced.begin(), fenced.end(), 0);
  }

 private:
  static void join_times(std::vector<Time>& into, const std::vector<Time>& from) {
    Time* to = into.data();
    const Time* other = from.data();
    for (size_t i = 0, n = into.size(); i < n; ++i) to[i] = std::max(to[i], other[i]);
  }
};

}  // namespace attnforge::emulate
