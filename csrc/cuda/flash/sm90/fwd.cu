// Flash attention, forward, for sm_90a (TMA, wgmma): FlashAttention-3's design (Shah et al., 2024).
//
//   block      persistent, one per multiprocessor: a producer warp and 64 rows per consumer
//              warpgroup; pieces of work longest first (schedule.h)
//   loop       walk.h: products in flight over softmax, groups in turn
//   registers  the producer gives its own to the consumers (setmaxnreg)
//   flops      2 (D + Dv) per visible pair; head dims are padded to the next tile
//   bytes      Q, O once; K, V ceil(rows / tile) times, from L2 mostly
//
// Results leave by the memory of Q, whole chunks of a row. A row's result depends on its own Q and
// its own keys only. Numerics as the sm_80 class has them: fp32 sums and statistics, P rounded to
// 16 bits for the second product. Limits: 16-bit dtypes, head dims up to 256, multiples of 8.
#include "cuda/flash/instances.h"
#include "cuda/flash/sm90/walk.h"
#include "cuda/tile/epilogue.h"

namespace attnforge::cuda {

template <DType kDType, int kDims, bool kFeatures>
struct Sm90Case {
  static constexpr Sm90Tile kTile = sm90_fwd_tile(kDType, kHeadDims[kDims], kFeatures);
};

template <class Case>
__global__ void __launch_bounds__(Sm90Walk<Case>::Team::kBlockThreads, 1)
    flash_fwd_sm90_kernel(const __grid_constant__ FlashFwdParams params,
                          const __grid_constant__ Sm90Maps maps,
                          const __grid_constant__ Sm90Schedule schedule) {
  using Walk = Sm90Walk<Case>;
  using T = typename Walk::T;
  using Team = typename Walk::Team;
  constexpr int kD = Walk::kValueDim / 8;
  const Walk walk = {params, maps, schedule, ptx::dynamic_shared_memory()};
  walk.start();
  if (Team::producing()) {
    ptx::lower_registers<Walk::kTile.producer_registers>();
    if (warp_id() == 0 && ptx::elect_one()) walk.produce();
    return;
  }
  ptx::raise_registers<Walk::kTile.consumer_registers>();
  const FlashProblem& p = params.problem;
  walk.consume([&](const RowWork& work, int piece, const typename Walk::Result& result) {
    const int warp_row = 16 * Team::warp(), dim = static_cast<int>(p.v_head_dim);
    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = fragment_row(warp_row, 0, h);
      const bool here = work.rows.exists(r);
      const float sink = p.sinks != nullptr && here ? p.sinks[work.rows.head(r)] : -kInf;
      const RowEnd end = finish_row(result.sums.top[0][h], result.sums.total[0][h], sink);
      scale[h] = end.scale;
      if (here && fragment_column(0, 0) == 0) *work.lse(params, SplitParams{}, r) = end.lse;
    }
    const auto value = [&](int m, int d, int i) { return result.out[m][d][i] * scale[i / 2]; };
    const auto row_of = [&](const TensorRef& t, int r) -> T* {
      if (!work.rows.exists(r)) return nullptr;
      return row_ptr<T>(t, work.seq.batch, work.seq.q_row + work.rows.query(r), work.rows.head(r));
    };
    Team::sync_group();  // all products of these rows of Q are done
    store_rows<1, kD>(walk.q_tile(), warp_row, dim, value,
                      [&](int r) { return row_of(params.out, r); });
    if (params.out_lo.data != nullptr) {
      store_rows<1, kD>(
          walk.q_tile(), warp_row, dim,
          [&](int m, int d, int i) { return residue<T>(value(m, d, i)); },
          [&](int r) { return row_of(params.out_lo, r); });
    }
    ptx::fence_proxy_async();  // before the next Q
    ptx::sync_warp();
    walk.q_stage().release(piece);
  });
}

template <>
int flash_fwd_sm90<kThisDType>(const FlashFwdParams& params, void* stream) {
  const FlashProblem& p = params.problem;
  return with_head_dims(p, [&]<int kDims>() {
    const auto launch = [&]<bool kFeatures>() {
      using Case = Sm90Case<kThisDType, kDims, kFeatures>;
      using Walk = Sm90Walk<Case>;
      const Sm90Box box = q_box(params, Walk::kBlockM);
      const auto schedule = Sm90Schedule::of(p, Walk::kBlockM, box.heads);
      if (schedule.work == 0) return 0;
      Sm90Maps maps;
      if (const int error = map_problem(&maps, params, box, Walk::kBlockN)) return error;
      return ATTNFORGE_LAUNCH(
          (flash_fwd_sm90_kernel<Case>), dim3(schedule.blocks(multiprocessors())),
          dim3(Walk::Team::kBlockThreads), Walk::kSharedBytes, stream, params, maps, schedule);
    };
    return has_features(p) ? launch.template operator()<true>()
                           : launch.template operator()<false>();
  });
}

}  // namespace attnforge::cuda
