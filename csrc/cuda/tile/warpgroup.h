// Warpgroups: their roles, their turns at the tensor cores, and the two products of attention as
// wgmma has them.
//
//   issue_nt   S = A B^T       both from tiles in shared memory
//   issue_nn   O += P B        P from registers, packed to 16 bits
//
// Accumulators are those of product.h with one fragment of 16 rows per warp, 64 of a warpgroup, so
// softmax, masks and stores of the other kernels serve them. Products are asynchronous: between
// issue and wait nobody touches their registers, and the caller fences, commits and waits.
#pragma once

#include "cuda/launch.h"
#include "cuda/ptx/sync.h"
#include "cuda/tile/panel_tile.h"
#include "cuda/tile/product.h"
#include "cuda/tile/team.h"

namespace attnforge::cuda {

// Named barriers of a block (0 is __syncthreads).
constexpr uint32_t kTeamBarrier = 1, kTurnBarriers = 2, kGroupBarriers = 6;

// Warpgroup 0 loads; the others multiply, and are a team (team.h) among themselves.
template <int kGroups_>
struct Consumers {
  static constexpr int kGroups = kGroups_, kWarps = 4 * kGroups;
  static constexpr int kThreads = 128 * kGroups;
  static constexpr int kTeams = 1;
  static constexpr int kBlockThreads = kThreads + 128;
  static_assert(kGroups <= 4, "named barriers");

  AF_DEVICE static bool producing() { return threadIdx.x < 128; }
  AF_DEVICE static int rank() { return static_cast<int>(threadIdx.x) - 128; }
  AF_DEVICE static int warp() { return rank() / 32; }
  AF_DEVICE static uint32_t group() { return threadIdx.x / 128 - 1; }
  AF_DEVICE static void sync(AF_ONLY_SITE) {
    ptx::named_barrier_sync(kTeamBarrier, kThreads AF_PASS_SITE);
  }
  AF_DEVICE static void sync_group(AF_ONLY_SITE) {
    ptx::named_barrier_sync(kGroupBarriers + group(), 128 AF_PASS_SITE);
  }
  AF_DEVICE static bool any(bool mine, uint32_t scratch AF_SITE) {
    return any_of_team<Consumers>(mine, scratch AF_PASS_SITE);
  }
};

// Ping-pong: warpgroups issue products in a ring, so that one's softmax runs under the others'
// products. Each takes as many turns as every other.
template <int kGroups>
struct Turns {
  AF_DEVICE static uint32_t barrier(uint32_t group) { return kTurnBarriers + group; }
  // The last group gives the first its turn; at the end the first takes it back.
  AF_DEVICE static void start(uint32_t group AF_SITE) {
    if (group == kGroups - 1) ptx::named_barrier_arrive(barrier(0), 256 AF_PASS_SITE);
  }
  AF_DEVICE static void take(uint32_t group AF_SITE) {
    ptx::named_barrier_sync(barrier(group), 256 AF_PASS_SITE);
  }
  AF_DEVICE static void pass(uint32_t group AF_SITE) {
    ptx::named_barrier_arrive(barrier((group + 1) % kGroups), 256 AF_PASS_SITE);
  }
  AF_DEVICE static void finish(uint32_t group AF_SITE) {
    if (group == 0) ptx::named_barrier_sync(barrier(0), 256 AF_PASS_SITE);
  }
};

// The registers of a warpgroup's accumulators as wgmma counts them.
template <int kN>
AF_DEVICE float (&flat(Accumulators<1, kN>& acc))[4 * kN] {
  return reinterpret_cast<float (&)[4 * kN]>(acc);
}

// Weights as the left operand of the second product: kK columns, two elements in a register.
template <int kK>
using Weights = uint32_t[kK / 16][4];

template <class T, int kK>
AF_DEVICE void pack_weights(Weights<kK>& p, const Accumulators<1, kK / 8>& s) {
#pragma unroll
  for (int k = 0; k < kK / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&c)[4] = s[0][2 * k + i / 2];
      p[k][i] = pack<T>(c[i % 2 * 2], c[i % 2 * 2 + 1]);
    }
  }
}

// Issues acc = A B^T for 64 rows of A from a_row on and all rows of B.
template <class TileA, class TileB>
AF_DEVICE void issue_nt(Accumulators<1, TileB::kRows / 8>& acc, const TileA& a, int a_row,
                        const TileB& b AF_SITE) {
  static_assert(TileA::kDim == TileB::kDim);
  const uint64_t left = a.along_rows(a_row), right = b.along_rows(0);
  auto& d = flat<TileB::kRows / 8>(acc);
#pragma unroll
  for (int k = 0; k < TileA::kSteps; ++k) {
    const uint64_t x = left + TileA::columns_on(k), y = right + TileB::columns_on(k);
    if constexpr (TileA::kSize == 1) {
      ptx::wgmma_e4m3<TileB::kRows>(d, x, y, k > 0 AF_PASS_SITE);
    } else if constexpr (__is_same(typename TileA::Element, Half)) {
      ptx::wgmma_f16<TileB::kRows>(d, x, y, k > 0 AF_PASS_SITE);
    } else {
      ptx::wgmma_bf16<TileB::kRows>(d, x, y, k > 0 AF_PASS_SITE);
    }
  }
}

// Issues acc += P B; rows of B are the columns of P.
template <class TileB>
AF_DEVICE void issue_nn(Accumulators<1, TileB::kDim / 8>& acc, const Weights<TileB::kRows>& p,
                        const TileB& b AF_SITE) {
  const uint64_t right = b.across_rows();
  auto& d = flat<TileB::kDim / 8>(acc);
#pragma unroll
  for (int k = 0; k < TileB::kRows / 16; ++k) {
    const uint64_t y = right + TileB::rows_on(k);
    if constexpr (__is_same(typename TileB::Element, Half)) {
      ptx::wgmma_f16<TileB::kDim, true>(d, p[k], y, true AF_PASS_SITE);
    } else {
      ptx::wgmma_bf16<TileB::kDim, true>(d, p[k], y, true AF_PASS_SITE);
    }
  }
}

}  // namespace attnforge::cuda
