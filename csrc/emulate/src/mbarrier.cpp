// mbarriers: phases, arrivals and bytes; csrc/cuda/ptx/mbarrier.h says what they mean.
#include "machine.h"

namespace attnforge::emulate {
namespace {

constexpr int64_t kMaxBytes = (1 << 20) - 1;  // what the hardware's count holds

}  // namespace

Mbarrier& mbarrier_at(uint32_t address, const char* what, bool by_copy, const Site& site) {
  Machine& m = machine();
  const uint32_t offset = m.shared_offset(address, 8, 8, site);
  const auto found = m.block().mbarriers.find(offset);
  if (found == m.block().mbarriers.end()) {
    fail(site, std::string(what) + ": there is no mbarrier at byte " + std::to_string(offset));
  }
  Mbarrier& barrier = found->second;
  if (m.current().clock.seen[barrier.init_thread] < barrier.init_time) {
    fail(site, std::string(what) + ": " + agent_name(barrier.init_thread) +
                   " initialised the mbarrier, and no barrier of the block stands between");
  }
  if (by_copy && !barrier.fenced) {
    fail(site, std::string(what) + ": no fence_mbarrier_init after the mbarrier's init");
  }
  return barrier;
}

// Completes the phase if nothing is missing.
void advance(Block& block, Mbarrier& barrier) {
  if (barrier.missing || barrier.bytes) return;
  ++barrier.phase;
  barrier.missing = barrier.count;
  barrier.complete = barrier.arrived;
  barrier.complete.seen[barrier.agent] = barrier.phase;
  const auto passes = [&](const std::pair<uint32_t, uint32_t>& waiter) {
    return (barrier.phase & 1) != waiter.second;
  };
  for (const auto& waiter : barrier.waiting) {
    if (!passes(waiter)) continue;
    block.threads[waiter.first].clock.join(barrier.complete);
    machine().wake(block.threads[waiter.first]);
  }
  std::erase_if(barrier.waiting, passes);
}

void land_bytes(Block& block, Mbarrier& barrier, uint32_t bytes) {
  --barrier.copies;
  barrier.bytes -= bytes;
  advance(block, barrier);
}

void mbarrier_init(uint32_t address, uint32_t count, Site site) {
  Machine& m = machine();
  const uint32_t offset = m.shared_offset(address, 8, 8, site);
  if (count == 0 || count >= 1u << 20) {
    fail(site,
         "mbarrier_init with a count of " + std::to_string(count) + "; 1 to 2^20 - 1 is possible");
  }
  Block& block = m.block();
  if (block.mbarriers_made == kMaxMbarriers) fail(site, "more than 64 mbarriers in a block");
  block.shadow.write(offset, 8, m.access(site), Written::kBarrier);
  Mbarrier& barrier = block.mbarriers[offset];
  barrier = Mbarrier{};
  barrier.agent = m.threads() + block.mbarriers_made++;
  barrier.count = barrier.missing = count;
  barrier.init_thread = m.current().index;
  barrier.init_time = m.current().clock.seen[barrier.init_thread];
  barrier.arrived = Clock(m.threads() + kExtraAgents);
  barrier.complete = barrier.arrived;
}

void fence_mbarrier_init(Site) {
  Machine& m = machine();
  for (auto& [offset, barrier] : m.block().mbarriers) {
    barrier.fenced |= barrier.init_thread == m.current().index;
  }
}

void mbarrier_invalidate(uint32_t address, Site site) {
  Machine& m = machine();
  const Mbarrier& barrier = mbarrier_at(address, "mbarrier_invalidate", false, site);
  if (!barrier.waiting.empty()) {
    fail(site, "mbarrier_invalidate: " + agent_name(barrier.waiting[0].first) + " waits for it");
  }
  if (barrier.copies) fail(site, "mbarrier_invalidate: copies for it are in flight");
  const uint32_t offset = address - kSharedBase;
  m.block().mbarriers.erase(offset);
  m.block().shadow.forget(offset, 8);
}

void mbarrier_arrive(uint32_t address, uint32_t expected_bytes, Site site) {
  Machine& m = machine();
  m.maybe_preempt();
  Mbarrier& barrier = mbarrier_at(address, "mbarrier_arrive", false, site);
  if (barrier.missing == 0) {
    fail(site, "mbarrier_arrive: all " + std::to_string(barrier.count) +
                   " arrivals of this phase have come, and its bytes have not");
  }
  barrier.bytes += expected_bytes;
  if (barrier.bytes > kMaxBytes) fail(site, "mbarrier_arrive_expect: more than 2^20 - 1 bytes");
  m.release(barrier.arrived);
  --barrier.missing;
  advance(m.block(), barrier);
}

bool mbarrier_try_wait(uint32_t address, uint32_t parity, Site site) {
  Machine& m = machine();
  m.maybe_preempt();
  Mbarrier& barrier = mbarrier_at(address, "mbarrier_wait", false, site);
  if (parity > 1) fail(site, "mbarrier_wait for parity " + std::to_string(parity));
  if ((barrier.phase & 1) != parity) {
    m.acquire(barrier.complete);
    return true;
  }
  if (m.random(4) == 0) {  // its time was up: who does not look at the result is found out
    m.yield();
    return false;
  }
  barrier.waiting.emplace_back(m.current().index, parity);
  m.wait(parity ? "mbarrier_wait (parity 1)" : "mbarrier_wait (parity 0)", site);
  return true;
}

void cp_async_mbarrier_arrive(uint32_t address, Site site) {
  Machine& m = machine();
  Thread& me = m.current();
  Mbarrier& barrier = mbarrier_at(address, "cp_async_mbarrier_arrive", false, site);
  std::vector<Copy> copies;
  for (auto& group : me.copy_groups) copies.insert(copies.end(), group.begin(), group.end());
  copies.insert(copies.end(), me.open_copies.begin(), me.open_copies.end());
  me.copy_groups.clear();
  me.open_copies.clear();
  Block* block = me.block;
  ++barrier.copies;
  m.start({block,
           [=, &barrier] {
             --barrier.copies;
             for (const Copy& copy : copies) {
               land_copy(*block, copy, barrier.agent, barrier.phase + 1);
             }
             if (barrier.missing == 0) {
               throw Error("attnforge emulator: " + machine().where() + at(site) +
                           ": cp_async_mbarrier_arrive beyond the count of the phase");
             }
             --barrier.missing;
             advance(*block, barrier);
           },
           site});
}

void fence_proxy_async(Site) {
  Machine& m = machine();
  Thread& me = m.current();
  me.clock.fenced = me.clock.seen;
  ++me.clock.seen[me.index];
  for (auto& [offset, barrier] : m.block().mbarriers) {
    barrier.fenced |= barrier.init_thread == me.index;
  }
}

}  // namespace attnforge::emulate
