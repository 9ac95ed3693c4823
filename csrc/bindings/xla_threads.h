// XLA's thread pool as the Workers of a kernel.
//
// A handler may itself be running on a thread of that pool, so it must not wait for tasks that have
// not begun: all threads could be handlers that do. The calling thread therefore works as well,
// until nothing is left, and then waits for the tasks that have begun alone. One that comes later
// finds the region over and returns: a worker may be missing, as the kernels' only parallel loop
// (cpu/micro/parallel.h) lets those there are take what is left to do.
#pragma once

#include <pthread.h>

#include <memory>

#include "attnforge/params.h"
#include "bindings/xla_ffi.h"

namespace attnforge::xla {

// The call that this thread serves: Workers carry no context.
inline thread_local const CallFrame* current_call = nullptr;

struct Serving {
  explicit Serving(const CallFrame& frame) { current_call = &frame; }
  ~Serving() { current_call = nullptr; }
};

struct ParallelRegion {
  void (*body)(int64_t worker, void* arg);
  void* arg;
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t idle = PTHREAD_COND_INITIALIZER;
  int64_t begun = 0;  // tasks; the n-th is worker n, the calling thread worker 0
  int64_t busy = 0;
  bool over = false;
};
using SharedRegion = std::shared_ptr<ParallelRegion>;

inline void join_region(void* data) {
  const std::unique_ptr<SharedRegion> owner(static_cast<SharedRegion*>(data));
  ParallelRegion& region = **owner;
  pthread_mutex_lock(&region.mutex);
  const bool late = region.over;
  const int64_t worker = late ? 0 : ++region.begun;
  if (!late) ++region.busy;
  pthread_mutex_unlock(&region.mutex);
  if (late) return;
  region.body(worker, region.arg);
  pthread_mutex_lock(&region.mutex);
  if (--region.busy == 0) pthread_cond_signal(&region.idle);
  pthread_mutex_unlock(&region.mutex);
}

// Whether there was no error; XLA wants it destroyed.
inline bool succeeded(const Api& api, Error* error) {
  if (!error) return true;
  ErrorDestroy destroy = {sizeof(ErrorDestroy), nullptr, error};
  api.error_destroy(&destroy);
  return false;
}

inline void run_on_xla_threads(int64_t num_threads, void (*body)(int64_t, void*), void* arg) {
  const CallFrame& call = *current_call;
  auto region = std::make_shared<ParallelRegion>(ParallelRegion{body, arg});
  for (int64_t n = 1; n < num_threads; ++n) {
    auto* owner = new SharedRegion(region);
    ThreadPoolSchedule task = {sizeof(task), nullptr, call.context, join_region, owner};
    if (!succeeded(*call.api, call.api->thread_pool_schedule(&task))) {
      delete owner;
      break;
    }
  }
  body(0, arg);
  pthread_mutex_lock(&region->mutex);
  region->over = true;
  while (region->busy > 0) pthread_cond_wait(&region->idle, &region->mutex);
  pthread_mutex_unlock(&region->mutex);
}

// One thread where XLA lends none.
inline Workers workers_of(const CallFrame& call) {
  int64_t threads = 1;
  ThreadPoolNumThreads ask = {sizeof(ask), nullptr, call.context, &threads};
  if (!succeeded(*call.api, call.api->thread_pool_num_threads(&ask)) || threads < 1) threads = 1;
  return {threads, run_on_xla_threads};
}

}  // namespace attnforge::xla
