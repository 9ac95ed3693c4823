// Hardware barriers 0..15 of a block.
#include "machine.h"

namespace attnforge::emulate {
namespace {

// `.aligned`: the lanes of a warp come from one instruction.
void check_warp(const Barrier& barrier, const Thread& me, uint32_t threads, const Site& site) {
  for (uint32_t i = me.warp() * 32; i < std::min(threads, me.warp() * 32 + 32); ++i) {
    if (barrier.here[i] && !same_line(barrier.sites[i], site)) {
      fail(site, "barrier divergence: lanes of the warp are at different lines; " + agent_name(i) +
                     " is" + at(barrier.sites[i]));
    }
  }
}

void arrive(Barrier& barrier, const char* what, uint32_t expected, bool waits, const Site& site) {
  Machine& m = machine();
  Thread& me = m.current();
  const auto threads = m.block_shape().x * m.block_shape().y * m.block_shape().z;
  if (barrier.expected == 0) {
    barrier.expected = expected;
    barrier.here.assign(threads, false);
    barrier.sites.resize(threads);
  }
  if (barrier.expected != expected) {
    fail(site, std::string(what) + " with " + std::to_string(expected) +
                   " threads, and others are there with " + std::to_string(barrier.expected));
  }
  if (barrier.here[me.index]) {
    fail(site, std::string(what) + ": the thread is there already" + at(barrier.sites[me.index]) +
                   ", and the barrier is not complete");
  }
  check_warp(barrier, me, threads, site);
  barrier.here[me.index] = true;
  barrier.sites[me.index] = site;
  m.release(barrier.clock);
  if (++barrier.arrived < expected) {
    if (waits) {
      barrier.waiting.push_back(me.index);
      m.wait(what, site);
    }
    return;
  }
  for (uint32_t i : barrier.waiting) {
    Thread& other = me.block->threads[i];
    other.clock.join(barrier.clock);
    m.wake(other);
  }
  if (waits) m.acquire(barrier.clock);
  barrier.waiting.clear();
  barrier.expected = barrier.arrived = 0;
  barrier.clock.clear();
}

}  // namespace

void sync_threads(Site site) {
  Machine& m = machine();
  Block& block = m.block();
  Barrier& barrier = block.barriers[0];
  const auto threads = m.block_shape().x * m.block_shape().y * m.block_shape().z;
  if (block.exited) {
    fail(site, "barrier divergence: sync_threads, and " + std::to_string(block.exited) +
                   " threads of the block have left the kernel");
  }
  if (!barrier.waiting.empty() && !same_line(barrier.sites[barrier.waiting[0]], site)) {
    fail(site, "barrier divergence: sync_threads here, and " + agent_name(barrier.waiting[0]) +
                   " is at another one," + at(barrier.sites[barrier.waiting[0]]));
  }
  arrive(barrier, "sync_threads", threads, true, site);
}

void named_barrier(uint32_t id, uint32_t threads, bool wait, Site site) {
  const char* what = wait ? "named_barrier_sync" : "named_barrier_arrive";
  Machine& m = machine();
  const auto block_threads = m.block_shape().x * m.block_shape().y * m.block_shape().z;
  if (id == 0 || id >= kNamedBarriers) {
    fail(site, std::string(what) + " of barrier " + std::to_string(id) +
                   "; 1 to 15 exist, 0 is sync_threads");
  }
  if (threads == 0 || threads % 32 || threads > (block_threads + 31) / 32 * 32) {
    fail(site, std::string(what) + " with " + std::to_string(threads) +
                   " threads; a multiple of 32 up to the block's " + std::to_string(block_threads) +
                   " is possible");
  }
  arrive(m.block().barriers[id], what, threads, wait, site);
}

}  // namespace attnforge::emulate
