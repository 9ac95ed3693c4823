// Launchers of the flash kernels, of the sm_80 class unless they say so. They launch on the current
// device, allocate nothing, wait for nothing, and may be captured into a graph. They return a
// cudaError_t as int, or kNoKernel for head dims that no kernel has room for.
#pragma once

#include "attnforge/params.h"

namespace attnforge::cuda {

constexpr int kNoKernel = -1;

// Where states of several splits of the keys go: fp32, laid out like out and lse, a stride apart
// from split to split; data null for one split.
struct SplitParams {
  int64_t splits = 1;
  int64_t keys = 0;  // of a split, a multiple of every key tile; 0: equal splits
  TensorRef out;
  RowStatRef lse;
  int64_t out_stride = 0, lse_stride = 0;  // of splits
  bool by_sequence = false;                // rows of a varlen sequence count from its own first one
};

// Defined once per dtype. packed: heads of a KV head's group share tiles also where rows are many.
template <DType kDType>
int flash_fwd_rows(const FlashFwdParams& params, const SplitParams& splits, bool packed,
                   void* stream);
template <DType kDType>
int flash_decode(const FlashFwdParams& params, const SplitParams& splits, void* stream);

// The backward: delta first, then the others in any order.
template <DType kDType>
int flash_delta(const FlashBwdParams& params, void* stream);
template <DType kDType>
int flash_dkdv(const FlashBwdParams& params, void* stream);
template <DType kDType>
int flash_dq(const FlashBwdParams& params, void* stream);

#define ATTNFORGE_DECLARE_DTYPE(dtype)                                                      \
  template <>                                                                               \
  int flash_fwd_rows<DType::dtype>(const FlashFwdParams&, const SplitParams&, bool, void*); \
  template <>                                                                               \
  int flash_decode<DType::dtype>(const FlashFwdParams&, const SplitParams&, void*);         \
  template <>                                                                               \
  int flash_delta<DType::dtype>(const FlashBwdParams&, void*);                              \
  template <>                                                                               \
  int flash_dkdv<DType::dtype>(const FlashBwdParams&, void*);                               \
  template <>                                                                               \
  int flash_dq<DType::dtype>(const FlashBwdParams&, void*);
ATTNFORGE_DECLARE_DTYPE(kFloat32)
ATTNFORGE_DECLARE_DTYPE(kFloat16)
ATTNFORGE_DECLARE_DTYPE(kBFloat16)
#undef ATTNFORGE_DECLARE_DTYPE

// The forward for sm_90a, which is the architecture of its code, unlike the others'.
template <DType kDType>
int flash_fwd_sm90(const FlashFwdParams& params, void* stream);
template <>
int flash_fwd_sm90<DType::kFloat16>(const FlashFwdParams&, void*);
template <>
int flash_fwd_sm90<DType::kBFloat16>(const FlashFwdParams&, void*);

// The backward for sm_90a, after flash_delta: head dims up to 128.
template <DType kDType>
int flash_dkdv_sm90(const FlashBwdParams& params, void* stream);
template <DType kDType>
int flash_dq_sm90(const FlashBwdParams& params, void* stream);
template <>
int flash_dkdv_sm90<DType::kFloat16>(const FlashBwdParams&, void*);
template <>
int flash_dkdv_sm90<DType::kBFloat16>(const FlashBwdParams&, void*);
template <>
int flash_dq_sm90<DType::kFloat16>(const FlashBwdParams&, void*);
template <>
int flash_dq_sm90<DType::kBFloat16>(const FlashBwdParams&, void*);
// The forward of fp8 Q, K and V for sm_90a, with the problem's out_dtype and descales.
int flash_fwd_fp8_sm90(const FlashFwdParams& params, void* stream);

// The decode for sm_90a: any number of rows, 64 of a KV head's group to a tile.
template <DType kDType>
int flash_decode_sm90(const FlashFwdParams& params, const SplitParams& splits, void* stream);
template <>
int flash_decode_sm90<DType::kFloat16>(const FlashFwdParams&, const SplitParams&, void*);
template <>
int flash_decode_sm90<DType::kBFloat16>(const FlashFwdParams&, const SplitParams&, void*);

// fp32_parts: params.outs is fp32, else of params.dtype. inf_is_empty: a part of LSE +inf is
// nothing.
int flash_merge(const MergeParams& params, bool fp32_parts, bool inf_is_empty, void* stream);

// f.template operator()<kDType>() for the problem's dtype.
template <class F>
int with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f.template operator()<DType::kFloat32>();
    case DType::kFloat16:
      return f.template operator()<DType::kFloat16>();
    case DType::kBFloat16:
      return f.template operator()<DType::kBFloat16>();
  }
  return kNoKernel;
}

}  // namespace attnforge::cuda
