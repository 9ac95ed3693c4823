// One token of a delta rule per sequence (step.h). With S the decayed state: e = beta (v - S^T k),
// o = scale (S^T q + (q k) e), S <- S + k e^T.
//
// Both products are taken while the state is read, and it waits in registers for its update.
#include "cuda/linear/delta_launch.h"
#include "cuda/linear/step.h"

namespace attnforge::cuda {

namespace {

constexpr int kMostKeys = 128, kMine = kMostKeys / kStepWarps;

template <class T>
__global__ void __launch_bounds__(32 * kStepWarps)
    delta_step_kernel(const __grid_constant__ DeltaStepParams params, int tiles) {
  const DeltaProblem& p = params.problem;
  const int keys = static_cast<int>(p.key_dim), values = static_cast<int>(p.value_dim);
  const auto at = StepPlace<T>::of(params, tiles);
  if (at.state == nullptr) {
    if (warp_id() == 0 && at.exists) at.leave(0.0f, 0.0f);
    return;
  }
  const auto decay_at = [&](int n) {
    if (p.g == nullptr) return 1.0f;
    return decay_of(clamped_gate(p.g[p.channel_gates ? at.row * keys + n : at.row]));
  };
  const auto key_of = [&](int i) { return warp_id() + i * kStepWarps; };
  const auto state_at = [&](int i) {
    return reinterpret_cast<Two*>(at.state + int64_t{key_of(i)} * values);
  };
  Two state[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    state[i] = {0.0f, 0.0f};
    if (at.exists && key_of(i) < keys) state[i] = *state_at(i);
  }
  float key[kMine], sums[5] = {};  // S^T k and S^T q of two columns each, q k
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int n = key_of(i);
    key[i] = 0.0f;
    if (n >= keys) continue;
    const float query = widen(at.q[n]), decay = decay_at(n);
    key[i] = widen(at.k[n]);
    state[i].x *= decay, state[i].y *= decay;
    sums[0] = ptx::fma(state[i].x, key[i], sums[0]);
    sums[1] = ptx::fma(state[i].y, key[i], sums[1]);
    sums[2] = ptx::fma(state[i].x, query, sums[2]), sums[3] = ptx::fma(state[i].y, query, sums[3]);
    sums[4] = ptx::fma(query, key[i], sums[4]);
  }
  sum_over_warps(sums);
  if (!at.exists) return;
  const float beta = p.beta[at.row];
  const Two error = {beta * (widen(at.v[0]) - sums[0]), beta * (widen(at.v[1]) - sums[1])};
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    if (key_of(i) >= keys) continue;
    *state_at(i) = {ptx::fma(key[i], error.x, state[i].x), ptx::fma(key[i], error.y, state[i].y)};
  }
  if (warp_id() != 0) return;
  at.leave(p.scale * ptx::fma(sums[4], error.x, sums[2]),
           p.scale * ptx::fma(sums[4], error.y, sums[3]));
}

}  // namespace

int delta_step(const DeltaStepParams& params, void* stream) {
  if (params.problem.key_dim > kMostKeys) return kNoKernel;
  return launch_step(params, [&]<class T>(dim3 grid, dim3 block, int tiles) {
    return ATTNFORGE_LAUNCH((delta_step_kernel<T>), grid, block, 5 * 4 * 32 * kStepWarps, stream,
                            params, tiles);
  });
}

}  // namespace attnforge::cuda
