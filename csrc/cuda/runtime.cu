// The CUDA runtime for bindings, which see no CUDA header; and the ids of the kernels built, from
// the same functions that instantiate them.
#include "cuda/runtime.h"

#include "cuda/flash/table.h"
#include "cuda/launch.h"

namespace attnforge::cuda {

#if defined(ATTNFORGE_EMULATE)
std::string error_text(int error) {
  return "error " + std::to_string(error);
}
#else
std::string error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
#endif

std::string build_text() {
  int runtime = 0, driver = 0;
#if !defined(ATTNFORGE_EMULATE)
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
#endif
  std::string text =
      "runtime " + std::to_string(runtime) + "\ndriver " + std::to_string(driver) + "\n";
  for (const KernelRow& row : kernel_table()) text += "kernel " + row.id() + "\n";
  return text;
}

}  // namespace attnforge::cuda
