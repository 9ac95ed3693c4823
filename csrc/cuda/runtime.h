// What the bindings ask of CUDA itself, and the table of kernels that the library was built with.
#pragma once

#include <string>

namespace attnforge::cuda {

// The text of a launcher's cudaError_t.
std::string error_text(int error);

// Lines: "runtime <version>", "driver <version>" (0 without one), "kernel <id>" for each kernel.
std::string build_text();

}  // namespace attnforge::cuda
