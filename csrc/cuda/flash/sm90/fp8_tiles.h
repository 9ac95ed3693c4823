// The tiles of the fp8 forward for sm_90a: one constexpr function, the reason beside each number.
// None of these numbers was tuned on a GPU.
#pragma once

#include "cuda/flash/sm90/tiles.h"

namespace attnforge::cuda {

// Head dims that are built; a call takes the first that has room.
constexpr HeadDims kSm90Fp8Dims[] = {{64, 64}, {128, 128}, {256, 256}};
constexpr int kNumSm90Fp8Dims = 3;

constexpr int sm90_fp8_dims_of(int64_t qk, int64_t v) {
  for (int i = 0; i < kNumSm90Fp8Dims; ++i) {
    if (qk <= kSm90Fp8Dims[i].qk && v <= kSm90Fp8Dims[i].v) return i;
  }
  return -1;
}

struct Sm90Fp8Tile {
  int head_dim;  // what tiles are padded to, of V too
  int groups;    // consumer warpgroups, 64 rows each
  int block_n, stages;
  int columns;  // of V that are multiplied at a time
  int producer_registers, consumer_registers;
};

constexpr Sm90Fp8Tile sm90_fp8_tile(HeadDims d) {
  // A thread holds head_dim / 2 registers of O beside either block_n / 2 of S or block_n / 4 of P
  // and columns / 2 of its product. Transposing takes more registers than a copy by TMA does.
  Sm90Fp8Tile t = {d.qk, 2, 128, 2, d.qk, 40, 232};
  if (d.qk == 256) t.block_n = 64, t.columns = 128;  // O alone is 128 registers
  return t;
}

}  // namespace attnforge::cuda
