// What a kernel file needs beside csrc/cuda/ptx/: CUDA's keywords and a launch, for both compilers.
//
//   template <class Traits>
//   __global__ void __launch_bounds__(128) attend(const __grid_constant__ Params params) { ... }
//
//   int error = ATTNFORGE_LAUNCH((attend<Traits>), grid, block, bytes, stream, params);
//
// ATTNFORGE_LAUNCH allocates nothing and does not wait. It returns a cudaError_t as int, 0 for
// success. The emulator runs the grid before it returns, and throws attnforge::emulate::Error with
// its report.
//
// There is no `__shared__` here: kernels lay their shared memory out from
// ptx::dynamic_shared_memory(), and a static array would hide from the emulator.
#pragma once

#include "cuda/ptx/platform.h"

#if AF_EMULATE
#include <attnforge_emulate/launch.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ [[gnu::noinline]]
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)

using attnforge::emulate::blockDim;
using attnforge::emulate::blockIdx;
using attnforge::emulate::dim3;
using attnforge::emulate::gridDim;
using attnforge::emulate::threadIdx;

#define ATTNFORGE_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  ::attnforge::emulate::launch(#kernel, kernel, grid, block, bytes, stream, __VA_ARGS__)

namespace attnforge::cuda {

// Few, so that blocks of a persistent kernel get several pieces of work.
inline int multiprocessors() {
  return 3;
}

}  // namespace attnforge::cuda
#elif !defined(__CUDACC_RTC__)  // NVRTC has no host, and kernels need nothing else
#include <cuda_runtime_api.h>

namespace attnforge::cuda {

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Beyond 48 KiB a kernel has to opt in; the attribute is set on every launch, as it is per device.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, uint32_t bytes, void* stream,
           Arguments... arguments) {
  if (bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace attnforge::cuda

#define ATTNFORGE_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  ::attnforge::cuda::launch(kernel, grid, block, bytes, stream, __VA_ARGS__)
#endif
