// Decode for sm_90a (TMA, wgmma): few query rows over a long cache, split over keys.
//
//   rows       the query rows of all heads of a KV head's group, 64 to a tile, so that K and V are
//              read once for the group; more rows are more tiles, whose K and V come from L2
//   block      one piece: a producer warp and 64 rows by one consumer warpgroup, or by two that
//              share out the channels of V (decode_walk.h). Not persistent: pieces are short, and
//              two blocks on a multiprocessor cover each other's ends
//   latent     V that is the first channels of K (MLA, absorbed; DeepSeek-V2, 2024) is not loaded
//   splits     blocks share out the keys; states of several go to fp32, and merge.cu adds them up
//   bytes      K and V once per 64 rows; bound by memory. flops: padded rows cost products only
//
// Numerics as the forward has them (fwd.cu). A row's result depends on its own Q, its own keys and
// where splits cut them. Limits: 16-bit dtypes, head dims up to 576 and 512, multiples of 8.
#include "cuda/flash/instances.h"
#include "cuda/flash/sm90/decode_walk.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/tile/epilogue.h"

namespace attnforge::cuda {

template <DType kDType, int kDims, bool kLatent>
struct Sm90DecodeCase {
  static constexpr Sm90DecodeTile kTile = sm90_decode_tile(kDType, kSm90DecodeDims[kDims], kLatent);
};

template <class Case>
__global__ void __launch_bounds__(Sm90Decode<Case>::Team::kBlockThreads, Case::kTile.blocks)
    flash_decode_sm90_kernel(const __grid_constant__ FlashFwdParams params,
                             const __grid_constant__ SplitParams splits,
                             const __grid_constant__ Sm90KeyMaps maps,
                             const __grid_constant__ RowGrid grid) {
  using Walk = Sm90Decode<Case>;
  using Team = typename Walk::Team;
  constexpr int kD = Walk::kD;
  const FlashProblem& p = params.problem;
  const RowWork work = row_work(p, grid, splits, Walk::kRows, Walk::kBlockN);
  if (!work.some) return;
  const Walk walk = {params, maps, grid.map, work, ptx::dynamic_shared_memory()};
  walk.start();
  if (Team::producing()) {
    ptx::lower_registers<Walk::kTile.producer_registers>();
    if (warp_id() == 0 && ptx::elect_one()) walk.produce();
    return;
  }
  ptx::raise_registers<Walk::kTile.consumer_registers>();
  RowSums<1> sums = RowSums<1>::none();
  typename Walk::Output out;
  zero<1, kD>(out);
  walk.consume(sums, out);

  const int warp_row = Walk::first_row(), first = Walk::first_fragment();
  const int dim = static_cast<int>(p.v_head_dim);
  float scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = fragment_row(warp_row, 0, h);
    const bool here = work.rows.exists(r), counts = p.sinks != nullptr && work.split == 0 && here;
    const float sink = counts ? p.sinks[work.rows.head(r)] : -kInf;
    const RowEnd end = finish_row(sums.top[0][h], sums.total[0][h], sink);
    scale[h] = end.scale;
    if (here && fragment_column(first, 0) == 0) *work.lse(params, splits, r) = end.lse;
  }
  const auto value = [&](int m, int d, int i) { return out[m][d][i] * scale[i / 2]; };
  if (splits.out.data != nullptr) {
    store_pairs<1, kD>(warp_row, dim, value, [&](int r) { return work.part(splits, r); }, first);
    return;
  }
  Team::sync();  // all products of Q are done
  store_rows<1, kD>(
      walk.q_tile(), warp_row, dim, value, [&](int r) { return walk.row_of(params.out, r); },
      first);
}

namespace {

template <int kDims, bool kLatent>
int launch(const FlashFwdParams& params, const SplitParams& splits, void* stream) {
  using Case = Sm90DecodeCase<kThisDType, kDims, kLatent>;
  using Walk = Sm90Decode<Case>;
  const FlashProblem& p = params.problem;
  const int group = static_cast<int>(p.heads_q / p.heads_k);
  const RowGrid grid = RowGrid::of(p, Walk::kRows, group, splits.splits);
  if (grid.blocks() == 0) return 0;
  Sm90KeyMaps maps = {};
  const Sm90Box box = {1, Walk::kBlockN};
  if (p.seqlen_k > 0) {
    const auto encode = [&](TensorMap* map, const TensorRef& t, int64_t dim) {
      return map_rows(map, t, p, dim, p.heads_k, p.seqlen_k, box);
    };
    if (const int error = encode(&maps.k, params.k, p.head_dim)) return error;
    if (const int error = encode(&maps.v, params.v, p.v_head_dim)) return error;
  }
  return ATTNFORGE_LAUNCH((flash_decode_sm90_kernel<Case>), dim3(grid.blocks()),
                          dim3(Walk::Team::kBlockThreads), Walk::kSharedBytes, stream, params,
                          splits, maps, grid);
}

bool latent(const FlashFwdParams& params) {
  const TensorRef &k = params.k, &v = params.v;
  return params.problem.v_head_dim <= params.problem.head_dim && k.data == v.data &&
         k.batch_stride == v.batch_stride && k.seq_stride == v.seq_stride &&
         k.head_stride == v.head_stride;
}

}  // namespace

template <>
int flash_decode_sm90<kThisDType>(const FlashFwdParams& params, const SplitParams& splits,
                                  void* stream) {
  const FlashProblem& p = params.problem;
  switch (sm90_decode_dims_of(p.head_dim, p.v_head_dim)) {
    case 0:
      return launch<0, false>(params, splits, stream);
    case 1:
      return launch<1, false>(params, splits, stream);
    case 2:
      return launch<2, false>(params, splits, stream);
    case 3:
      return launch<3, false>(params, splits, stream);
    case 4:
      return latent(params) ? launch<4, true>(params, splits, stream)
                            : launch<4, false>(params, splits, stream);
  }
  return kNoKernel;
}

}  // namespace attnforge::cuda
