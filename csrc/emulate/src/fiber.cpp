// The switch saves what the ABI lets a callee keep, and exchanges stack pointers. ucontext would
// cost two system calls per switch; it serves where the assembly is not written.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace attnforge::emulate {
namespace {

// Kernels keep fragments in local arrays; AddressSanitizer multiplies frames.
constexpr size_t kStackBytes = 256 * 1024;

Fiber* starting = nullptr;

#if defined(__SANITIZE_ADDRESS__)
void* host_sanitizer = nullptr;
const void* host_stack = nullptr;
size_t host_stack_bytes = 0;
#endif

#if defined(__x86_64__)
void* host_place = nullptr;

extern "C" void attnforge_switch(void** from, void* to);
// rdi: where the old stack pointer goes. rsi: the new one. Six callee-saved registers, and the
// control words of SSE and x87.
asm(R"(
.text
.p2align 4
.globl attnforge_switch
.hidden attnforge_switch
.type attnforge_switch, @function
attnforge_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size attnforge_switch, .-attnforge_switch
)");
#else
ucontext_t host_context;
#endif

}  // namespace

Fiber::Fiber() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page, PROT_NONE);  // an overflow faults instead of writing into a neighbour
  stack_ = static_cast<unsigned char*>(memory) + page;
#if !defined(__x86_64__)
  place_ = new ucontext_t;
#endif
}

Fiber::~Fiber() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack_, kStackBytes);
#endif
  munmap(stack_ - page, kStackBytes + page);
#if !defined(__x86_64__)
  delete static_cast<ucontext_t*>(place_);
#endif
}

void Fiber::prepare(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
  sanitizer_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack_, kStackBytes);  // frames of a fiber that was abandoned
#endif
#if defined(__x86_64__)
  // As the switch leaves a stack: control words, six registers, return address. The ABI wants
  // rsp % 16 == 8 at the first instruction of a function.
  auto* top = reinterpret_cast<uint64_t*>(stack_ + kStackBytes);
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(&Fiber::start);
  for (int i = 0; i < 6; ++i) *--top = 0;
  uint32_t control[2] = {0, 0};
  asm volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(control[0]), "=m"(control[1]));
  *--top = control[0] | uint64_t{control[1]} << 32;
  place_ = top;
#else
  auto* context = static_cast<ucontext_t*>(place_);
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, &Fiber::start, 0);
#endif
}

void Fiber::start() {
  Fiber* self = starting;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
  self->entry_(self->argument_);
  std::abort();
}

void Fiber::resume() {
  starting = this;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&host_sanitizer, stack_, kStackBytes);
#endif
#if defined(__x86_64__)
  attnforge_switch(&host_place, place_);
#else
  swapcontext(&host_context, static_cast<ucontext_t*>(place_));
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(host_sanitizer, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&sanitizer_, host_stack, host_stack_bytes);
#endif
#if defined(__x86_64__)
  attnforge_switch(&place_, host_place);
#else
  swapcontext(static_cast<ucontext_t*>(place_), &host_context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(sanitizer_, &host_stack, &host_stack_bytes);
#endif
}

void Fiber::leave() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, host_stack, host_stack_bytes);  // frees the fake stack
#endif
#if defined(__x86_64__)
  attnforge_switch(&place_, host_place);
#else
  swapcontext(static_cast<ucontext_t*>(place_), &host_context);
#endif
  std::abort();
}

}  // namespace attnforge::emulate
