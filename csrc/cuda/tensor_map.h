// Tensor maps: how TMA sees a tensor. Made on the host, passed as __grid_constant__, used by
// ptx/tma.h.
//
// A box of `box[rank - 1] x ... x box[0]` elements lies in shared memory row-major, innermost
// dimension 0, its 16-byte chunks permuted by the swizzle: of an address, bits 4..6 are xored with
// bits 7..9 (128 bytes; 64: bits 4..5 with 7..8; 32: bit 4 with 7). What is out of the tensor loads
// as zero and is not stored.
#pragma once

#include <cstdint>

#include "cuda/ptx/platform.h"

#if AF_EMULATE
#include <attnforge_emulate/launch.h>
#else
#include <cuda.h>
#include <cuda_runtime_api.h>
#endif

namespace attnforge::cuda {

struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

enum class TensorType : uint32_t { kByte, kF16, kBf16, kF32 };
enum class TensorSwizzle : uint32_t { kNone, k32, k64, k128 };

struct TensorShape {
  const void* base;    // 16-byte aligned
  uint32_t rank;       // 2..5
  uint64_t extent[5];  // elements, innermost first
  uint64_t stride[5];  // bytes; multiples of 16; stride[0] is the element and is not looked at
  uint32_t box[5];     // elements; at most 256, box[0] no wider than the swizzle
  TensorType type;
  TensorSwizzle swizzle;
};

constexpr uint32_t tensor_element_bytes(TensorType type) {
  return type == TensorType::kByte ? 1 : type == TensorType::kF32 ? 4 : 2;
}

// 0, or a CUresult: 1 for a shape that TMA cannot take. The emulator throws a sentence instead.
inline int make_tensor_map(TensorMap* map, const TensorShape& shape) {
#if AF_EMULATE
  emulate::encode_tensor_map(map->opaque,
                             {shape.base, shape.rank, shape.extent, shape.stride, shape.box,
                              tensor_element_bytes(shape.type), shape.type == TensorType::kF32,
                              static_cast<uint32_t>(shape.swizzle)});
  return 0;
#else
  // The driver's function is looked up through the runtime: nothing links to libcuda.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             12000, cudaEnableDefault, &result);
  if (error != cudaSuccess) return error;
  if (result != cudaDriverEntryPointSuccess) return CUDA_ERROR_NOT_FOUND;
  constexpr CUtensorMapDataType types[] = {
      CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
  constexpr CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                             CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  constexpr uint32_t unit[5] = {1, 1, 1, 1, 1};
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  return reinterpret_cast<Encode>(found)(
      reinterpret_cast<CUtensorMap*>(map), types[static_cast<uint32_t>(shape.type)], shape.rank,
      const_cast<void*>(shape.base), shape.extent, shape.stride + 1, shape.box, unit,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[static_cast<uint32_t>(shape.swizzle)],
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
#endif
}

}  // namespace attnforge::cuda
