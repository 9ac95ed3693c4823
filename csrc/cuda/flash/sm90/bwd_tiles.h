// The tiles of the backward for sm_90a: one constexpr function, the reason beside each number.
//
// What bounds them, per consumer thread and block:
//   registers   dK and dV take D / 2 each, or dQ alone; S and dP `streamed` / 2 each, P and dS in
//               16 bits half of that; of 240 with two groups
//   memory      the two owned tiles, and kStages of two streamed ones, in 227 KiB; and its
//               bandwidth: a product of N streamed rows takes N / 2 cycles per 16 of D, and reads
//               16 (A) + N / 4 (B) cycles' worth of 128 bytes where A is in shared memory
// None of these numbers was tuned on a GPU.
#pragma once

#include "cuda/flash/sm90/tiles.h"

namespace attnforge::cuda {

// Head dims that are built: entries of kHeadDims. A call takes the first that has room.
constexpr int kSm90BwdDims[] = {0, 2};
static_assert(kHeadDims[0].qk == 64 && kHeadDims[2].qk == 128);

// A block owns `owned` rows of one side, 64 per consumer warpgroup, and streams tiles of the other.
struct Sm90BwdTile {
  DType dtype;
  int head_dim;   // what tiles of Q, K, V and dO are padded to
  bool features;  // softcap and ALiBi; the others are always there
  Gradient gradient;
  int groups, streamed, stages;
  int producer_registers, consumer_registers;

  constexpr int owned() const { return 64 * groups; }
};

constexpr Sm90BwdTile sm90_bwd_tile(DType dtype, HeadDims d, bool features, Gradient gradient) {
  Sm90BwdTile t = {dtype, d.qk, features, gradient, 2, 128, 3, 24, 240};
  if (gradient == Gradient::kKeysValues) {
    // D 128: dK and dV are 128 registers, S and dP of 64 rows another 64, their halves 32.
    t.streamed = d.qk == 128 ? 64 : 96;
    if (features) t.streamed = d.qk == 128 ? 32 : 64;  // slopes of a softcap live from S to dS
  } else {
    if (d.qk == 128) t.stages = 2;  // Q and dO 64 KiB, a stage as much
    if (d.qk == 128 && features) t.streamed = 64;
  }
  return t;
}

}  // namespace attnforge::cuda
