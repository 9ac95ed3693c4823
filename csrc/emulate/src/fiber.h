// Fibers: a stack and a place to go on. One runs at a time, on the thread that launched the grid.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attnforge::emulate {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Forgets what ran on this stack, and starts entry(argument) at the next resume. It must not
  // return: its last act is leave().
  void prepare(void (*entry)(void*), void* argument);

  void resume();   // from the host: runs the fiber until it suspends or leaves
  void suspend();  // from the fiber: back to the host
  [[noreturn]] void leave();

 private:
  static void start();

  unsigned char* stack_ = nullptr;
  void* place_ = nullptr;  // stack pointer of the suspended fiber
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  void* sanitizer_ = nullptr;
};

}  // namespace attnforge::emulate
