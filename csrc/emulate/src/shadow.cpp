#include "shadow.h"

#include <string>

#include "report.h"

namespace attnforge::emulate {

void Shadow::reset(uint32_t bytes) {
  cells_.assign(bytes, Cell{0, 0, Written::kNever, 0});
  sites_.assign(bytes, 0);
  readers_.assign(bytes, 0);
  pending_.assign(bytes, 0);
  pool_.assign(1, Reader{});
  if (known_sites_.empty()) known_sites_.emplace_back();
  site_slots_.resize(1024);
}

// Sites are few and repeat: a direct-mapped table finds them, a collision only stores one twice.
uint32_t Shadow::intern(const Site& site) {
  const size_t hash =
      (reinterpret_cast<uintptr_t>(site.file_name()) / 8 + site.line() * 31 + site.column()) % 1024;
  const Site& known = known_sites_[site_slots_[hash]];
  if (site_slots_[hash] == 0 || known.file_name() != site.file_name() ||
      known.line() != site.line() || known.column() != site.column()) {
    site_slots_[hash] = static_cast<uint32_t>(known_sites_.size());
    known_sites_.push_back(site);
  }
  return site_slots_[hash];
}

// Neighbouring bytes with one history are checked once.
uint32_t Shadow::run_end(uint32_t begin, uint32_t end) const {
  uint32_t i = begin + 1;
  while (i < end && cells_[i] == cells_[begin] && readers_[i] == readers_[begin] &&
         pending_[i] == pending_[begin]) {
    ++i;
  }
  return i;
}

void Shadow::read(uint32_t offset, uint32_t bytes, const Access& access) {
  const uint32_t site = intern(access.site);
  const uint32_t end = offset + bytes;
  for (uint32_t i = offset; i < end;) {
    const uint32_t next = run_end(i, end);
    check_read(i, access);
    const uint32_t list = add_reader(readers_[i], access, site, false);
    for (; i < next; ++i) readers_[i] = list;
  }
}

void Shadow::write(uint32_t offset, uint32_t bytes, const Access& access, Written state) {
  const uint32_t site = intern(access.site);
  const Cell cell{access.clock->seen[access.agent], static_cast<uint16_t>(access.agent), state, 0};
  const uint32_t end = offset + bytes;
  for (uint32_t i = offset; i < end;) {
    const uint32_t next = run_end(i, end);
    check_write(i, access, state);
    for (; i < next; ++i) {
      cells_[i] = cell;
      sites_[i] = site;
      readers_[i] = 0;
    }
  }
}

void Shadow::add(uint32_t offset, uint32_t bytes, const Access& access) {
  const uint32_t site = intern(access.site);
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    // An unordered red before this one has checked the initial value; their order does not matter.
    if (cells_[i].state != Written::kAtomic) check_read(i, access);
    check_write(i, access, Written::kAtomic);
    readers_[i] = add_reader(readers_[i], access, site, true);
    cells_[i] = Cell{access.clock->seen[access.agent], static_cast<uint16_t>(access.agent),
                     Written::kAtomic, 0};
    sites_[i] = site;
  }
}

void Shadow::land(uint32_t offset, uint32_t bytes, uint32_t agent, Time time, Written state) {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    cells_[i] = Cell{time, static_cast<uint16_t>(agent), state, 0};
  }
}

void Shadow::begin_pending_read(uint32_t offset, uint32_t bytes, const Access& access) {
  const uint32_t end = offset + bytes;
  for (uint32_t i = offset; i < end;) {
    const uint32_t next = run_end(i, end);
    check_read(i, access);
    for (; i < next; ++i) ++pending_[i];
  }
}

void Shadow::end_pending_read(uint32_t offset, uint32_t bytes, const Access& access) {
  const uint32_t site = intern(access.site);
  const uint32_t end = offset + bytes;
  for (uint32_t i = offset; i < end;) {
    const uint32_t next = run_end(i, end);
    const uint32_t list = add_reader(readers_[i], access, site, false);
    for (; i < next; ++i) {
      readers_[i] = list;
      --pending_[i];
    }
  }
}

void Shadow::forget(uint32_t offset, uint32_t bytes) {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    cells_[i] = Cell{0, 0, Written::kNever, 0};
    readers_[i] = 0;
  }
}

void Shadow::check_read(uint32_t offset, const Access& access) const {
  const Cell& cell = cells_[offset];
  switch (cell.state) {
    case Written::kNever:
      fail(offset, access, "reads", "which nobody has written");
    case Written::kCopying:
      fail(offset, access, "reads",
           "which a cp.async of " + writer(offset) + " still writes: no wait_group covers it");
    case Written::kBulk:
      fail(offset, access, "reads",
           "which a bulk copy of " + writer(offset) + " still writes: its mbarrier phase is open");
    case Written::kBarrier:
      fail(offset, access, "reads", "where an mbarrier lives");
    default:
      break;
  }
  if (access.clock->seen[cell.agent] < cell.time) {
    fail(offset, access, "reads",
         "written by " + writer(offset) + ", and no barrier orders the write before the read");
  }
  for (uint32_t r = cell.state == Written::kAtomic ? readers_[offset] : 0; r; r = pool_[r].next) {
    if (pool_[r].red && access.clock->seen[pool_[r].agent] < pool_[r].time) {
      fail(offset, access, "reads",
           "written by " + agent_name(pool_[r].agent) + at(known_sites_[pool_[r].site]) +
               ", and no barrier orders the write before the read");
    }
  }
  if (access.proxy == Proxy::kAsync && cell.state != Written::kAsync &&
      access.clock->fenced[cell.agent] < cell.time) {
    fail(offset, access, "reads through the async proxy",
         "written by " + writer(offset) + ", and no fence.proxy.async stands between");
  }
}

void Shadow::check_write(uint32_t offset, const Access& access, Written state) const {
  const Cell& cell = cells_[offset];
  const bool both_atomic = cell.state == Written::kAtomic && state == Written::kAtomic;
  if (cell.state == Written::kCopying) {
    fail(offset, access, "writes", "which a cp.async of " + writer(offset) + " still writes");
  }
  if (cell.state == Written::kBulk) {
    fail(offset, access, "writes", "which a bulk copy of " + writer(offset) + " still writes");
  }
  if (cell.state == Written::kBarrier) fail(offset, access, "writes", "where an mbarrier lives");
  if (pending_[offset]) {
    fail(offset, access, "writes", "which an asynchronous operation in flight may still read");
  }
  if (cell.state != Written::kNever && !both_atomic) {
    if (access.clock->seen[cell.agent] < cell.time) {
      fail(offset, access, "writes",
           "written by " + writer(offset) + ", and no barrier orders the two writes");
    }
    if (access.proxy == Proxy::kAsync && cell.state != Written::kAsync &&
        access.clock->fenced[cell.agent] < cell.time) {
      fail(offset, access, "writes through the async proxy",
           "written by " + writer(offset) + ", and no fence.proxy.async stands between");
    }
  }
  for (uint32_t r = readers_[offset]; r; r = pool_[r].next) {
    if (both_atomic && pool_[r].red) continue;
    if (access.clock->seen[pool_[r].agent] < pool_[r].time) {
      fail(offset, access, "writes",
           (pool_[r].red ? "written by " : "read by ") + agent_name(pool_[r].agent) +
               at(known_sites_[pool_[r].site]) +
               (pool_[r].red ? ", and no barrier orders the two writes"
                             : ", and no barrier orders the read before the write"));
    }
  }
}

uint32_t Shadow::add_reader(uint32_t list, const Access& access, uint32_t site, bool red) {
  const Time now = access.clock->seen[access.agent];
  const Reader& head = pool_[list];
  if (list && head.agent == access.agent && head.time == now && head.red == red) return list;
  // A reader that this one has seen adds nothing: who is ordered after this one is after both. A
  // red stays for the readers, which need not be ordered among themselves.
  const auto covered = [&](const Reader& r) {
    return access.clock->seen[r.agent] >= r.time && (red || !r.red);
  };
  bool any_covered = false;
  for (uint32_t r = list; r; r = pool_[r].next) any_covered |= covered(pool_[r]);
  if (any_covered) {
    uint32_t kept = 0;
    for (uint32_t r = list; r; r = pool_[r].next) {
      if (covered(pool_[r])) continue;
      Reader copy = pool_[r];
      copy.next = kept;
      pool_.push_back(copy);
      kept = static_cast<uint32_t>(pool_.size() - 1);
    }
    list = kept;
  }
  pool_.push_back(Reader{now, static_cast<uint16_t>(access.agent), red, site, list});
  return static_cast<uint32_t>(pool_.size() - 1);
}

std::string Shadow::writer(uint32_t offset) const {
  return agent_name(cells_[offset].agent) + at(known_sites_[sites_[offset]]);
}

void Shadow::fail(uint32_t offset, const Access& access, const char* verb,
                  const std::string& cause) const {
  emulate::fail(access.site, std::string(verb) + " shared memory at byte " +
                                 std::to_string(offset) + ", " + cause);
}

}  // namespace attnforge::emulate
