// Instructions that the lanes of a warp execute together.
#include <cstring>

#include "machine.h"

namespace attnforge::emulate {

void meet(const char* what, uint32_t mask, Aligned aligned, void* argument, const Site& site,
          const Finish& finish) {
  Machine& m = machine();
  Thread& me = m.current();
  Block& block = m.block();
  const uint32_t threads = m.block_shape().x * m.block_shape().y * m.block_shape().z;
  const uint32_t lanes = std::min(32u, threads - me.warp() * 32);
  mask &= lanes == 32 ? ~0u : (1u << lanes) - 1;
  if (!(mask >> me.lane() & 1)) {
    fail(site, std::string(what) + ": the lane is not in its own mask");
  }
  for (uint32_t lane = 0; lane < lanes; ++lane) {
    if (mask >> lane & 1 && block.threads[me.warp() * 32 + lane].state == State::kExited) {
      fail(site, std::string(what) + ": lane " + std::to_string(lane) +
                     " is in the mask and has left the kernel");
    }
  }
  std::vector<Meeting>& meetings = block.meetings[me.warp()];
  size_t found = meetings.size();
  for (size_t i = 0; i < meetings.size(); ++i) {
    const Meeting& other = meetings[i];
    if (!(other.mask >> me.lane() & 1)) continue;
    if (!std::strcmp(other.what, what) && other.mask == mask &&
        (aligned == Aligned::kNo || same_line(other.site, site))) {
      found = i;
    } else if (other.arrived & mask) {  // each waits for the other
      fail(site, "warp divergence: the lane executes " + std::string(what) +
                     ", and lanes of its mask wait for it in " + other.what + at(other.site) +
                     (other.mask != mask ? " with another mask" : ""));
    }
  }
  if (found == meetings.size()) meetings.push_back(Meeting{what, site, mask, 0, {}});
  Meeting& meeting = meetings[found];
  meeting.lane[me.lane()] = argument;
  meeting.arrived |= 1u << me.lane();
  if (meeting.arrived != mask) {
    m.wait(what, site);
    return;
  }
  const Finish::Lanes arguments = meeting.lane;
  meetings.erase(meetings.begin() + static_cast<std::ptrdiff_t>(found));
  finish(arguments);
  for (uint32_t lane = 0; lane < lanes; ++lane) {
    if (mask >> lane & 1 && lane != me.lane()) m.wake(block.threads[me.warp() * 32 + lane]);
  }
}

uint32_t lane_id() {
  return machine().current().lane();
}

void sync_warp(uint32_t mask, Site site) {
  meet("sync_warp", mask, Aligned::kNo, &machine().current(), site, [](const auto& lanes) {
    Clock all(static_cast<Thread*>(*std::find_if(lanes.begin(), lanes.end(), [](void* lane) {
                return lane != nullptr;
              }))->clock.seen.size());
    for (void* lane : lanes) {
      if (lane) all.join(static_cast<Thread*>(lane)->clock);
    }
    for (void* lane : lanes) {
      if (!lane) continue;
      auto& thread = *static_cast<Thread*>(lane);
      thread.clock = all;
      ++thread.clock.seen[thread.index];
    }
  });
}

namespace {

struct ShuffleArgument {
  uint32_t value;
  uint32_t operand;
  uint32_t result;
};

const char* shuffle_name(Shuffle kind) {
  switch (kind) {
    case Shuffle::kXor:
      return "shuffle_xor";
    case Shuffle::kFrom:
      return "shuffle_from";
    case Shuffle::kUp:
      return "shuffle_up";
    case Shuffle::kDown:
      return "shuffle_down";
  }
  return "";
}

int shuffle_source(Shuffle kind, int lane, int operand) {
  switch (kind) {
    case Shuffle::kXor:
      return lane ^ (operand & 31);
    case Shuffle::kFrom:
      return operand & 31;
    case Shuffle::kUp:
      return lane - operand < 0 ? lane : lane - operand;
    case Shuffle::kDown:
      return lane + operand > 31 ? lane : lane + operand;
  }
  return lane;
}

}  // namespace

void shuffle(Shuffle kind, void* value, uint32_t operand, uint32_t mask, Site site) {
  ShuffleArgument mine{0, operand, 0};
  std::memcpy(&mine.value, value, 4);
  meet(shuffle_name(kind), mask, Aligned::kNo, &mine, site, [&](const auto& lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!lanes[lane]) continue;
      auto& argument = *static_cast<ShuffleArgument*>(lanes[lane]);
      const int source = shuffle_source(kind, lane, static_cast<int>(argument.operand));
      if (!lanes[source]) {
        fail(site, std::string(shuffle_name(kind)) + ": lane " + std::to_string(lane) +
                       " reads lane " + std::to_string(source) + ", which is not in the mask");
      }
      argument.result = static_cast<ShuffleArgument*>(lanes[source])->value;
    }
  });
  std::memcpy(value, &mine.result, 4);
}

uint32_t ballot(bool predicate, uint32_t mask, Site site) {
  struct Argument {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  meet("a vote", mask, Aligned::kNo, &mine, site, [](const auto& lanes) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane] && static_cast<Argument*>(lanes[lane])->predicate) bits |= 1u << lane;
    }
    for (void* lane : lanes) {
      if (lane) static_cast<Argument*>(lane)->result = bits;
    }
  });
  return mine.result;
}

bool elect_one(Site site) {
  bool mine = false;
  // PTX leaves open which lane it is; kernels that take lane 0 for granted are found out.
  const auto elected = static_cast<size_t>(machine().random(32));
  meet("elect_one", ~0u, Aligned::kYes, &mine, site, [&](const auto& lanes) {
    size_t lane = elected;
    while (!lanes[lane]) lane = (lane + 1) % 32;
    *static_cast<bool*>(lanes[lane]) = true;
  });
  return mine;
}

}  // namespace attnforge::emulate
