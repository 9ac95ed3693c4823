// Launchers of the block-sparse kernels of the sm_80 class: as those of flash (flash/launch.h).
#pragma once

#include "cuda/flash/launch.h"

namespace attnforge::cuda {

// Ascending lists without repetitions, one per list row and head: ids [B | 1, H, rows, slots], and
// how many of a list's slots are used [B | 1, H, rows].
struct BlockListRef {
  const int32_t *ids = nullptr, *counts = nullptr;
  const int32_t* first = nullptr;  // [batch + 1]: where rows of packed sequences begin; or null
  int64_t batch = 0, head = 0;     // lists from entry to entry and head to head; 0 broadcasts
  int64_t rows = 0, slots = 0;
  int64_t q_block = 1, kv_block = 1;
  int64_t pack = 1;  // query heads that share a list and a KV head
};

// For each block of keys the list rows that name it: rows[starts[j]] .. rows[starts[j + 1] - 1],
// ascending and counted from the first one of their sequence.
struct InverseRef {
  const int32_t *rows = nullptr, *starts = nullptr;  // [B | 1, H, entries], [B | 1, H, blocks + 1]
  int64_t batch = 0, head = 0;                       // lists, as above
  int64_t entries = 0, blocks = 0;  // blocks: of all sequences together where they are packed
  int64_t each = 0;                 // blocks from sequence to sequence, 0 where not packed
};

// Defined once per dtype.
template <DType kDType>
int block_sparse_fwd(const FlashFwdParams& params, const BlockListRef& lists, void* stream);
template <DType kDType>
int block_sparse_dq(const FlashBwdParams& params, const BlockListRef& lists, void* stream);
template <DType kDType>
int block_sparse_dkdv(const FlashBwdParams& params, const BlockListRef& lists,
                      const InverseRef& inverse, void* stream);

#define ATTNFORGE_DECLARE_DTYPE(dtype)                                                   \
  template <>                                                                            \
  int block_sparse_fwd<DType::dtype>(const FlashFwdParams&, const BlockListRef&, void*); \
  template <>                                                                            \
  int block_sparse_dq<DType::dtype>(const FlashBwdParams&, const BlockListRef&, void*);  \
  template <>                                                                            \
  int block_sparse_dkdv<DType::dtype>(const FlashBwdParams&, const BlockListRef&,        \
                                      const InverseRef&, void*);
ATTNFORGE_DECLARE_DTYPE(kFloat32)
ATTNFORGE_DECLARE_DTYPE(kFloat16)
ATTNFORGE_DECLARE_DTYPE(kBFloat16)
#undef ATTNFORGE_DECLARE_DTYPE

}  // namespace attnforge::cuda
