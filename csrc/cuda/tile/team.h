// The threads that share a key tile: a whole block, or each warp for itself.
//
// A block team splits the rows of a tile over its warps. A warp team has all rows in every warp and
// gives each warp key tiles of its own, which it loads and waits for alone: few rows, no barriers.
// A column team shares rows and keys alike and splits the channels: of Q and K for the scores,
// which the warps add up, and of V and the output. It is for rows too long for the registers of one
// warp.
#pragma once

#include "cuda/launch.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/sync.h"
#include "cuda/ptx/warp.h"

namespace attnforge::cuda {

AF_DEVICE int warp_id() {
  return static_cast<int>(threadIdx.x) / 32;
}

// Whether any thread of a team of several warps says so. scratch: 4 bytes of shared memory per
// warp, for this call alone.
template <class Team>
AF_DEVICE bool any_of_team(bool mine, uint32_t scratch AF_SITE) {
  mine = ptx::any(mine, ptx::kFullWarp AF_PASS_SITE);
  if (ptx::lane_id() == 0)
    ptx::store_shared(scratch + 4 * Team::warp(), uint32_t{mine} AF_PASS_SITE);
  Team::sync(AF_PASS_ONLY_SITE);
  uint32_t all = 0;
  for (int w = 0; w < Team::kWarps; ++w) {
    all |= ptx::load_shared<uint32_t>(scratch + 4 * w AF_PASS_SITE);
  }
  return all != 0;
}

template <int kWarps_>
struct BlockTeam {
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTeams = 1;          // of a block
  static constexpr int kRowWarps = kWarps;  // that rows of a tile are dealt to
  static constexpr int kColumnWarps = 1;    // that channels are dealt to
  AF_DEVICE static int rank() { return static_cast<int>(threadIdx.x); }
  AF_DEVICE static int index() { return 0; }
  AF_DEVICE static int row_warp() { return warp_id(); }  // which rows of a tile are this warp's
  AF_DEVICE static int column_warp() { return 0; }       // and which channels
  AF_DEVICE static void sync(AF_ONLY_SITE) { ptx::sync_threads(AF_PASS_ONLY_SITE); }
  AF_DEVICE static int warp() { return warp_id(); }
  AF_DEVICE static bool any(bool mine, uint32_t scratch AF_SITE) {
    return any_of_team<BlockTeam>(mine, scratch AF_PASS_SITE);
  }
};

template <int kWarps_>
struct WarpTeam {
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32;
  static constexpr int kTeams = kWarps_;
  static constexpr int kRowWarps = 1, kColumnWarps = 1;
  AF_DEVICE static int rank() { return static_cast<int>(ptx::lane_id()); }
  AF_DEVICE static int index() { return warp_id(); }
  AF_DEVICE static int row_warp() { return 0; }
  AF_DEVICE static int column_warp() { return 0; }
  AF_DEVICE static void sync(AF_ONLY_SITE) { ptx::sync_warp(ptx::kFullWarp AF_PASS_SITE); }
  AF_DEVICE static bool any(bool mine, uint32_t AF_SITE) {
    return ptx::any(mine, ptx::kFullWarp AF_PASS_SITE);
  }
};

template <int kWarps_>
struct ColumnTeam : BlockTeam<kWarps_> {
  static constexpr int kRowWarps = 1, kColumnWarps = kWarps_;
  AF_DEVICE static int row_warp() { return 0; }
  AF_DEVICE static int column_warp() { return warp_id(); }
};

}  // namespace attnforge::cuda
