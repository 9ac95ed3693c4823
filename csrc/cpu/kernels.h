// The CPU function table: every ISA level fills one; dispatch.cpp chooses. A kernel is one line of
// one of the two lists.
#pragma once

#include "attnforge/block_sparse.h"
#include "attnforge/cope.h"
#include "attnforge/delta.h"
#include "attnforge/linear.h"
#include "attnforge/nsa.h"
#include "attnforge/paged.h"
#include "attnforge/params.h"
#include "attnforge/retrieval.h"

namespace attnforge::cpu {

// Kernels with a workspace, whose size is a function of shapes and thread count alone:
// X(name, params struct).
#define ATTNFORGE_SIZED_KERNELS(X)          \
  X(flash_fwd, FlashFwdParams)              \
  X(flash_decode, FlashFwdParams)           \
  X(flash_bwd, FlashBwdParams)              \
  X(column_sums, ColumnSumsParams)          \
  X(span_mass, SpanMassParams)              \
  X(span_grad, SpanGradParams)              \
  X(block_max, BlockMaxParams)              \
  X(row_entropy, RowEntropyParams)          \
  X(topk_keys, TopKParams)                  \
  X(edges, EdgesParams)                     \
  X(cope_fwd, CopeFwdParams)                \
  X(cope_bwd, CopeBwdParams)                \
  X(block_sparse_fwd, BlockSparseFwdParams) \
  X(block_sparse_bwd, BlockSparseBwdParams) \
  X(nsa_select, NsaSelectParams)            \
  X(nsa_attend, NsaAttendParams)            \
  X(paged_decode, PagedFwdParams)           \
  X(paged_middle, PagedFwdParams)           \
  X(paged_prefill, PagedFwdParams)          \
  X(linear_chunk_fwd, LinearFwdParams)      \
  X(linear_chunk_bwd, LinearBwdParams)      \
  X(delta_chunk_fwd, DeltaChunkFwdParams)   \
  X(delta_chunk_bwd, DeltaChunkBwdParams)   \
  X(diag_scan_bwd, DiagScanParams)          \
  X(indexed_fwd, IndexedFwdParams)          \
  X(indexed_bwd, IndexedBwdParams)          \
  X(lsh_encode, LshEncodeParams)            \
  X(lsh_retrieve, LshRetrieveParams)        \
  X(lsh_attend, LshAttendParams)            \
  X(page_scores, PageScoresParams)          \
  X(nearest, NearestParams)

// Kernels without one.
#define ATTNFORGE_PLAIN_KERNELS(X)     \
  X(merge_states, MergeParams)         \
  X(combine, CombineParams)            \
  X(head_gradient, HeadGradientParams) \
  X(paged_append, PagedAppendParams)   \
  X(linear_step, LinearStepParams)     \
  X(delta_step, DeltaStepParams)       \
  X(diag_scan_fwd, DiagScanParams)     \
  X(key_scores, KeyScoresParams)       \
  X(select_columns, SelectParams)      \
  X(expand_runs, ExpandRunsParams)     \
  X(cluster_sums, ClusterSumsParams)   \
  X(lsh_insert, LshInsertParams)       \
  X(lsh_truncate, LshTruncateParams)

struct KernelTable {
  const char* isa;
#define X(NAME, PARAMS)                                            \
  int64_t (*NAME##_workspace)(const PARAMS&, int64_t num_threads); \
  void (*NAME)(const PARAMS&, const Workers&);
  ATTNFORGE_SIZED_KERNELS(X)
#undef X
#define X(NAME, PARAMS) void (*NAME)(const PARAMS&, const Workers&);
  ATTNFORGE_PLAIN_KERNELS(X)
#undef X
  double (*probe_fma)(const Workers&, int64_t iterations);              // flops done
  void (*probe_read)(const Workers&, const void* data, int64_t bytes);  // streams the buffer
};

#define ATTNFORGE_DECLARE_SIZED(NAME, PARAMS)                   \
  int64_t NAME##_workspace(const PARAMS&, int64_t num_threads); \
  void NAME(const PARAMS&, const Workers&);
#define ATTNFORGE_DECLARE_PLAIN(NAME, PARAMS) void NAME(const PARAMS&, const Workers&);

// Declares the functions that one ISA level defines; each lives in namespace attnforge::cpu::<isa>.
#define ATTNFORGE_DECLARE_ISA(ISA)                                  \
  namespace ISA {                                                   \
  ATTNFORGE_SIZED_KERNELS(ATTNFORGE_DECLARE_SIZED)                  \
  ATTNFORGE_PLAIN_KERNELS(ATTNFORGE_DECLARE_PLAIN)                  \
  double probe_fma(const Workers&, int64_t iterations);             \
  void probe_read(const Workers&, const void* data, int64_t bytes); \
  }

const KernelTable& kernels();       // the level in force
const char* isa_levels();           // comma list of those that can run here
bool select_isa(const char* name);  // "auto" or a level; false: unknown or not runnable here

}  // namespace attnforge::cpu
