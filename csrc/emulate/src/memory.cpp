// Loads, stores, atomics, and cp.async.
#include <cstring>

#include "machine.h"

namespace attnforge::emulate {

uint32_t dynamic_shared_memory() {
  return kSharedBase;
}

void load_shared(void* to, uint32_t address, uint32_t bytes, Site site) {
  Machine& m = machine();
  m.maybe_preempt();
  const uint32_t offset = m.shared_offset(address, bytes, bytes, site);
  m.block().shadow.read(offset, bytes, m.access(site));
  std::memcpy(to, m.block().shared.data() + offset, bytes);
}

void store_shared(uint32_t address, const void* from, uint32_t bytes, Site site) {
  Machine& m = machine();
  m.maybe_preempt();
  const uint32_t offset = m.shared_offset(address, bytes, bytes, site);
  m.block().shadow.write(offset, bytes, m.access(site));
  std::memcpy(m.block().shared.data() + offset, from, bytes);
}

namespace {

// An atomic on 4 bytes of shared memory: what was there before `change` made the new value of it.
template <typename T, typename Change>
T update_shared(uint32_t address, const Change& change, Site site) {
  Machine& m = machine();
  m.maybe_preempt();
  const uint32_t offset = m.shared_offset(address, 4, 4, site);
  m.block().shadow.add(offset, 4, m.access(site));
  T old;
  std::memcpy(&old, m.block().shared.data() + offset, 4);
  const T now = change(old);
  std::memcpy(m.block().shared.data() + offset, &now, 4);
  return old;
}

}  // namespace

void add_shared(uint32_t address, float value, Site site) {
  update_shared<float>(address, [&](float x) { return x + value; }, site);
}

uint32_t fetch_add_shared(uint32_t address, uint32_t value, Site site) {
  return update_shared<uint32_t>(address, [&](uint32_t x) { return x + value; }, site);
}

uint32_t fetch_or_shared(uint32_t address, uint32_t bits, Site site) {
  return update_shared<uint32_t>(address, [&](uint32_t x) { return x | bits; }, site);
}

void add_global(float* address, float value, Site) {
  machine().maybe_preempt();
  *address += value;
}

uint32_t fetch_add_global(uint32_t* address, uint32_t value, Site) {
  machine().maybe_preempt();
  const uint32_t old = *address;
  *address += value;
  return old;
}

// Spin loops end here: always lets others run.
uint32_t load_acquire_global(const uint32_t* address, Site site) {
  Thread& me = machine().current();
  me.waits_for = "load_acquire_global";
  me.waits_at = site;
  machine().yield();
  return *static_cast<const volatile uint32_t*>(address);
}

void store_release_global(uint32_t* address, uint32_t value, Site) {
  machine().maybe_preempt();
  *static_cast<volatile uint32_t*>(address) = value;
}

void cp_async(uint32_t shared, const void* global, uint32_t bytes, uint32_t source_bytes,
              Site site) {
  Machine& m = machine();
  m.maybe_preempt();
  const uint32_t offset = m.shared_offset(shared, bytes, bytes, site);
  if (source_bytes > bytes) {
    fail(site, "cp.async of " + std::to_string(bytes) + " bytes with a source of " +
                   std::to_string(source_bytes));
  }
  if (reinterpret_cast<uintptr_t>(global) % bytes) {
    fail(site, "cp.async: the global address is not aligned to " + std::to_string(bytes));
  }
  m.block().shadow.write(offset, bytes, m.access(site), Written::kCopying);
  m.current().open_copies.push_back(Copy{offset, bytes, source_bytes, global, site});
}

void cp_async_commit(Site) {
  Thread& me = machine().current();
  me.copy_groups.push_back(std::move(me.open_copies));
  me.open_copies.clear();
}

void land_copy(Block& block, const Copy& copy, uint32_t agent, Time time) {
  unsigned char* to = block.shared.data() + copy.offset;
  std::memset(to, 0, copy.bytes);
  if (copy.source_bytes) std::memcpy(to, copy.global, copy.source_bytes);
  block.shadow.land(copy.offset, copy.bytes, agent, time, Written::kGeneric);
}

void cp_async_wait(int pending_groups, Site) {
  Machine& m = machine();
  m.maybe_preempt();
  Thread& me = m.current();
  while (me.copy_groups.size() > static_cast<size_t>(pending_groups)) {
    for (const Copy& copy : me.copy_groups.front()) {
      land_copy(*me.block, copy, me.index, me.clock.seen[me.index]);
    }
    me.copy_groups.pop_front();
  }
}

}  // namespace attnforge::emulate
