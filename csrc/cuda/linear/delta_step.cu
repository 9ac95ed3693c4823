// One token of a delta rule per sequence, on a pool of fp32 states, in place. With S the decayed
// state: e = beta (v - S^T k), o = scale (S^T q + (q k) e), S <- S + k e^T.
//
//   block    one state's slice of 64 columns: 8 warps share out the rows, a lane has two columns
//   bytes    8 K V per value head: both products are taken while the state is read, and it waits in
//            registers for its update
//
// The warps' parts are added in their order.
#include "cuda/linear/delta_launch.h"
#include "cuda/linear/walk.h"

namespace attnforge::cuda {

namespace {

constexpr int kWarps = 8, kColumns = 64, kMostKeys = 128, kMine = kMostKeys / kWarps;

struct alignas(8) Two {
  float x, y;
};

template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    delta_step_kernel(const __grid_constant__ DeltaStepParams params, int tiles) {
  const DeltaProblem& p = params.problem;
  const int lane = static_cast<int>(ptx::lane_id()), warp = warp_id();
  const int keys = static_cast<int>(p.key_dim), values = static_cast<int>(p.value_dim);
  const int heads = static_cast<int>(p.value_heads), group = heads / static_cast<int>(p.heads);
  const int column = static_cast<int>(blockIdx.x) % tiles * kColumns + 2 * lane;
  const int pair = static_cast<int>(blockIdx.x) / tiles;
  const int head = pair % heads, sequence = pair / heads;
  const int64_t slot = params.state_indices != nullptr ? params.state_indices[sequence] : sequence;
  const bool real = column < values;
  T* out = row_ptr<T>(params.out, sequence, 0, head) + column;
  if (slot < 0 || slot >= params.slots) {
    if (warp == 0 && real) out[0] = out[1] = narrow<T>(0.0f);
    return;
  }
  const T* q = row_ptr<const T>(p.q, sequence, 0, head / group);
  const T* k = row_ptr<const T>(p.k, sequence, 0, head / group);
  const T* v = row_ptr<const T>(p.v, sequence, 0, head) + column;
  const int64_t row = int64_t{sequence} * heads + head;
  const auto decay_at = [&](int n) {
    if (p.g == nullptr) return 1.0f;
    return decay_of(clamped_gate(p.g[p.channel_gates ? row * keys + n : row]));
  };
  float* pool = params.states + (slot * heads + head) * int64_t{keys} * values + column;
  const auto state_at = [&](int i) {
    return reinterpret_cast<Two*>(pool + int64_t{warp + i * kWarps} * values);
  };
  Two state[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    state[i] = {0.0f, 0.0f};
    if (real && warp + i * kWarps < keys) state[i] = *state_at(i);
  }
  float key[kMine], sums[5] = {};  // S^T k and S^T q of two columns each, q k
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int n = warp + i * kWarps;
    key[i] = 0.0f;
    if (n >= keys) continue;
    const float query = widen(q[n]), decay = decay_at(n);
    key[i] = widen(k[n]);
    state[i].x *= decay, state[i].y *= decay;
    sums[0] = ptx::fma(state[i].x, key[i], sums[0]),
    sums[1] = ptx::fma(state[i].y, key[i], sums[1]);
    sums[2] = ptx::fma(state[i].x, query, sums[2]), sums[3] = ptx::fma(state[i].y, query, sums[3]);
    sums[4] = ptx::fma(query, key[i], sums[4]);
  }
  const uint32_t parts = ptx::dynamic_shared_memory();  // [5, kWarps, 32]
  const auto part = [&](int s, int w) {
    return parts + static_cast<uint32_t>(4 * ((s * kWarps + w) * 32 + lane));
  };
#pragma unroll
  for (int s = 0; s < 5; ++s) ptx::store_shared(part(s, warp), sums[s]);
  ptx::sync_threads();
#pragma unroll
  for (int s = 0; s < 5; ++s) {
    sums[s] = 0.0f;
    for (int w = 0; w < kWarps; ++w) sums[s] += ptx::load_shared<float>(part(s, w));
  }
  if (!real) return;
  const float beta = p.beta[row];
  const Two error = {beta * (widen(v[0]) - sums[0]), beta * (widen(v[1]) - sums[1])};
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    if (warp + i * kWarps >= keys) continue;
    *state_at(i) = {ptx::fma(key[i], error.x, state[i].x), ptx::fma(key[i], error.y, state[i].y)};
  }
  if (warp != 0) return;
  out[0] = narrow<T>(p.scale * ptx::fma(sums[4], error.x, sums[2]));
  out[1] = narrow<T>(p.scale * ptx::fma(sums[4], error.y, sums[3]));
}

}  // namespace

int delta_step(const DeltaStepParams& params, void* stream) {
  const DeltaProblem& p = params.problem;
  if (p.key_dim > kMostKeys || p.value_dim % 2 != 0) return kNoKernel;
  const int64_t tiles = (p.value_dim + kColumns - 1) / kColumns;
  const int64_t blocks = tiles * p.value_heads * p.sequences;
  if (blocks == 0) return 0;
  return with_dtype(p.dtype, [&]<DType kDType>() {
    using T = typename ElementOf<kDType>::Type;
    return ATTNFORGE_LAUNCH((delta_step_kernel<T>), dim3(static_cast<unsigned>(blocks)),
                            dim3(32 * kWarps), 5 * 4 * 32 * kWarps, stream, params,
                            static_cast<int>(tiles));
  });
}

}  // namespace attnforge::cuda
