// What this machine can do at this ISA level, measured beside every benchmark: the roofs.
#include "cpu/kernels.h"
#include "cpu/micro/gemm.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

// The register tile on operands that stay in L1: nothing but multiply-adds at full rate.
constexpr int64_t kProbeDepth = 256;
constexpr int64_t kSlice = 1 << 20;  // bytes of one read task

}  // namespace

double probe_fma(const Workers& workers, int64_t iterations) {
  parallel_tasks(workers, workers.num_threads, [&](int64_t, int64_t) {
    alignas(64) float a[kProbeDepth * kMR], b[kProbeDepth * kNR], c[kMR * kNR];
    for (float& x : a) x = 0.5f;
    for (float& x : b) x = 0.25f;
    for (int64_t i = 0; i < iterations; ++i) {
      gemm_tile<kMR, 2, 1, kMR>(kProbeDepth, a, b, c, kNR, false);
      asm volatile("" ::"r"(c) : "memory");  // the result is used, as far as the compiler knows
    }
  });
  return 2.0 * kMR * kNR * kProbeDepth * static_cast<double>(iterations * workers.num_threads);
}

void probe_read(const Workers& workers, const void* data, int64_t bytes) {
  parallel_tasks(workers, ceil_div(bytes, kSlice), [&](int64_t task, int64_t) {
    const int64_t n = min64(kSlice, bytes - task * kSlice) / 4;
    const float* p = reinterpret_cast<const float*>(static_cast<const char*>(data) + task * kSlice);
    VecI a{}, b{}, c{}, d{};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      a += load_raw<VecI>(p + i);
      b += load_raw<VecI>(p + i + kLanes);
      c += load_raw<VecI>(p + i + 2 * kLanes);
      d += load_raw<VecI>(p + i + 3 * kLanes);
    }
    VecI sum = (a + b) + (c + d);
    asm volatile("" ::"r"(&sum) : "memory");
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
