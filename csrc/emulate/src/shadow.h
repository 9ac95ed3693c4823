// What is known about every byte of a block's shared memory: who wrote it, who has read it since,
// and whether an asynchronous operation holds it.
//
// Rules, for an access by a thread with clock C:
//   a read    the byte was written, no copy into it is in flight, and the write is in C;
//   a write   besides, all reads since the last write are in C, and no asynchronous read is
//   pending.
// The async proxy asks C.fenced about generic writes, not C.seen.
#pragma once

#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

#include "clock.h"

namespace attnforge::emulate {

using Site = std::source_location;

enum class Written : uint8_t {
  kNever,
  kGeneric,  // st.shared, or a cp.async that was waited for
  kAtomic,   // red.shared: unordered among themselves
  kAsync,    // a bulk copy whose mbarrier phase is complete
  kCopying,  // cp.async in flight, of thread `agent`
  kBulk,     // bulk copy in flight, for the mbarrier that is `agent`
  kBarrier,  // holds an mbarrier: no data
};

enum class Proxy { kGeneric, kAsync };

// Who accesses, from where.
struct Access {
  uint32_t agent;
  const Clock* clock;
  Site site;
  Proxy proxy = Proxy::kGeneric;
};

class Shadow {
 public:
  void reset(uint32_t bytes);

  // Offsets are bytes from the start of the window; the caller has checked bounds. Each throws
  // Error.
  void read(uint32_t offset, uint32_t bytes, const Access& access);
  void write(uint32_t offset, uint32_t bytes, const Access& access,
             Written state = Written::kGeneric);
  // red: an initial value must be there, and only other reds may be unordered with it.
  void add(uint32_t offset, uint32_t bytes, const Access& access);
  // The asynchronous write has landed: from now on it is a write of `agent` at `time`.
  void land(uint32_t offset, uint32_t bytes, uint32_t agent, Time time, Written state);

  // Between them, an asynchronous operation may read at any time. It counts as a read at the end.
  void begin_pending_read(uint32_t offset, uint32_t bytes, const Access& access);
  void end_pending_read(uint32_t offset, uint32_t bytes, const Access& access);

  void forget(uint32_t offset, uint32_t bytes);  // as if never written: an mbarrier was invalidated

 private:
  struct Cell {  // the last write
    Time time;
    uint16_t agent;
    Written state;
    uint8_t unused;
    bool operator==(const Cell&) const = default;
  };
  // A list: the readers since the last write that no later reader has seen, and the reds.
  struct Reader {
    Time time;
    uint16_t agent;
    bool red;
    uint32_t site;
    uint32_t next;
  };

  void check_read(uint32_t offset, const Access& access) const;
  void check_write(uint32_t offset, const Access& access, Written state) const;
  uint32_t add_reader(uint32_t list, const Access& access, uint32_t site, bool red);
  uint32_t intern(const Site& site);
  uint32_t run_end(uint32_t begin, uint32_t end) const;
  [[noreturn]] void fail(uint32_t offset, const Access& access, const char* verb,
                         const std::string& cause) const;
  std::string writer(uint32_t offset) const;

  std::vector<Cell> cells_;
  std::vector<uint32_t> sites_;    // of the last write, index into known_sites_
  std::vector<uint32_t> readers_;  // head of the list, 0: none
  std::vector<uint16_t> pending_;  // asynchronous reads in flight
  std::vector<Reader> pool_;
  std::vector<Site> known_sites_;
  std::vector<uint32_t> site_slots_;
};

}  // namespace attnforge::emulate
