// Merging of partial attention states: outs [n, B, S, H, D] with lses [n, B, H, S] of the same
// queries over disjoint keys become one state (merge_row.h). A warp has a row.
//
// A part whose LSE is +inf is, in a caller's merge, nothing; between splits of one call it is a
// sink that takes all the weight. bytes: (n + 1) rows of D, bound by memory. fp32 arithmetic.
#include "cuda/flash/launch.h"
#include "cuda/flash/merge_kernel.h"

namespace attnforge::cuda {

template <class Part, class T>
__global__ void __launch_bounds__(32 * kMergeRows)
    flash_merge_kernel(const __grid_constant__ MergeParams p, bool inf_is_empty) {
  merge_rows<Part, T>(p, inf_is_empty);
}

namespace {

template <class T>
int launch(const MergeParams& p, bool fp32_parts, bool inf_is_empty, void* stream) {
  const int64_t rows = p.batch * p.seqlen * p.heads;
  if (rows == 0) return 0;
  const dim3 grid(static_cast<unsigned>((rows + kMergeRows - 1) / kMergeRows)),
      block(32 * kMergeRows);
  if (fp32_parts) {
    return ATTNFORGE_LAUNCH((flash_merge_kernel<float, T>), grid, block, 0, stream, p,
                            inf_is_empty);
  }
  return ATTNFORGE_LAUNCH((flash_merge_kernel<T, T>), grid, block, 0, stream, p, inf_is_empty);
}

}  // namespace

int flash_merge(const MergeParams& params, bool fp32_parts, bool inf_is_empty, void* stream) {
  switch (params.dtype) {
    case DType::kFloat32:
      return launch<float>(params, true, inf_is_empty, stream);
    case DType::kFloat16:
      return launch<Half>(params, fp32_parts, inf_is_empty, stream);
    case DType::kBFloat16:
      return launch<BFloat16>(params, fp32_parts, inf_is_empty, stream);
  }
  return kNoKernel;
}

}  // namespace attnforge::cuda
