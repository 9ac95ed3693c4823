// Merging of partial attention states: outs [n, B, S, H, D] with lses [n, B, H, S] of the same
// queries over disjoint keys become one state (merge_row.h). A warp has a row.
//
// A part whose LSE is +inf is, in a caller's merge, nothing; between splits of one call it is a
// sink that takes all the weight. bytes: (n + 1) rows of D, bound by memory. fp32 arithmetic.
#include "cuda/flash/launch.h"
#include "cuda/flash/merge_row.h"

namespace attnforge::cuda {

constexpr int kWarps = 4;  // rows of a block; they do not meet

template <class Part, class T>
__global__ void __launch_bounds__(32 * kWarps)
    flash_merge_kernel(const __grid_constant__ MergeParams p, bool inf_is_empty) {
  const int64_t rows = p.batch * p.seqlen * p.heads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();  // [B, S, H]
  if (row >= rows) return;
  const int64_t head = row % p.heads, at = row / p.heads;
  const int64_t stat = (at / p.seqlen * p.heads + head) * p.seqlen + at % p.seqlen;
  const auto state = [&](int64_t n) {
    const float lse = p.lses[n * rows + stat];
    return inf_is_empty && lse == kInf ? -kInf : lse;
  };
  const auto part = [&](int64_t n) {
    return static_cast<const Part*>(p.outs) + (n * rows + row) * p.dim;
  };
  const float lse = merge_row(p.states, p.dim, state, part, static_cast<T*>(p.out) + row * p.dim);
  if (ptx::lane_id() == 0) p.lse[stat] = lse;
}

namespace {

template <class T>
int launch(const MergeParams& p, bool fp32_parts, bool inf_is_empty, void* stream) {
  const int64_t rows = p.batch * p.seqlen * p.heads;
  if (rows == 0) return 0;
  const dim3 grid(static_cast<unsigned>((rows + kWarps - 1) / kWarps)), block(32 * kWarps);
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
