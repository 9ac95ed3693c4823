// The tiles of the decode for sm_90a: one constexpr function, the reason beside each number.
//
// A decode is bound by memory, so what counts is that loads are always in flight: as many stages as
// fit, and two blocks on a multiprocessor where rows are short, one loading while the other starts
// or ends. Tensor cores have time to spare (notes/hopper_flash.md). None of these numbers was tuned
// on a GPU.
#pragma once

#include "cuda/flash/sm90/tiles.h"

namespace attnforge::cuda {

// Head dims that are built; a call takes the first that has room. 96 would save no byte of a panel.
constexpr HeadDims kSm90DecodeDims[] = {{64, 64}, {128, 128}, {192, 128}, {256, 256}, {576, 512}};
constexpr int kNumSm90DecodeDims = 5;

constexpr int sm90_decode_dims_of(int64_t qk, int64_t v) {
  for (int i = 0; i < kNumSm90DecodeDims; ++i) {
    if (qk <= kSm90DecodeDims[i].qk && v <= kSm90DecodeDims[i].v) return i;
  }
  return -1;
}

struct Sm90DecodeTile {
  DType dtype;
  int head_dim, v_head_dim;  // what tiles are padded to
  bool latent;               // V is the first channels of K, which is loaded once
  int groups;                // consumer warpgroups: 64 rows each, channels of V dealt out
  int blocks;                // of a multiprocessor
  int block_n, stages;
  int producer_registers, consumer_registers;
};

constexpr int kSm90DecodeRows = 64;  // what wgmma multiplies

constexpr Sm90DecodeTile sm90_decode_tile(DType dtype, HeadDims d, bool latent) {
  Sm90DecodeTile t = {dtype, d.qk, d.v, latent, 1, 2, 64, 1, 24, 232};
  if (d.v > 128) {
    // O of 256 channels is 128 registers of a thread, as many as two blocks leave it, and of 512
    // more than there are: two groups have half of them each. Both compute the scores.
    t.groups = 2, t.blocks = 1, t.consumer_registers = 240;
  }
  if (d.v > 256 && !latent) t.block_n = 32;  // a stage of 64 keys would be 136 KiB
  // A multiprocessor has 228 KiB, of which each block costs 1 KiB more than it asks for. Panels of
  // 64 channels take 128 bytes of a row; 1 KiB is for barriers.
  const int most = (228 / t.blocks - 1) * 1024;
  const int q_row = (d.qk + 63) / 64 * 128, v_row = latent ? 0 : (d.v + 63) / 64 * 128;
  t.stages = (most - 1024 - kSm90DecodeRows * q_row) / (t.block_n * (q_row + v_row));
  return t;
}

}  // namespace attnforge::cuda
