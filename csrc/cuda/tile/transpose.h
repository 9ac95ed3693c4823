// Transposition of e4m3 tiles, for sm_90a: V [keys, channels] as TMA leaves it becomes the right
// operand of P V, whose wgmma reads bytes with keys along rows only.
//
// ldmatrix transposes pairs of bytes, so a register holds two channels of two keys; prmt sorts the
// channels of two registers apart, and stmatrix writes them. What falls out of that costs nothing
// to undo, and no write conflicts in banks:
//
//   keys      position 4 t + i of 16 is key 2 t + i % 2 + 8 (i / 2), t = 0..3: the keys whose
//             scores a lane of a quad holds together, so P needs no shuffle (pack_weights_e4m3)
//   channels  row r of 16 is channel 2 (r % 8) + r / 8: a lane of a quad then holds the four
//             channels from 4 t on of its rows of O, in two fragments (e4m3_channel)
#pragma once

#include "cuda/ptx/ldmatrix.h"
#include "cuda/tile/panel_tile.h"
#include "cuda/tile/product.h"

namespace attnforge::cuda {

// The channel that row r of a transposed tile holds.
AF_DEVICE int e4m3_channel(int r) {
  return r / 16 * 16 + r % 8 * 2 + r % 16 / 8;
}

// By `warps` warps, of which this is number `warp`: to is [channels, keys]. Reads and writes are
// the generic proxy's: a fence and a barrier stand between this and wgmma.
template <class From, class To>
AF_DEVICE void transpose_bytes(const From& from, const To& to, int warp, int warps AF_SITE) {
  static_assert(From::kSize == 1 && To::kSize == 1);
  static_assert(From::kRows == To::kDim && From::kDim == To::kRows && From::kRows % 32 == 0);
  constexpr int kBlocks = From::kRows / 32;  // of 32 keys by 16 channels
  const int lane = static_cast<int>(ptx::lane_id());
  for (int n = warp; n < kBlocks * (From::kDim / 16); n += warps) {
    const int keys = n % kBlocks * 32, channels = n / kBlocks * 16;
    uint32_t r[4];
    ptx::ldmatrix_x4_trans(r, from.chunk(keys + lane, channels / 16) AF_PASS_SITE);
    const uint32_t sorted[4] = {
        ptx::permute_bytes(r[0], r[1], 0x6420), ptx::permute_bytes(r[0], r[1], 0x7531),
        ptx::permute_bytes(r[2], r[3], 0x6420), ptx::permute_bytes(r[2], r[3], 0x7531)};
    ptx::stmatrix_x4(to.chunk(channels + lane % 16, keys / 16 + lane / 16), sorted AF_PASS_SITE);
  }
}

// Weights as the left operand of the second product: kK keys, four elements in a register, each
// weight times 2^8 as the sum of two e4m3 numbers.
template <int kK>
struct WeightsE4m3 {
  uint32_t high[kK / 32][4], low[kK / 32][4];
};

// Two terms hold a weight to 2^-8 of itself, as bf16 does, down to 2^-10 of a row's largest; below,
// to 2^-18 of that. One term alone would be off by 2^-4.
constexpr float kE4m3Scale = 256.0f;

template <int kK>
AF_DEVICE void pack_weights_e4m3(WeightsE4m3<kK>& p, const Accumulators<1, kK / 8>& s) {
  constexpr uint32_t kScale2 = 0x5c005c00u, kMinusOne2 = 0xbc00bc00u, kMinusZero2 = 0x80008000u;
#pragma unroll
  for (int k = 0; k < kK / 32; ++k) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      uint32_t high[2], low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float (&c)[4] = s[0][4 * k + r / 2 * 2 + i];
        const uint32_t whole =
            ptx::fma_f16x2(ptx::pack_f16x2(c[r % 2 * 2], c[r % 2 * 2 + 1]), kScale2, kMinusZero2);
        high[i] = ptx::e4m3x2_from_f16x2(whole);
        const uint32_t kept = ptx::f16x2_from_e4m3x2(static_cast<uint16_t>(high[i]));
        low[i] = ptx::e4m3x2_from_f16x2(ptx::fma_f16x2(kept, kMinusOne2, whole));
      }
      p.high[k][r] = high[0] | high[1] << 16;
      p.low[k][r] = low[0] | low[1] << 16;
    }
  }
}

}  // namespace attnforge::cuda
