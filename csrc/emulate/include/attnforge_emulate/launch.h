// Launching kernels under the emulator, from the host.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace attnforge::emulate {

struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
  constexpr dim3(uint32_t x_ = 1, uint32_t y_ = 1, uint32_t z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the running fiber; the scheduler sets them at every switch.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// A report: what went wrong, kernel, block, thread, line, and the seed that shows it again.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  uint64_t seed = 1;         // of the schedule; launch n after set_options uses seed + n
  uint32_t resident = 2;     // blocks that run interleaved; the others follow
  uint32_t preempt = 64;     // one of so many memory accesses hands over to another thread
  uint64_t steps = 1 << 28;  // switches in one launch after which it counts as a livelock
};

void set_options(const Options& options);
Options options();

// How many fibers were switched to in the last launch, and how many blocks it had.
struct Statistics {
  uint64_t switches = 0;
  uint64_t blocks = 0;
};
Statistics last_launch();

// What make_tensor_map writes: see csrc/cuda/tensor_map.h. Throws where TMA would not take the
// shape.
struct TensorFields {
  const void* base;
  uint32_t rank;
  const uint64_t* extent;
  const uint64_t* stride;  // bytes
  const uint32_t* box;
  uint32_t element_bytes;
  bool fp32;
  uint32_t swizzle;  // 0, or 1 << swizzle chunks of 16 bytes
};
void encode_tensor_map(uint64_t (&map)[16], const TensorFields& fields);

void run_grid(const char* kernel, dim3 grid, dim3 block, uint32_t bytes,
              const std::function<void()>& thread);

// Which kernels ran, and with how much shared memory: into a file of this process in the folder
// `launches` beside the library, if there is one (tools/cuda_budgets.py reads it).
void note_launch(const void* kernel, uint32_t bytes);

template <typename... Parameters, typename... Arguments>
int launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, uint32_t bytes,
           void* /*stream*/, Arguments... arguments) {
  note_launch(reinterpret_cast<const void*>(kernel), bytes);
  run_grid(name, grid, block, bytes, [&] { kernel(arguments...); });
  return 0;
}

}  // namespace attnforge::emulate
