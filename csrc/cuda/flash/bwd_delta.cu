// Backward, preparation: delta_i = <dO_i, O_i + low_i> - dlse_i, the row's part of every dS, from
// the fp32 output (out + out_lo). A warp has a row; rows that saw nothing get 0. Packed sequences
// count as one, since rows do not depend on each other. bytes: dO, O and low once.
#include "cuda/flash/instances.h"

namespace attnforge::cuda {

constexpr int kRowsOfBlock = 4;

template <class T>
__global__ void __launch_bounds__(32 * kRowsOfBlock)
    flash_delta_kernel(const __grid_constant__ FlashBwdParams params, int64_t rows, int64_t all) {
  const FlashProblem& p = params.problem;
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + warp_id();
  if (id >= all) return;
  const int64_t row = id % rows;
  const int head = static_cast<int>(id / rows % p.heads_q);
  const int batch = static_cast<int>(id / rows / p.heads_q);
  const T* dout = row_ptr<const T>(params.dout, batch, row, head);
  const T* out = row_ptr<const T>(params.out, batch, row, head);
  const T* low =
      params.out_lo.data == nullptr ? nullptr : row_ptr<const T>(params.out_lo, batch, row, head);
  float sum = 0.0f;
  for (int64_t d = ptx::lane_id(); d < p.v_head_dim; d += 32) {
    const float o = widen(out[d]) + (low == nullptr ? 0.0f : widen(low[d]));
    sum = ptx::fma(widen(dout[d]), o, sum);
  }
#pragma unroll
  for (uint32_t flip = 16; flip > 0; flip /= 2) sum += ptx::shuffle_xor(sum, flip);
  if (ptx::lane_id() != 0) return;
  if (params.dlse.data != nullptr) sum -= *stat_ptr(params.dlse, batch, row, head);
  const bool nothing = *stat_ptr(params.lse, batch, row, head) == -kInf;
  *stat_ptr(params.delta, batch, row, head) = nothing ? 0.0f : sum;
}

template <>
int flash_delta<kThisDType>(const FlashBwdParams& params, void* stream) {
  const FlashProblem& p = params.problem;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t rows = packed ? p.total_q : p.seqlen_q;
  const int64_t all = (packed ? 1 : p.batch) * p.heads_q * rows;
  if (all == 0) return 0;
  using T = typename ElementOf<kThisDType>::Type;
  return ATTNFORGE_LAUNCH((flash_delta_kernel<T>),
                          dim3(static_cast<unsigned>((all + kRowsOfBlock - 1) / kRowsOfBlock)),
                          dim3(32 * kRowsOfBlock), 0, stream, params, rows, all);
}

}  // namespace attnforge::cuda
