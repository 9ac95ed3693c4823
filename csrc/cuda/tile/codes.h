// Codes of a KV cache to elements that tensor cores multiply: e4m3, int8 and int4 (less its centre
// 8) are exact in bf16, fp16 and fp32. Bits alone: sm_80 has no conversion from e4m3.
#pragma once

#include "attnforge/paged.h"
#include "cuda/tile/hidden.h"

namespace attnforge::cuda {

constexpr float kInt4Centre = 8.0f;  // what a loaded int4 value lacks to the stored code

AF_DEVICE float from_e4m3(uint32_t code) {
  const uint32_t size = code & 0x7fu;
  const float value = ptx::float_from_bits(size << 20 | (code & 0x80u) << 24) * 0x1p120f;
  return size == 0x7fu ? ptx::float_from_bits(0x7fc00000u) : value;
}
// Below 2^23 the low bits of a float are a whole number.
AF_DEVICE float from_int8(uint32_t code) {
  return ptx::float_from_bits(0x4b000000u | (code ^ 0x80u)) - 8388736.0f;
}
AF_DEVICE float from_int4(uint32_t code) {
  return ptx::float_from_bits(0x4b000000u | code) - (8388608.0f + kInt4Centre);
}

// Code n of a chunk of 16 bytes.
template <PageType kType>
AF_DEVICE float code_of(const ptx::U32x4& raw, int n) {
  if constexpr (kType == PageType::kInt4) {
    return from_int4(raw.v[n / 8] >> (n % 8 * 4) & 0xfu);
  } else {
    const uint32_t code = raw.v[n / 4] >> (n % 4 * 8) & 0xffu;
    return kType == PageType::kInt8 ? from_int8(code) : from_e4m3(code);
  }
}

// A chunk of elements from codes first .. of a raw one.
template <class T, PageType kType>
AF_DEVICE ptx::U32x4 decoded_chunk(const ptx::U32x4& raw, int first) {
  ptx::U32x4 chunk;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      chunk.v[i] = ptx::bits_of_float(code_of<kType>(raw, first + i));
    } else {
      chunk.v[i] =
          pack<T>(code_of<kType>(raw, first + 2 * i), code_of<kType>(raw, first + 2 * i + 1));
    }
  }
  return chunk;
}

// This thread's own chunks of a tile of codes that has landed for this thread, to their places in
// a tile of elements. tames: sets what is not finite to 0 there, and says whether there was any.
template <PageType kType, class Team, class Codes, class Tile>
AF_DEVICE bool decode_tile_chunks(const Codes& codes, const Tile& tile, bool tames AF_SITE) {
  using S = Share<Team, Codes>;
  using T = typename Tile::Element;
  constexpr int kMany = (kType == PageType::kInt4 ? 2 : 1) * static_cast<int>(sizeof(T));
  bool wild = false;
#pragma unroll 1
  for (int i = 0; i < S::kPasses * S::kSegments; ++i) {
    const int row = S::own_row() + i / S::kSegments * S::kPass;
    const int c = i % S::kSegments * S::kPeriod + S::own_chunk();
    if (!S::inside(row) || c * kMany >= Tile::kChunks) continue;
    const auto raw = ptx::load_shared<ptx::U32x4>(codes.chunk(row, c) AF_PASS_SITE);
#pragma unroll
    for (int n = 0; n < kMany; ++n) {
      auto chunk = decoded_chunk<T, kType>(raw, n * Tile::kPerChunk);
      if (tames) wild |= tame_chunk<T>(chunk);
      ptx::store_shared(tile.chunk(row, c * kMany + n), chunk AF_PASS_SITE);
    }
  }
  return wild;
}

}  // namespace attnforge::cuda
