// Launchers of the paged kernels of the sm_80 class: as those of flash (flash/launch.h).
#pragma once

#include "attnforge/paged.h"
#include "attnforge/pieces.h"
#include "cuda/flash/launch.h"

namespace attnforge::cuda {

// Which sequences a launch serves: those of (above, most] rows per KV head.
struct RowRange {
  int64_t above, most;
};
constexpr int64_t kDecodeMost = 16;  // a tile of the decode kernel

// Defined once per dtype. With pieces, as many as there are splits, sinks wait for paged_combine.
// Up to kDecodeMost rows take the decode kernel, more the forward; packed (heads of a group share
// tiles) where keys are split. Head dims 576 and 512, with V in the first channels of K: latent
// attention, for any number of rows, in 16 bits.
template <DType kDType>
int paged_decode(const PagedFwdParams& params, const SplitParams& splits, const Pieces& pieces,
                 RowRange rows, void* stream);
template <DType kDType>
int paged_prefill(const PagedFwdParams& params, const SplitParams& splits, const Pieces& pieces,
                  RowRange rows, void* stream);
template <DType kDType>
int paged_latent(const PagedFwdParams& params, const SplitParams& splits, const Pieces& pieces,
                 RowRange rows, void* stream);

#define ATTNFORGE_DECLARE_DTYPE(dtype)                                                      \
  template <>                                                                               \
  int paged_decode<DType::dtype>(const PagedFwdParams&, const SplitParams&, const Pieces&,  \
                                 RowRange, void*);                                          \
  template <>                                                                               \
  int paged_prefill<DType::dtype>(const PagedFwdParams&, const SplitParams&, const Pieces&, \
                                  RowRange, void*);                                         \
  template <>                                                                               \
  int paged_latent<DType::dtype>(const PagedFwdParams&, const SplitParams&, const Pieces&,  \
                                 RowRange, void*);
ATTNFORGE_DECLARE_DTYPE(kFloat32)
ATTNFORGE_DECLARE_DTYPE(kFloat16)
ATTNFORGE_DECLARE_DTYPE(kBFloat16)
#undef ATTNFORGE_DECLARE_DTYPE

// Adds up the splits, or the pieces and sinks, of the sequences in range. Parts lie by sequence or
// by piece, part_rows rows of each.
int paged_combine(const PagedFwdParams& params, const SplitParams& splits, const Pieces& pieces,
                  RowRange rows, int64_t part_rows, void* stream);

int paged_append(const PagedAppendParams& params, void* stream);

}  // namespace attnforge::cuda
