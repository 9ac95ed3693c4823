// What the kernels of the backward have in common: a block owns rows of one side (keys with values,
// or queries with output gradients) and streams tiles of the other side past them.
//
//   owned      two tiles, [16 * warps, D] and [16 * warps, Dv], in shared memory for the whole loop
//   streamed   kStages slots of two tiles, with LSE and delta of streamed rows behind them
//   pipeline   as in tile/attend.h: one cp.async group per tile, one barrier per tile
#pragma once

#include "cuda/flash/instances.h"
#include "cuda/tile/epilogue.h"

namespace attnforge::cuda {

// kStats: numbers of 4 bytes that a streamed row has beside its two tiles.
template <BwdTile kTile, int kStats = 2>
struct BwdKernel {
  using T = typename ElementOf<kTile.dtype>::Type;
  using Team = BlockTeam<kTile.warps>;
  static constexpr int kOwned = 16 * kTile.warps, kStreamed = kTile.streamed;
  static constexpr int kStages = kTile.stages, kN = kStreamed / 8;
  static constexpr int kD = kTile.head_dim / 8, kV = kTile.v_head_dim / 8;
  using OwnA = SharedTile<T, kOwned, kTile.head_dim>;
  using OwnB = SharedTile<T, kOwned, kTile.v_head_dim>;
  using StreamA = SharedTile<T, kStreamed, kTile.head_dim>;
  using StreamB = SharedTile<T, kStreamed, kTile.v_head_dim>;
  static constexpr int kStatBytes = (4 * kStats * kStreamed + 127) / 128 * 128;
  static constexpr int kStageBytes = StreamA::kBytes + StreamB::kBytes + kStatBytes;
  static constexpr int kOwnBytes = OwnA::kBytes + OwnB::kBytes;
  static constexpr int kSharedBytes = kOwnBytes + kStages * kStageBytes + 4 * kTile.warps;
  using Scores = Accumulators<1, kN>;
  static_assert(kSharedBytes <= kMostShared);

  uint32_t shared;

  AF_DEVICE OwnA own_a() const { return {shared}; }
  AF_DEVICE OwnB own_b() const { return {shared + OwnA::kBytes}; }
  AF_DEVICE uint32_t stage(int j) const { return shared + kOwnBytes + j % kStages * kStageBytes; }
  AF_DEVICE StreamA stream_a(int j) const { return {stage(j)}; }
  AF_DEVICE StreamB stream_b(int j) const { return {stage(j) + StreamA::kBytes}; }
  AF_DEVICE uint32_t stats(int j) const { return stage(j) + StreamA::kBytes + StreamB::kBytes; }
  AF_DEVICE uint32_t scratch() const { return shared + kOwnBytes + kStages * kStageBytes; }
  AF_DEVICE static int own_row() { return 16 * warp_id(); }

  // Runs step(j) for all tiles; load(j) starts the copy of one, settle(j) looks at this thread's
  // own part of it before anybody else can. load_own starts the copy of the owned tiles.
  template <class LoadOwn, class Load, class Settle, class Step>
  AF_DEVICE void run(int count, const LoadOwn& load_own, const Load& load, const Settle& settle,
                     const Step& step) const {
    load_own();
#pragma unroll
    for (int j = 0; j < kStages - 1; ++j) {
      if (j < count) load(j);
      ptx::cp_async_commit();
    }
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      ptx::cp_async_wait<kStages - 2>();
      settle(j);
      Team::sync();
      if (j + kStages - 1 < count) load(j + kStages - 1);
      ptx::cp_async_commit();
      step(j);
    }
    ptx::cp_async_wait<0>();
  }
};

// Base-2 LSE of a row, +inf for one without probabilities: 2^(s - it) is 0.
AF_DEVICE float base2_lse(float lse) {
  return lse == -kInf ? kInf : lse * kLog2E;
}

}  // namespace attnforge::cuda
