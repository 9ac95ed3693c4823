// What a block of a walk has: where its sequence lies, its shared memory, decays.
#pragma once

#include "cuda/launch.h"
#include "cuda/linear/launch.h"
#include "cuda/linear/tiles.h"
#include "cuda/tile/sequence.h"
#include "cuda/tile/shared_tile.h"
#include "cuda/tile/state_product.h"
#include "cuda/tile/team.h"

namespace attnforge::cuda {

// A natural-log gate at or below it is a reset: e^-128 is 0, and so is a decay over it.
constexpr float kReset = -128.0f;

AF_DEVICE float clamped_gate(float gate) {
  return at_least(gate, kReset);
}
AF_DEVICE float decay_of(float log) {
  return ptx::exp2_approx(log * kLog2E);
}

// Tokens of one sequence in memory.
struct Tokens {
  int batch;
  int64_t first;
  int count;
};

AF_DEVICE Tokens tokens_of(int64_t rows, const int32_t* cu_seqlens, int sequence) {
  if (cu_seqlens == nullptr) return {sequence, 0, static_cast<int>(rows)};
  const int64_t first = at_least<int64_t>(0, at_most<int64_t>(cu_seqlens[sequence], rows));
  const int64_t end = at_most<int64_t>(cu_seqlens[sequence + 1], rows);
  return {0, first, static_cast<int>(at_least<int64_t>(0, end - first))};
}

// A tensor's rows of one head in walking order: from the first token on, or from the last.
template <class T>
struct WalkRows {
  T* first;
  int64_t stride;

  AF_DEVICE static WalkRows of(const WalkTensor& x, const Tokens& tokens, int head, bool reverse) {
    const int64_t token = tokens.first + (reverse ? tokens.count - 1 : 0);
    return {row_ptr<T>(x.t, tokens.batch, token, head / x.group),
            reverse ? -x.t.seq_stride : x.t.seq_stride};
  }
  AF_DEVICE T* at(int row) const { return first + row * stride; }
};

// Gates before the tokens of one head in walking order, `width` numbers each; in reverse a token's
// are those of the token after it, and `first_token` is what the walk ends with.
struct GateRows {
  const float* first_token;  // null: no gates
  int64_t stride;
  int count;
  bool reverse;

  AF_DEVICE const float* before(int row) const {  // null: none
    if (row >= count || first_token == nullptr) return nullptr;
    if (!reverse) return first_token + row * stride;
    return row == 0 ? nullptr : first_token + (count - row) * stride;
  }
};

// log decays of the 32 tokens of a chunk, a lane each, summed up from the chunk's first one on.
// Gates are multiples of 1/64, whose sums are exact, and a rest: so a difference of two sums is as
// good behind a strong gate as before it, and one over a reset is below -127, whose exponential is
// an exact 0.
struct DecaySums {
  float whole, rest;

  AF_DEVICE static DecaySums of(float gate AF_SITE) {
    const float g = clamped_gate(gate);
    DecaySums s;
    s.whole = (g + 0x1.8p17f) - 0x1.8p17f;
    s.rest = g - s.whole;
    const uint32_t lane = ptx::lane_id();
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
      const float whole = ptx::shuffle_up(s.whole, step, ptx::kFullWarp AF_PASS_SITE);
      const float rest = ptx::shuffle_up(s.rest, step, ptx::kFullWarp AF_PASS_SITE);
      if (lane >= step) s.whole += whole, s.rest += rest;
    }
    return s;
  }
  AF_DEVICE DecaySums of_lane(int lane AF_SITE) const {
    const uint32_t source = static_cast<uint32_t>(lane);
    return {ptx::shuffle_from(whole, source, ptx::kFullWarp AF_PASS_SITE),
            ptx::shuffle_from(rest, source, ptx::kFullWarp AF_PASS_SITE)};
  }
  AF_DEVICE float decay() const { return decay_of(whole + rest); }
  AF_DEVICE float decay_since(const DecaySums& earlier) const {
    return decay_of((whole - earlier.whole) + (rest - earlier.rest));
  }
};

template <WalkTile kTile>
struct Walk {
  using T = typename ElementOf<kTile.dtype>::Type;
  using Read = typename ElementOf<kTile.read>::Type;
  using P = StateProduct<T>;
  using Team = BlockTeam<kWalkWarps>;
  static constexpr int kRows = kTile.rows, kDim = kTile.dim, kStages = kTile.stages;
  static constexpr int kN = kRows / 8, kD = kDim / 8;
  static constexpr bool kRead = kTile.gate == WalkGate::kRead;
  static constexpr bool kColumns = kTile.gate == WalkGate::kColumns;
  using ReadTile = SharedTile<Read, kRows, kDim>;         // x and y
  using ColumnTile = SharedTile<T, kRows, kWalkColumns>;  // z, then what leaves
  using Between = SharedTile<float, kRows, kRows>;  // read write decay x_i y_j, i not before j
  // Gates of channels, then their decays; x decayed from the chunk's start, y to its end, or of the
  // columns the decays from the start, and z decayed to the end.
  using GateTile = SharedTile<float, kRows, kRead ? kDim : kWalkColumns>;
  static constexpr int kGateBytes = kRead || kColumns ? GateTile::kBytes : 0;
  static constexpr int kStageBytes = 2 * ReadTile::kBytes + ColumnTile::kBytes + kGateBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + Between::kBytes + 2 * kGateBytes +
                                      (kGateBytes ? GateTile::kDim * 4 : 0) +
                                      (kColumns ? GateTile::kBytes : 0);
  static_assert(kSharedBytes <= kMostShared);
  using State = Fragments<kD>;   // 16 columns of the state as rows
  using Output = Fragments<kN>;  // 16 columns of out as rows, tokens as columns

  uint32_t shared;

  AF_DEVICE uint32_t stage(int n) const {
    return shared + static_cast<uint32_t>(n % kStages * kStageBytes);
  }
  AF_DEVICE ReadTile x(int n) const { return {stage(n)}; }
  AF_DEVICE ReadTile y(int n) const { return {stage(n) + ReadTile::kBytes}; }
  AF_DEVICE ColumnTile z(int n) const { return {stage(n) + 2 * ReadTile::kBytes}; }
  AF_DEVICE GateTile gates(int n) const {
    return {stage(n) + 2 * ReadTile::kBytes + ColumnTile::kBytes};
  }
  AF_DEVICE Between between() const { return {shared + kStages * kStageBytes}; }
  AF_DEVICE GateTile from_start() const { return {between().base + Between::kBytes}; }
  AF_DEVICE GateTile to_end() const { return {from_start().base + kGateBytes}; }
  AF_DEVICE GateTile inside() const { return {to_end().base + kGateBytes}; }  // kColumns
  AF_DEVICE uint32_t total(int channel) const {
    return (kColumns ? inside().base : to_end().base) + kGateBytes + 4 * channel;
  }
  AF_DEVICE static int own_column() { return 16 * warp_id(); }
};

}  // namespace attnforge::cuda
