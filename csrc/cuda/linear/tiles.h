// The walks of the linear family that are built: dtype, width of the state, what gates act on.
// Nothing here was tuned on a GPU.
#pragma once

#include "attnforge/linear.h"
#include "cuda/flash/tiles.h"

namespace attnforge::cuda {

// What a walk's gates multiply: the whole state, or its channels one by one, on the side that is
// read (x and y) or on that of columns (z and out).
enum class WalkGate { kWhole, kRead, kColumns };

// A block has 4 warps of 16 columns.
constexpr int kWalkWarps = 4, kWalkColumns = 16 * kWalkWarps;
constexpr int kWalkDims[] = {64, 128};

struct WalkTile {
  DType dtype;  // of z and out
  DType read;   // of x and y
  int dim;
  WalkGate gate;
  int rows;    // tokens of a chunk
  int stages;  // chunks in shared memory
};

// 32 tokens, a lane each for the gates: the state is in registers, so that longer chunks save
// barriers alone and cost products inside the chunk. Gates of channels: 16, the largest block that
// has no part whose decays factor.
constexpr WalkTile walk_tile(DType dtype, DType read, int dim, WalkGate gate) {
  return {dtype, read, dim, gate, gate == WalkGate::kWhole ? 32 : 16, 2};
}

constexpr int walk_dim_of(int64_t dim) {
  return dim <= kWalkDims[0] ? 0 : dim <= kWalkDims[1] ? 1 : -1;
}

}  // namespace attnforge::cuda
