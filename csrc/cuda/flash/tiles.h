// The tiles of the flash kernels of the sm_80 class: one constexpr function per kernel, the reason
// beside each number. The lists at the end are what is instantiated; their names are the kernel
// ids.
//
// Shared memory is held to 99 KiB, what a block of sm_86 and sm_89 can have, so that one list
// serves every device from sm_80 on. None of these numbers was tuned on a GPU.
#pragma once

#include "attnforge/params.h"

namespace attnforge::cuda {

constexpr int kMostShared = 99 * 1024;

// Who shares a key tile: tile/team.h.
enum class TeamKind { kBlock, kWarp, kColumns };
// Where keys are: a tensor, pages of the same dtype, pages of codes; the last two once more with V
// in the first channels of K, which is read once; or those blocks of a tensor that a list names.
enum class StoreKind { kTensor, kPages, kCodes, kLatentPages, kLatentCodes, kListed };

// A forward or decode kernel. Rows: 16 * m_tiles per warp of a block team, else per block.
struct FwdTile {
  DType dtype;
  int head_dim, v_head_dim;  // what tiles are padded to
  bool features;             // softcap and ALiBi; the others are always there
  TeamKind team;
  int warps, m_tiles, block_n, stages;
  StoreKind store = StoreKind::kTensor;
};

// Head dims that are built; a call takes the first that has room. 192 with 128 is a pair of its own
// (latent attention, expanded), the padding of V would cost a fifth of its products.
struct HeadDims {
  int qk, v;
};
constexpr HeadDims kHeadDims[] = {{64, 64},   {96, 96},   {128, 128},
                                  {192, 128}, {192, 192}, {256, 256}};
constexpr int kNumHeadDims = 6;

// Index of the first pair that has room, or -1.
constexpr int head_dims_of(int64_t qk, int64_t v) {
  for (int i = 0; i < kNumHeadDims; ++i) {
    if (qk <= kHeadDims[i].qk && v <= kHeadDims[i].v) return i;
  }
  return -1;
}

constexpr FwdTile fwd_tile(DType dtype, HeadDims d, bool features) {
  FwdTile t = {dtype, d.qk, d.v, features, TeamKind::kBlock, 4, 1, 32, 2};
  const int width = d.qk > d.v ? d.qk : d.v;
  if (dtype == DType::kFloat32) {
    // Three products for each: registers and shared memory allow 16 rows per warp. The keys of a
    // stage shrink as rows get longer: 64 rows of Q and two stages stay inside 99 KiB.
    t.block_n = width <= 128 ? 32 : 16;
    if (width > 192) t.warps = 2;  // Q alone is 1 KiB per row
    return t;
  }
  if (width <= 128) {
    // 32 rows per warp use each K and V fragment twice: at 16 rows ldmatrix would take all of the
    // shared-memory bandwidth that mma.sync leaves. O takes D registers and S block_n, which leaves
    // a dozen too few at D 128 (some spills around the loop's ends, see budgets.json).
    t.m_tiles = 2;
    t.block_n = width == 96 ? 48 : 64;
    if (features) t.block_n = 32;  // tanh and slopes need registers of their own
    return t;
  }
  // O of 32 rows would not fit the registers.
  return t;
}

constexpr FwdTile decode_tile(DType dtype, HeadDims d) {
  // 16 rows, what mma.sync takes at least, and 16 keys per step of a warp: bytes in flight come
  // from warps and stages, and from several blocks on an SM. Fewer warps where rows are long.
  FwdTile t = {dtype, d.qk, d.v, true, TeamKind::kWarp, 4, 1, 16, 2};
  const int bytes = (d.qk + d.v) * (dtype == DType::kFloat32 ? 4 : 2);
  if (bytes > 640) t.warps = 2;
  if (bytes > 1280) t.warps = 1;
  return t;
}

// What a kernel of the backward leaves: dK and dV together where their accumulators fit the
// registers, or one of them, or dQ.
enum class Gradient { kKeysValues, kKeys, kValues, kQueries };

// A backward kernel: a block owns 16 * warps rows of one side and streams tiles of the other.
struct BwdTile {
  DType dtype;
  int head_dim, v_head_dim;
  bool features;
  Gradient gradient;
  int warps, streamed, stages;
};

// Whether dK and dV have kernels of their own, which compute S twice: 16 rows of both need
// (Dqk + Dv) / 2 registers beside S, dP and, in fp32, the parts of split operands.
constexpr bool keys_and_values_apart(DType dtype, HeadDims d) {
  return d.qk + d.v > (dtype == DType::kFloat32 ? 192 : 256);
}

constexpr BwdTile bwd_tile(DType dtype, HeadDims d, bool features, Gradient gradient) {
  BwdTile t = {dtype, d.qk, d.v, features, gradient, 4, 64, 2};
  const int width = d.qk > d.v ? d.qk : d.v;
  if (dtype == DType::kFloat32) {
    // Two owned tiles and two stages of two streamed ones inside 99 KiB.
    t.streamed = width <= 64 ? 32 : 16;
    if (width > 128) t.warps = 2;
    if (width > 192) t.warps = 1;
    return t;
  }
  // S and dP take `streamed` registers together beside the accumulators.
  if (width > 64) t.streamed = 32;
  if (width > 192) t.streamed = 16;
  return t;
}

}  // namespace attnforge::cuda
