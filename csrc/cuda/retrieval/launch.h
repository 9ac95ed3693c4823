// Launchers of the retrieval kernels of the sm_80 class: as those of flash (flash/launch.h).
#pragma once

#include "attnforge/retrieval.h"
#include "cuda/flash/launch.h"

namespace attnforge::cuda {

// What single entries of lists add to gradients, fp32 [batch, row heads, slots, ..]: a row head has
// a list, be it of a query head or of a KV head.
struct EntryGrads {
  float *k = nullptr, *v = nullptr;
  float* bias = nullptr;  // null without a bias
};

// For each key the entries of its KV head that name it, ascending: entries[starts[j]] ..
struct NamedRef {
  const int32_t *entries = nullptr, *starts = nullptr;  // [batch, heads, ..]
  int64_t heads = 1;                                    // the KV heads, or 1 for all of them
};

// Defined once per dtype. splits.keys: entries of a split, a multiple of every key tile; a list
// that is longer than splits.splits of those has longer ones.
template <DType kDType>
int indexed_fwd(const IndexedFwdParams& params, const SplitParams& splits, void* stream);
// The backward, after flash_delta: dQ; what entries add; and their sums.
template <DType kDType>
int indexed_dq(const IndexedBwdParams& params, void* stream);
template <DType kDType>
int indexed_dkdv(const IndexedBwdParams& params, const EntryGrads& grads, void* stream);
int indexed_sum(const IndexedBwdParams& params, const EntryGrads& grads, const NamedRef& named,
                void* stream);

// Scores; shares divides finished rows by the sum of counts.
template <DType kDType>
int key_scores(const KeyScoresParams& params, void* stream);
int shares(const KeyScoresParams& params, void* stream);
int page_scores(const PageScoresParams& params, void* stream);

int select_columns(const SelectParams& params, void* stream);

int lsh_encode(const LshEncodeParams& params, void* stream);
// New keys go in behind the others, at most kInsertRows of the rows from `begin` on.
constexpr int64_t kInsertRows = 32768;
int lsh_insert(const LshInsertParams& params, int64_t begin, void* stream);
int lsh_truncate(const LshTruncateParams& params, void* stream);
// The workspace of lsh_retrieve: a bit per key of a segment, and how many are set.
struct LshHits {
  uint32_t* bits = nullptr;   // [batch, heads_q, segments, words]
  int32_t* counts = nullptr;  // [batch, heads_q, segments]
};
int lsh_collect(const LshRetrieveParams& params, const LshHits& hits, void* stream);
int lsh_weigh(const LshRetrieveParams& params, void* stream);

#define ATTNFORGE_DECLARE_DTYPE(dtype)                                               \
  template <>                                                                        \
  int indexed_fwd<DType::dtype>(const IndexedFwdParams&, const SplitParams&, void*); \
  template <>                                                                        \
  int indexed_dq<DType::dtype>(const IndexedBwdParams&, void*);                      \
  template <>                                                                        \
  int indexed_dkdv<DType::dtype>(const IndexedBwdParams&, const EntryGrads&, void*); \
  template <>                                                                        \
  int key_scores<DType::dtype>(const KeyScoresParams&, void*);
ATTNFORGE_DECLARE_DTYPE(kFloat32)
ATTNFORGE_DECLARE_DTYPE(kFloat16)
ATTNFORGE_DECLARE_DTYPE(kBFloat16)
#undef ATTNFORGE_DECLARE_DTYPE

}  // namespace attnforge::cuda
