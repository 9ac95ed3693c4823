// The end of a paged call whose keys were split: a warp per row and head adds up its splits
// (flash/merge_row.h), or its pieces and the sink. Sequences of other calls of the same batch are
// left alone.
#include "cuda/flash/merge_row.h"
#include "cuda/paged/launch.h"
#include "cuda/paged/pieces.h"
#include "cuda/tile/sequence.h"

namespace attnforge::cuda {

namespace {
constexpr int kCombineWarps = 4;
}

template <class T>
__global__ void __launch_bounds__(32 * kCombineWarps)
    paged_combine_kernel(const __grid_constant__ FlashFwdParams params,
                         const __grid_constant__ SplitParams splits,
                         const __grid_constant__ Pieces pieces, RowRange range, int64_t part_rows) {
  const FlashProblem& p = params.problem;
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kCombineWarps + warp_id();
  if (id >= p.batch * part_rows * p.heads_q) return;
  const int head = static_cast<int>(id % p.heads_q);
  const int64_t row = id / p.heads_q % part_rows;
  const Sequence seq = sequence(p, static_cast<int>(id / p.heads_q / part_rows));
  const int64_t served = seq.q_len * (p.heads_q / p.heads_k);
  if (row >= seq.q_len || served <= range.above || served > range.most) return;
  const PartRange own = PartRange::of(pieces, seq.batch, splits.splits);
  const float* part = row_ptr<float>(splits.out, seq.batch, row, head);
  const float* lse = stat_ptr(splits.lse, seq.batch, row, head);
  const bool planned = pieces.first != nullptr;
  const float merged = merge_row(
      own.count, p.v_head_dim,
      [&](int64_t n) {  // what another sequence wrote, or nobody, is not this one's
        const bool mine = !planned || pieces.sequence[own.first + n] == seq.batch;
        return mine ? lse[(own.first + n) * splits.lse_stride] : -kInf;
      },
      [&](int64_t n) { return part + (own.first + n) * splits.out_stride; },
      row_ptr<T>(params.out, seq.batch, seq.q_row + row, head),
      planned && p.sinks != nullptr ? p.sinks[head] : -kInf);
  if (ptx::lane_id() == 0) *stat_ptr(params.lse, seq.batch, seq.q_row + row, head) = merged;
}

int paged_combine(const PagedFwdParams& params, const SplitParams& splits, const Pieces& pieces,
                  RowRange rows, int64_t part_rows, void* stream) {
  const FlashProblem& p = params.flash.problem;
  const int64_t warps = p.batch * part_rows * p.heads_q;
  if (warps == 0) return 0;
  return with_dtype(p.dtype, [&]<DType kDType>() {
    using T = typename ElementOf<kDType>::Type;
    const auto blocks = static_cast<unsigned>((warps + kCombineWarps - 1) / kCombineWarps);
    return ATTNFORGE_LAUNCH((paged_combine_kernel<T>), dim3(blocks), dim3(32 * kCombineWarps), 0,
                            stream, params.flash, splits, pieces, rows, part_rows);
  });
}

}  // namespace attnforge::cuda
