// Dynamic scheduling of independent tasks over the caller's threads.
#pragma once

#include "cpu/simd/vec.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// Calls f(task, worker) for every task in [0, tasks). Tasks are taken in order from one counter, so
// put heavy ones first. What a task computes must not depend on which worker runs it.
template <class F>
AF_INLINE void parallel_tasks(const Workers& workers, int64_t tasks, const F& f) {
  int64_t threads = workers.num_threads < tasks ? workers.num_threads : tasks;
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task, int64_t{0});
    return;
  }
  struct Shared {
    const F* f;
    int64_t tasks;
    int64_t next;
  } shared = {&f, tasks, 0};
  workers.run(
      threads,
      [](int64_t worker, void* arg) {
        auto* s = static_cast<Shared*>(arg);
        for (;;) {
          int64_t task = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED);
          if (task >= s->tasks) return;
          (*s->f)(task, worker);
        }
      },
      &shared);
}

// Hands out aligned pieces of one workspace; with a null base it only counts the bytes.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  AF_INLINE_MEMBER T* take(int64_t count) {
    constexpr int64_t kAlign = 64;
    T* piece = reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
    return piece;
  }
};

}  // namespace attnforge::cpu::ATTNFORGE_ISA
