// The state of a launch: blocks, their threads and shared memory, and the scheduler.
//
// A block's threads are fibers. The scheduler picks a random runnable one; it runs until it waits,
// or until a memory access hands over. Asynchronous work that no thread waits for by itself (bulk
// copies) is another choice of the scheduler, taken seldom, so that it completes late.
#pragma once

#include <array>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "attnforge_emulate/device.h"
#include "attnforge_emulate/launch.h"
#include "clock.h"
#include "fiber.h"
#include "report.h"
#include "shadow.h"

namespace attnforge::emulate {

struct Block;

constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kMaxMbarriers = 64;
constexpr uint32_t kMaxWarps = kMaxThreads / 32;
// Agents of a block: its threads, its mbarriers, and the tensor core of each warp.
constexpr uint32_t kExtraAgents = kMaxMbarriers + kMaxWarps;
constexpr uint32_t kNamedBarriers = 16;
constexpr uint32_t kSharedBase =
    1024;  // address of the first dynamic byte, so that 0 is no address
constexpr uint32_t kMaxShared = 227 * 1024;
constexpr uint8_t kSharedPoison = 0xff;  // a NaN in every floating-point type, -1 as an integer

// One cp.async in flight: the bytes are read from global memory when it lands.
struct Copy {
  uint32_t offset, bytes, source_bytes;
  const void* global;
  Site site;
};

// A bulk store in flight: a tensor map's copy, or null.
struct Store {
  std::array<uint64_t, 16> map;
  std::array<int32_t, 5> at;
  uint32_t offset, bytes;
  bool add;
  Site site;
};

// An mbarrier, beside the 8 bytes that stand for it.
struct Mbarrier {
  uint32_t agent = 0;
  uint32_t count = 0;
  uint32_t missing = 0;  // arrivals of the current phase
  int64_t bytes = 0;     // expected, less landed
  Time phase = 0;        // complete phases
  uint32_t init_thread = 0;
  Time init_time = 0;
  bool fenced = false;  // after init
  uint32_t copies = 0;  // in flight
  Clock arrived, complete;
  std::vector<std::pair<uint32_t, uint32_t>> waiting;  // thread, parity
};

// A wgmma in flight, of one warp.
struct WarpProduct {
  Product product;
  std::array<float*, 32> d;
  std::array<std::array<uint32_t, 4>, 32> a;
  bool a_shared, add;
  std::vector<uint32_t> a_chunks, b_chunks;  // offsets of 16 bytes
  Site site;
};

// What the tensor core of a warp is at.
struct TensorCore {
  bool fenced = false;
  Time time = 1;
  std::vector<WarpProduct> open;
  std::deque<std::vector<WarpProduct>> groups;
  struct Held {
    std::vector<float> values;
    int in_flight = 0;
  };
  std::map<float*, Held> accumulators;  // by the lane's registers, which are poisoned meanwhile
};

enum class State : uint8_t { kRunnable, kWaiting, kExited };

struct Thread {
  Block* block = nullptr;
  uint32_t index = 0;  // linear in the block
  dim3 position;
  State state = State::kExited;
  Clock clock;
  std::unique_ptr<Fiber> fiber;
  const char* waits_for = nullptr;
  Site waits_at;
  std::vector<Copy> open_copies;              // since the last commit
  std::deque<std::vector<Copy>> copy_groups;  // committed, oldest first
  std::vector<Store> open_stores;
  std::deque<std::vector<Store>> store_groups;

  uint32_t lane() const { return index % 32; }
  uint32_t warp() const { return index / 32; }
};

// Lanes that gather for one warp-wide instruction. The last to come does the work for all.
struct Meeting {
  const char* what = nullptr;
  Site site;
  uint32_t mask = 0;
  uint32_t arrived = 0;
  std::array<void*, 32> lane{};
};

// A hardware barrier 0..15.
struct Barrier {
  uint32_t expected = 0;  // 0: nobody is here
  uint32_t arrived = 0;
  std::vector<bool> here;         // by thread
  std::vector<uint32_t> waiting;  // threads
  std::vector<Site> sites;        // of the arrivals, by thread
  Clock clock;
};

struct Block {
  bool resident = false;  // in this launch
  dim3 position;
  std::vector<Thread> threads;
  uint32_t exited = 0;
  std::vector<unsigned char> shared;
  Shadow shadow;
  std::vector<std::vector<Meeting>> meetings;  // by warp
  std::array<Barrier, kNamedBarriers> barriers;
  std::map<uint32_t, Mbarrier> mbarriers;  // by offset
  uint32_t mbarriers_made = 0;
  std::vector<TensorCore> tensor_cores;  // by warp
};

// Work that completes on an mbarrier.
struct Background {
  Block* block;
  std::function<void()> complete;
  Site site;
};

class Machine {
 public:
  static Machine& get();

  void run(const char* kernel, dim3 grid, dim3 block, uint32_t bytes,
           const std::function<void()>& thread);

  Thread& current() { return *current_; }
  Block& block() { return *current_->block; }
  Block* block_or_null() { return current_ ? current_->block : nullptr; }

  void wait(const char* what, const Site& site);  // suspends the current thread until woken
  void wake(Thread& thread);
  void yield();          // stays runnable
  void maybe_preempt();  // yields once in Options::preempt
  uint64_t random(uint64_t below);

  // Checks bounds and alignment, and returns the offset in the window.
  uint32_t shared_offset(uint32_t address, uint32_t bytes, uint32_t alignment, const Site& site);

  // What the current thread did so far, for `clock` to hand on; and the other way round.
  void release(Clock& clock);
  void acquire(const Clock& clock);
  Access access(const Site& site, Proxy proxy = Proxy::kGeneric);

  void start(Background work) { background_.push_back(std::move(work)); }
  uint32_t threads() const { return block_shape_.x * block_shape_.y * block_shape_.z; }

  std::string where() const;  // kernel, block, thread, seed
  const dim3& block_shape() const { return block_shape_; }

  void reset_launches() { launches_ = 0; }  // seeds count from Options::seed again

  Options options;
  Statistics statistics;

 private:
  void start_block(Block& block, uint32_t number);
  void thread_exits(Thread& thread);
  void step();
  [[noreturn]] void report_deadlock();
  static void fiber_entry(void* thread);

  const char* kernel_ = "";
  dim3 grid_, block_shape_;
  const std::function<void()>* body_ = nullptr;
  std::vector<std::unique_ptr<Block>> blocks_;  // resident; kept between launches with their stacks
  std::vector<Thread*> runnable_;
  std::vector<Background> background_;
  Thread* current_ = nullptr;
  uint32_t next_block_ = 0, live_blocks_ = 0;
  uint64_t seed_ = 0, state_ = 0, launches_ = 0;
  std::exception_ptr error_;
};

inline Machine& machine() {
  return Machine::get();
}

// A function of the lanes' arguments, borrowed for a call: an abandoned fiber owns nothing.
class Finish {
 public:
  using Lanes = std::array<void*, 32>;
  template <typename F>
  Finish(const F& f)
      : object_(&f), call_([](const void* object, const Lanes& lanes) {
          (*static_cast<const F*>(object))(lanes);
        }) {}
  void operator()(const Lanes& lanes) const { call_(object_, lanes); }

 private:
  const void* object_;
  void (*call_)(const void*, const Lanes&);
};

// Gathers the lanes of `mask`; the last to come calls finish(lanes), where lanes[i] is lane i's
// argument or null, and all go on. Lanes must agree on instruction and mask, and on the line where
// the instruction is `.aligned`.
enum class Aligned { kNo, kYes };
void meet(const char* what, uint32_t mask, Aligned aligned, void* argument, const Site& site,
          const Finish& finish);

void land_copy(Block& block, const Copy& copy, uint32_t agent, Time time);
float element_value(Operand operand, uint32_t word, int i);  // i-th of the elements in a word

inline bool same_line(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         !std::strcmp(a.file_name(), b.file_name());
}

}  // namespace attnforge::emulate
