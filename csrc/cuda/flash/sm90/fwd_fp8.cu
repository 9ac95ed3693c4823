// Flash attention, forward, of e4m3 Q, K and V for sm_90a, as FlashAttention-3 has it (Shah et al.,
// 2024) but for P, which is two e4m3 numbers instead of one.
//
//   block      persistent, as that of the 16-bit forward (fwd.cu); the producer's idle warps
//              transpose V (fp8_walk.h)
//   descales   that of Q and K, one per sequence and KV head, multiplies logits; that of V the
//              output of a row
//   output     bf16, fp16 or fp32, straight from registers: a lane has four channels in a row, a
//              quad a sector of 32 bytes
//   flops      2 (D + 2 Dv) per visible pair at e4m3's rate: 3/4 of the time of 16 bits
//   bytes      half of those of 16 bits
//
// Numerics: fp32 sums and statistics, weights to 2^-8 of themselves, but to no less than 2^-18 of a
// row's largest (transpose.h). Limits: head dims up to 256, multiples of 16.
#include "cuda/flash/instances.h"
#include "cuda/flash/sm90/fp8_walk.h"
#include "cuda/ptx/setmaxnreg.h"

namespace attnforge::cuda {

template <int kDims>
struct Sm90Fp8Case {
  static constexpr Sm90Fp8Tile kTile = sm90_fp8_tile(kSm90Fp8Dims[kDims]);
};

// Four elements in a row.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T x[4];
};

// This group's rows of O, times scale, where row_at(r) points.
template <class T, int kD, class RowAt>
AF_DEVICE void store_quads(const Accumulators<1, kD>& out, int warp_row, int dim,
                           const float (&scale)[2], const RowAt& row_at) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    T* to = row_at(fragment_row(warp_row, 0, h));
    if (to == nullptr) continue;
#pragma unroll
    for (int d = 0; d < kD; d += 2) {
      const int channel = e4m3_channel(fragment_column(d, 0));
      if (channel >= dim) continue;
      const float (&even)[4] = out[0][d], (&odd)[4] = out[0][d + 1];
      *reinterpret_cast<Quad<T>*>(to + channel) = {
          {narrow<T>(even[2 * h] * scale[h]), narrow<T>(odd[2 * h] * scale[h]),
           narrow<T>(even[2 * h + 1] * scale[h]), narrow<T>(odd[2 * h + 1] * scale[h])}};
    }
  }
}

template <class Case>
__global__ void __launch_bounds__(Sm90Fp8Walk<Case>::Team::kBlockThreads, 1)
    flash_fwd_fp8_sm90_kernel(const __grid_constant__ FlashFwdParams params,
                              const __grid_constant__ Sm90Maps maps,
                              const __grid_constant__ Sm90Schedule schedule) {
  using Walk = Sm90Fp8Walk<Case>;
  using Team = typename Walk::Team;
  constexpr int kD = Walk::kD;
  const Walk walk = {params, maps, schedule, ptx::dynamic_shared_memory()};
  walk.start();
  if (Team::producing()) {
    ptx::lower_registers<Walk::kTile.producer_registers>();
    if (warp_id() > 0) {
      walk.transpose();
    } else if (ptx::elect_one()) {
      walk.load();
    }
    return;
  }
  ptx::raise_registers<Walk::kTile.consumer_registers>();
  const FlashProblem& p = params.problem;
  walk.consume([&](const RowWork& work, const RowSums<1>& sums, const Accumulators<1, kD>& out) {
    const int warp_row = 16 * Team::warp(), dim = static_cast<int>(p.v_head_dim);
    const int64_t kv = work.seq.batch * p.heads_k + work.kv_head;
    const float v_scale = p.mods.v_descale == nullptr ? 1.0f : p.mods.v_descale[kv];
    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = fragment_row(warp_row, 0, h);
      const bool here = work.rows.exists(r);
      const float sink = p.sinks != nullptr && here ? p.sinks[work.rows.head(r)] : -kInf;
      const RowEnd end = finish_row(sums.top[0][h], sums.total[0][h], sink);
      scale[h] = end.scale * (v_scale / kE4m3Scale);
      if (here && fragment_column(0, 0) == 0) *work.lse(params, SplitParams{}, r) = end.lse;
    }
    const auto store = [&]<class T>() {
      store_quads<T, kD>(out, warp_row, dim, scale, [&](int r) -> T* {
        if (!work.rows.exists(r)) return nullptr;
        return row_ptr<T>(params.out, work.seq.batch, work.seq.q_row + work.rows.query(r),
                          work.rows.head(r));
      });
    };
    if (p.out_dtype == DType::kBFloat16) {
      store.template operator()<BFloat16>();
    } else if (p.out_dtype == DType::kFloat16) {
      store.template operator()<Half>();
    } else {
      store.template operator()<float>();
    }
  });
}

namespace {

template <int kDims>
int launch(const FlashFwdParams& params, void* stream) {
  using Case = Sm90Fp8Case<kDims>;
  using Walk = Sm90Fp8Walk<Case>;
  const FlashProblem& p = params.problem;
  const Sm90Box box = q_box(params, Walk::kBlockM);
  const auto schedule = Sm90Schedule::of(p, Walk::kBlockM, box.heads);
  if (schedule.work == 0) return 0;
  Sm90Maps maps;
  if (const int error = map_problem(&maps, params, box, Walk::kBlockN)) return error;
  return ATTNFORGE_LAUNCH((flash_fwd_fp8_sm90_kernel<Case>),
                          dim3(schedule.blocks(multiprocessors())), dim3(Walk::Team::kBlockThreads),
                          Walk::kSharedBytes, stream, params, maps, schedule);
}

}  // namespace

int flash_fwd_fp8_sm90(const FlashFwdParams& params, void* stream) {
  switch (sm90_fp8_dims_of(params.problem.head_dim, params.problem.v_head_dim)) {
    case 0:
      return launch<0>(params, stream);
    case 1:
      return launch<1>(params, stream);
    case 2:
      return launch<2>(params, stream);
  }
  return kNoKernel;
}

}  // namespace attnforge::cuda
