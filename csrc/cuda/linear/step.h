// A step of one token per sequence on a pool of fp32 states [slots, heads, K, V], in place: what
// the kernels share.
//
//   block    one state's slice of 64 columns: 8 warps share out the rows, a lane has two columns
//   bytes    8 K V per value head: bound by memory; q, k, v and gates are read once per slice
//
// The warps' parts of a sum are added in their order.
#pragma once

#include "cuda/linear/walk.h"

namespace attnforge::cuda {

constexpr int kStepWarps = 8, kStepColumns = 64;

struct alignas(8) Two {
  float x, y;
};

// A lane's two columns of one head.
template <class T>
struct StepPlace {
  int column, head;
  bool exists;     // the columns do
  int64_t row;     // of [sequences, heads, ..]
  const T *q, *k;  // [K]
  const T* v;      // two values, as out
  T* out;
  float* state;  // row 0; rows are V apart. Null where the sequence has no state

  template <class Params>
  AF_DEVICE static StepPlace of(const Params& params, int tiles) {
    const auto& p = params.problem;
    const int block = static_cast<int>(blockIdx.x), heads = static_cast<int>(p.value_heads);
    const int pair = block / tiles, head = pair % heads, sequence = pair / heads;
    const int column = block % tiles * kStepColumns + 2 * static_cast<int>(ptx::lane_id());
    const int key_head = head / (heads / static_cast<int>(p.heads));
    const int64_t slot = params.state_indices ? params.state_indices[sequence] : sequence;
    const bool live = slot >= 0 && slot < params.slots;
    return {
        column,
        head,
        column < p.value_dim,
        int64_t{sequence} * heads + head,
        row_ptr<const T>(p.q, sequence, 0, key_head),
        row_ptr<const T>(p.k, sequence, 0, key_head),
        row_ptr<const T>(p.v, sequence, 0, head) + column,
        row_ptr<T>(params.out, sequence, 0, head) + column,
        live ? params.states + (slot * heads + head) * p.key_dim * p.value_dim + column : nullptr};
  }
  AF_DEVICE void leave(float x, float y) const { out[0] = narrow<T>(x), out[1] = narrow<T>(y); }
};

// Sums over the warps, of every lane for itself. Shared memory: kStepWarps * 32 kN floats.
template <int kN>
AF_DEVICE void sum_over_warps(float (&sums)[kN] AF_SITE) {
  const uint32_t parts = ptx::dynamic_shared_memory();
  const int lane = static_cast<int>(ptx::lane_id());
  const auto part = [&](int s, int warp) {
    return parts + static_cast<uint32_t>(4 * ((s * kStepWarps + warp) * 32 + lane));
  };
#pragma unroll
  for (int s = 0; s < kN; ++s) ptx::store_shared(part(s, warp_id()), sums[s] AF_PASS_SITE);
  ptx::sync_threads(AF_PASS_ONLY_SITE);
#pragma unroll
  for (int s = 0; s < kN; ++s) {
    sums[s] = 0.0f;
    for (int w = 0; w < kStepWarps; ++w) {
      sums[s] += ptx::load_shared<float>(part(s, w) AF_PASS_SITE);
    }
  }
}

// kernel.template operator()<T>(grid, block, tiles) launches for the elements of a call.
template <class Params, class F>
int launch_step(const Params& params, const F& kernel) {
  const auto& p = params.problem;
  if (p.value_dim % 2 != 0) return kNoKernel;
  const int64_t tiles = (p.value_dim + kStepColumns - 1) / kStepColumns;
  const int64_t blocks = tiles * p.value_heads * p.sequences;
  if (blocks == 0) return 0;
  return with_dtype(p.dtype, [&]<DType kDType>() {
    return kernel.template operator()<typename ElementOf<kDType>::Type>(
        dim3(static_cast<unsigned>(blocks)), dim3(32 * kStepWarps), static_cast<int>(tiles));
  });
}

}  // namespace attnforge::cuda
