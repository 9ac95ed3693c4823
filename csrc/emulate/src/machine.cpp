#include "machine.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <sstream>
#include <utility>

namespace attnforge::emulate {

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

std::string text(const dim3& d) {
  std::ostringstream sentence;
  sentence << "(" << d.x << "," << d.y << "," << d.z << ")";
  return sentence.str();
}

dim3 unravel(uint32_t index, const dim3& shape) {
  return {index % shape.x, index / shape.x % shape.y, index / (shape.x * shape.y)};
}

}  // namespace

std::string at(const Site& site) {
  const char* name = std::strrchr(site.file_name(), '/');
  return " at " + std::string(name ? name + 1 : site.file_name()) + ":" +
         std::to_string(site.line());
}

std::string agent_name(uint32_t agent) {
  const dim3& shape = machine().block_shape();
  const uint32_t threads = shape.x * shape.y * shape.z;
  if (agent >= threads + kMaxMbarriers) {
    return "a wgmma of warp " + std::to_string(agent - threads - kMaxMbarriers);
  }
  if (agent >= threads) return "a copy for mbarrier " + std::to_string(agent - threads);
  return "thread " + std::to_string(agent) + " (warp " + std::to_string(agent / 32) + ", lane " +
         std::to_string(agent % 32) + ")";
}

void fail(const Site& site, const std::string& cause) {
  throw Error("attnforge emulator: " + machine().where() + at(site) + ": " + cause);
}

Machine& Machine::get() {
  static Machine instance;
  return instance;
}

std::string Machine::where() const {
  std::string sentence = "kernel " + std::string(kernel_);
  if (current_) {
    sentence += ", block " + text(current_->block->position) + ", " + agent_name(current_->index);
  }
  return sentence + ", seed " + std::to_string(seed_);
}

uint64_t Machine::random(uint64_t below) {  // xorshift64*
  state_ ^= state_ >> 12;
  state_ ^= state_ << 25;
  state_ ^= state_ >> 27;
  return (state_ * 0x2545f4914f6cdd1dull >> 32) * below >> 32;
}

void Machine::run(const char* kernel, dim3 grid, dim3 block, uint32_t bytes,
                  const std::function<void()>& thread) {
  const uint32_t threads = block.x * block.y * block.z;
  kernel_ = kernel;
  current_ = nullptr;
  seed_ = options.seed + launches_++;
  state_ = (seed_ + 1) * 0x9e3779b97f4a7c15ull;
  const auto refuse = [&](const std::string& cause) {
    throw Error("attnforge emulator: " + where() + ": " + cause);
  };
  if (threads == 0 || threads > kMaxThreads) {
    refuse("a block of " + std::to_string(threads) + " threads; 1 to 1024 are possible");
  }
  if (bytes > kMaxShared) {
    refuse(std::to_string(bytes) + " bytes of dynamic shared memory; at most 232448 are possible");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    refuse("a grid of " + text(grid) + "; each is at least 1, y and z at most 65535");
  }
  grid_ = grid;
  block_shape_ = block;
  blockDim = block;
  gridDim = grid;
  body_ = &thread;
  error_ = nullptr;
  runnable_.clear();
  background_.clear();
  statistics = {};
  next_block_ = live_blocks_ = 0;

  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t resident = std::min<uint64_t>(std::max(options.resident, 1u), blocks);
  while (blocks_.size() < resident) blocks_.push_back(std::make_unique<Block>());
  for (size_t i = 0; i < blocks_.size(); ++i) blocks_[i]->resident = i < resident;
  for (uint64_t i = 0; i < resident; ++i) {
    blocks_[i]->shared.assign(bytes, kSharedPoison);
    start_block(*blocks_[i], next_block_++);
  }
  while (live_blocks_ > 0) {
    step();
    if (error_) {
      current_ = nullptr;
      std::rethrow_exception(error_);  // the other fibers are abandoned: kernels own nothing
    }
  }
  current_ = nullptr;
}

void Machine::start_block(Block& block, uint32_t number) {
  const uint32_t threads = block_shape_.x * block_shape_.y * block_shape_.z;
  const uint32_t agents = threads + kExtraAgents;
  const uint32_t warps = (threads + 31) / 32;
  block.position = unravel(number, grid_);
  block.exited = 0;
  std::fill(block.shared.begin(), block.shared.end(), kSharedPoison);
  block.shadow.reset(static_cast<uint32_t>(block.shared.size()));
  block.meetings.assign(warps, {});
  block.mbarriers.clear();
  block.mbarriers_made = 0;
  block.tensor_cores.assign(warps, {});
  for (Barrier& barrier : block.barriers) {
    barrier.expected = barrier.arrived = 0;
    barrier.waiting.clear();
    barrier.clock = Clock(agents);
  }
  if (block.threads.size() < threads) block.threads.resize(threads);
  for (uint32_t i = 0; i < threads; ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.index = i;
    thread.position = unravel(i, block_shape_);
    thread.state = State::kRunnable;
    thread.clock = Clock(agents);
    thread.clock.seen[i] = 1;
    thread.open_copies.clear();
    thread.copy_groups.clear();
    thread.open_stores.clear();
    thread.store_groups.clear();
    if (!thread.fiber) thread.fiber = std::make_unique<Fiber>();
    thread.fiber->prepare(&Machine::fiber_entry, &thread);
    runnable_.push_back(&thread);
  }
  ++live_blocks_;
  ++statistics.blocks;
}

void Machine::fiber_entry(void* argument) {
  auto& thread = *static_cast<Thread*>(argument);
  Machine& self = machine();
  try {
    (*self.body_)();
    self.thread_exits(thread);
  } catch (...) {
    self.error_ = std::current_exception();
  }
  thread.fiber->leave();
}

void Machine::thread_exits(Thread& thread) {
  Block& block = *thread.block;
  for (const Meeting& meeting : block.meetings[thread.warp()]) {
    if (meeting.mask >> thread.lane() & 1) {
      fail(meeting.site, "the thread has left the kernel, and lanes of its warp wait for it at " +
                             std::string(meeting.what));
    }
  }
  thread.state = State::kExited;
  if (!block.barriers[0].waiting.empty()) {
    fail(block.barriers[0].sites[block.barriers[0].waiting[0]],
         "barrier divergence: the thread has left the kernel, and " +
             agent_name(block.barriers[0].waiting[0]) + " waits for it at sync_threads");
  }
  const uint32_t threads = block_shape_.x * block_shape_.y * block_shape_.z;
  if (!thread.open_stores.empty() || !thread.store_groups.empty()) {
    fail((thread.open_stores.empty() ? thread.store_groups[0] : thread.open_stores)[0].site,
         "the thread has left the kernel before bulk_wait_read: its store may still read");
  }
  if (const TensorCore& core = block.tensor_cores[thread.warp()]; !core.accumulators.empty()) {
    fail(Site::current(), "the thread has left the kernel with a wgmma in flight");
  }
  if (++block.exited < threads) return;
  for (const Background& work : background_) {
    if (work.block == &block) {
      fail(work.site, "the block has ended, and this copy is still in flight");
    }
  }
  --live_blocks_;
}

void Machine::step() {
  // Seldom, unless nothing else can go on: copies complete late.
  if (!background_.empty() && (runnable_.empty() || random(16) == 0)) {
    const size_t pick = random(background_.size());
    const Background work = std::move(background_[pick]);
    background_[pick] = std::move(background_.back());
    background_.pop_back();
    current_ = nullptr;
    work.complete();
    return;
  }
  if (runnable_.empty()) report_deadlock();
  const size_t pick = random(runnable_.size());
  Thread* thread = runnable_[pick];
  runnable_[pick] = runnable_.back();
  runnable_.pop_back();
  current_ = thread;
  threadIdx = thread->position;
  blockIdx = thread->block->position;
  if (++statistics.switches > options.steps) {
    throw Error("attnforge emulator: " + where() + ": livelock: " + std::to_string(options.steps) +
                " switches and the grid is not done" +
                (thread->waits_for
                     ? ", last at " + std::string(thread->waits_for) + at(thread->waits_at)
                     : ""));
  }
  thread->fiber->resume();
  const uint64_t blocks = uint64_t{grid_.x} * grid_.y * grid_.z;
  const uint32_t threads = block_shape_.x * block_shape_.y * block_shape_.z;
  if (!error_ && thread->state == State::kExited && thread->block->exited == threads &&
      next_block_ < blocks) {
    start_block(*thread->block, next_block_++);
  }
}

void Machine::wait(const char* what, const Site& site) {
  Thread& thread = *current_;
  thread.waits_for = what;
  thread.waits_at = site;
  thread.state = State::kWaiting;
  thread.fiber->suspend();
}

void Machine::wake(Thread& thread) {
  thread.state = State::kRunnable;
  runnable_.push_back(&thread);
}

void Machine::yield() {
  Thread& thread = *current_;
  runnable_.push_back(&thread);
  thread.fiber->suspend();
}

void Machine::maybe_preempt() {
  if (options.preempt && random(options.preempt) == 0) yield();
}

uint32_t Machine::shared_offset(uint32_t address, uint32_t bytes, uint32_t alignment,
                                const Site& site) {
  const auto size = static_cast<uint32_t>(block().shared.size());
  const uint32_t offset = address - kSharedBase;  // wraps far out of bounds below the base
  if (offset > size || bytes > size - offset) {
    fail(site, "shared address " + std::to_string(static_cast<int64_t>(address) - kSharedBase) +
                   " with " + std::to_string(bytes) + " bytes is out of bounds: the launch has " +
                   std::to_string(size));
  }
  if (address % alignment) {
    fail(site, "shared byte " + std::to_string(offset) + " is not aligned to " +
                   std::to_string(alignment));
  }
  return offset;
}

void Machine::release(Clock& clock) {
  Thread& thread = *current_;
  clock.join(thread.clock);
  ++thread.clock.seen[thread.index];
}

void Machine::acquire(const Clock& clock) {
  current_->clock.join(clock);
}

Access Machine::access(const Site& site, Proxy proxy) {
  return Access{current_->index, &current_->clock, site, proxy};
}

// Groups the waiting threads by what they wait for.
void Machine::report_deadlock() {
  std::map<std::string, std::pair<uint32_t, std::string>> groups;
  const uint32_t threads = block_shape_.x * block_shape_.y * block_shape_.z;
  for (const auto& block : blocks_) {
    if (!block->resident || block->exited == threads) continue;
    for (uint32_t i = 0; i < threads; ++i) {
      const Thread& thread = block->threads[i];
      const std::string state =
          "block " + text(block->position) +
          (thread.state == State::kExited
               ? " left the kernel"
               : " waiting for " + std::string(thread.waits_for) + at(thread.waits_at));
      auto& [count, first] = groups[state];
      if (count++ == 0) first = agent_name(i);
    }
  }
  current_ = nullptr;
  std::ostringstream sentence;
  sentence << "attnforge emulator: " << where() << ": deadlock";
  for (const auto& [state, group] : groups) {
    const auto& [count, first] = group;
    sentence << "; " << count << (count == 1 ? " thread of " : " threads of ") << state
             << ", the first is " << first;
  }
  throw Error(sentence.str());
}

void set_options(const Options& options) {
  machine().options = options;
  machine().reset_launches();
}

Options options() {
  return machine().options;
}

Statistics last_launch() {
  return machine().statistics;
}

void run_grid(const char* kernel, dim3 grid, dim3 block, uint32_t bytes,
              const std::function<void()>& thread) {
  static std::mutex one_launch;  // fibers, threadIdx and the shadow are one set
  const std::lock_guard<std::mutex> lock(one_launch);
  machine().run(kernel, grid, block, bytes, thread);
}

}  // namespace attnforge::emulate
