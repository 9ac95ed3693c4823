// One token of the additive recurrence per sequence (step.h): S <- decay S + k v^T, o = scale q S.
//
// A row is loaded, decayed, added to and stored once, its part of o stays in registers.
#include "cuda/linear/step.h"

namespace attnforge::cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(32 * kStepWarps)
    linear_step_kernel(const __grid_constant__ LinearStepParams params, int tiles) {
  const LinearProblem& p = params.problem;
  const int keys = static_cast<int>(p.key_dim), values = static_cast<int>(p.value_dim);
  const auto at = StepPlace<T>::of(params, tiles);
  if (at.state == nullptr) {
    if (warp_id() == 0 && at.exists) at.leave(0.0f, 0.0f);
    return;
  }
  const auto gate = [&](int64_t n) { return decay_of(clamped_gate(p.gate[n])); };
  Two whole = {1.0f, 1.0f}, value = {0.0f, 0.0f};
  if (at.exists) value = {widen(at.v[0]), widen(at.v[1])};
  switch (p.gate_kind) {
    case LinearGate::kHead:
      whole.x = whole.y = gate(at.head);
      break;
    case LinearGate::kScalar:
      whole.x = whole.y = gate(at.row);
      break;
    case LinearGate::kValue:
      if (at.exists) {
        whole = {gate(at.row * values + at.column), gate(at.row * values + at.column + 1)};
      }
      break;
    default:
      break;
  }
  const bool of_keys = p.gate_kind == LinearGate::kKey;
  float sums[2] = {};
  // Rows in batches: all of a batch are on their way before the first is used.
  constexpr int kBatch = 4;
  for (int first = warp_id(); at.exists && first < keys; first += kBatch * kStepWarps) {
    Two s[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int n = first + i * kStepWarps;
      if (n < keys) s[i] = *reinterpret_cast<const Two*>(at.state + int64_t{n} * values);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int n = first + i * kStepWarps;
      if (n >= keys) continue;
      const float key = widen(at.k[n]), query = widen(at.q[n]);
      const float decay = of_keys ? gate(at.row * keys + n) : 1.0f;
      s[i].x = ptx::fma(s[i].x, whole.x * decay, key * value.x);
      s[i].y = ptx::fma(s[i].y, whole.y * decay, key * value.y);
      *reinterpret_cast<Two*>(at.state + int64_t{n} * values) = s[i];
      sums[0] = ptx::fma(query, s[i].x, sums[0]);
      sums[1] = ptx::fma(query, s[i].y, sums[1]);
    }
  }
  sum_over_warps(sums);
  if (warp_id() == 0 && at.exists) at.leave(p.scale * sums[0], p.scale * sums[1]);
}

}  // namespace

int linear_step(const LinearStepParams& params, void* stream) {
  if (params.problem.normalize != LinearNorm::kNone) return kNoKernel;
  return launch_step(params, [&]<class T>(dim3 grid, dim3 block, int tiles) {
    return ATTNFORGE_LAUNCH((linear_step_kernel<T>), grid, block, 2 * 4 * 32 * kStepWarps, stream,
                            params, tiles);
  });
}

}  // namespace attnforge::cuda
