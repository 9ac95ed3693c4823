// Upper bounds of the logits in a page: sum over channels of scale max(q low, q high), from the
// range of its keys per channel (Quest; Tang et al., 2024).
//
//   warp       4 neighbouring pages, one after the other: their bounds in registers, all rows past
//              them. Lanes have channels
//   rows       of all heads of a KV head, 16 at a time, scaled, in fp32, in shared memory: whatever
//              their dtype is
//   bytes      bounds once per 16 rows, from DRAM once; 4 per row and page. 4 D flops per row and
//              page: each channel by itself, so that infinite bounds behave as the formula says
#include "attnforge/retrieval.h"
#include "cuda/launch.h"
#include "cuda/retrieval/lane_row.h"
#include "cuda/retrieval/launch.h"
#include "cuda/tile/rows.h"

namespace attnforge::cuda {
namespace {

constexpr int kWarps = 8, kPages = 4, kRows = 16;

// How blocks are dealt: tiles of pages, KV heads, sequences.
struct PageGrid {
  int tiles, heads, batch;
};

AF_DEVICE float element(const TensorRef& t, DType dtype, int batch, int row, int head, int c) {
  if (dtype == DType::kFloat32) return row_ptr<const float>(t, batch, row, head)[c];
  if (dtype == DType::kFloat16) return widen(row_ptr<const Half>(t, batch, row, head)[c]);
  return widen(row_ptr<const BFloat16>(t, batch, row, head)[c]);
}

template <class T, int kPairs>
__global__ void __launch_bounds__(32 * kWarps)
    page_scores_kernel(const __grid_constant__ PageScoresParams params,
                       const __grid_constant__ PageGrid grid) {
  using Lanes = LaneRow<kPairs>;
  const FlashProblem& p = params.problem;
  int id = static_cast<int>(blockIdx.x);
  const int first = id % grid.tiles * kWarps * kPages + warp_id() * kPages;
  id /= grid.tiles;
  const int kv_head = id % grid.heads, batch = id / grid.heads;
  const int dim = static_cast<int>(p.head_dim), lane = static_cast<int>(ptx::lane_id());
  const int pack = static_cast<int>(p.heads_q) / grid.heads;
  const RowTile rows = {0, static_cast<int>(p.seqlen_q) * pack, pack, kv_head * pack};
  const int columns = static_cast<int>(params.columns);
  const int used =
      params.used == nullptr ? columns : at_least(0, at_most(params.used[batch], columns));
  const uint32_t shared = ptx::dynamic_shared_memory();

  const auto bounds_of = [&](const TensorRef& t, int page) {
    if (params.table == nullptr) {
      return Lanes::of(row_ptr<const T>(t, batch, page, kv_head), dim);
    }
    const int own = params.table[batch * params.table_stride + page];
    const int real = at_least(0, at_most(own, static_cast<int>(params.pages) - 1));
    return Lanes::of(row_ptr<const T>(t, real, 0, kv_head), dim);
  };
  for (int start = 0; start < rows.rows; start += kRows) {
    const int count = at_most(kRows, rows.rows - start);
    ptx::sync_threads();  // nobody needs the rows before
    for (int r = warp_id(); r < count; r += kWarps) {
      const int query = rows.query(start + r), head = rows.head(start + r);
      for (int c = lane; c < dim; c += 32) {
        const float x = element(params.q, p.q_dtype, batch, query, head, c);
        ptx::store_shared(shared + 4 * (r * dim + c), x * p.softmax_scale);
      }
    }
    ptx::sync_threads();
    float bound[kPages];  // of row `lane`
#pragma unroll
    for (int n = 0; n < kPages; ++n) {
      bound[n] = -kInf;
      if (first + n >= used) continue;
      const Lanes low = bounds_of(params.low, first + n), high = bounds_of(params.high, first + n);
      for (int r = 0; r < count; ++r) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const int c = Lanes::channel(i);
          if (c >= dim) continue;
          const auto q = ptx::load_shared<FloatPair>(shared + 4 * (r * dim + c));
          const auto larger = [](float a, float b) { return a > b || a != a ? a : b; };
          sum += larger(q.x * low.x[i].x, q.x * high.x[i].x);
          sum += larger(q.y * low.x[i].y, q.y * high.x[i].y);
        }
        sum = warp_sum(sum);
        if (lane == r) bound[n] = sum;
      }
    }
    if (lane >= count) continue;
    const int query = rows.query(start + lane), head = rows.head(start + lane);
    float* out = params.out + ((batch * p.heads_q + head) * p.seqlen_q + query) * params.columns;
#pragma unroll
    for (int n = 0; n < kPages; ++n) {
      if (first + n < columns) out[first + n] = bound[n];
    }
  }
}

template <DType kDType, int kPairs>
int launch_page_scores(const PageScoresParams& params, void* stream) {
  using T = typename ElementOf<kDType>::Type;
  const FlashProblem& p = params.problem;
  constexpr int kTile = kWarps * kPages;
  const PageGrid grid = {static_cast<int>((params.columns + kTile - 1) / kTile),
                         static_cast<int>(p.heads_k), static_cast<int>(p.batch)};
  const auto blocks = static_cast<unsigned>(int64_t{grid.tiles} * grid.heads * grid.batch);
  if (blocks == 0) return 0;
  return ATTNFORGE_LAUNCH((page_scores_kernel<T, kPairs>), dim3(blocks), dim3(32 * kWarps),
                          static_cast<uint32_t>(4 * kRows * p.head_dim), stream, params, grid);
}

}  // namespace

int page_scores(const PageScoresParams& params, void* stream) {
  return with_dtype(params.bounds_dtype, [&]<DType kDType>() {
    if (params.problem.head_dim <= 128) return launch_page_scores<kDType, 2>(params, stream);
    if (params.problem.head_dim <= 256) return launch_page_scores<kDType, 4>(params, stream);
    return launch_page_scores<kDType, 9>(params, stream);
  });
}

}  // namespace attnforge::cuda
