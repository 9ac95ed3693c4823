// The tiles of the forward for sm_90a: one constexpr function, the reason beside each number.
//
// What bounds them, per consumer thread and block:
//   registers   O takes v_head_dim / 2, S block_n / 2 and P block_n / 4 of 240 (160 with three
//               groups), and all three live at once, since softmax runs under the next product
//   memory      Q, and kStages of K and V, in 227 KiB
// None of these numbers was tuned on a GPU.
#pragma once

#include "cuda/flash/tiles.h"

namespace attnforge::cuda {

constexpr int kMostSharedSm90 = 227 * 1024;

struct Sm90Tile {
  DType dtype;
  int head_dim, v_head_dim;  // what tiles are padded to
  bool features;             // softcap and ALiBi; the others are always there
  int groups;                // consumer warpgroups, 64 rows each
  int block_n, stages;
  bool turns;  // groups issue products in turn
  int producer_registers, consumer_registers;
};

constexpr Sm90Tile sm90_fwd_tile(DType dtype, HeadDims d, bool features) {
  Sm90Tile t = {dtype, d.qk, d.v, features, 2, 128, 2, true, 24, 240};
  if (d.qk == 64 && !features) {
    // Short rows: softmax takes as long as products, and a third group has room to hide it.
    t.groups = 3;
    t.producer_registers = 32, t.consumer_registers = 160;
  }
  if (d.qk == 192) {
    // Q 48 KiB; K and V of 128 keys would be 80 KiB per stage with V 128, 96 KiB with 192.
    t.block_n = d.v == 128 ? 128 : 96;
  }
  // Q 64 KiB, 80 KiB per stage; O alone is 128 registers, and what scores need comes on top.
  if (d.qk == 256) t.block_n = features ? 64 : 80;
  // A tile of long rows keeps the tensor cores busy for longer than its softmax takes.
  if (d.qk > 128) t.turns = false;
  return t;
}

}  // namespace attnforge::cuda
