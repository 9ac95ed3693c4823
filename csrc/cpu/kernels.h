// The CPU function table: every ISA level fills one; dispatch.cpp chooses.
#pragma once

#include "attnforge/delta.h"
#include "attnforge/linear.h"
#include "attnforge/params.h"

namespace attnforge::cpu {

// Reductions over P = exp(S - LSE): X(name, params struct).
#define ATTNFORGE_REDUCTIONS(X)    \
  X(column_sums, ColumnSumsParams) \
  X(span_mass, SpanMassParams)     \
  X(span_grad, SpanGradParams)     \
  X(block_max, BlockMaxParams)     \
  X(row_entropy, RowEntropyParams) \
  X(topk_keys, TopKParams)         \
  X(edges, EdgesParams)

// Additive recurrence: X(name, params struct).
#define ATTNFORGE_LINEAR(X)            \
  X(linear_chunk_fwd, LinearFwdParams) \
  X(linear_chunk_bwd, LinearBwdParams)

// The delta rules and the diagonal scan.
#define ATTNFORGE_DELTA(X)                \
  X(delta_chunk_fwd, DeltaChunkFwdParams) \
  X(delta_chunk_bwd, DeltaChunkBwdParams) \
  X(diag_scan_bwd, DiagScanParams)

struct KernelTable {
  const char* isa;
  // Workspace sizes are functions of shapes and thread count alone.
  int64_t (*flash_fwd_workspace)(const FlashFwdParams&, int64_t num_threads);
  void (*flash_fwd)(const FlashFwdParams&, const Workers&);
  int64_t (*flash_decode_workspace)(const FlashFwdParams&, int64_t num_threads);
  void (*flash_decode)(const FlashFwdParams&, const Workers&);
  int64_t (*flash_bwd_workspace)(const FlashBwdParams&, int64_t num_threads);
  void (*flash_bwd)(const FlashBwdParams&, const Workers&);
  void (*merge_states)(const MergeParams&, const Workers&);
#define X(NAME, PARAMS)                                            \
  int64_t (*NAME##_workspace)(const PARAMS&, int64_t num_threads); \
  void (*NAME)(const PARAMS&, const Workers&);
  ATTNFORGE_REDUCTIONS(X)
  ATTNFORGE_LINEAR(X)
  ATTNFORGE_DELTA(X)
#undef X
  void (*delta_step)(const DeltaStepParams&, const Workers&);
  void (*diag_scan_fwd)(const DiagScanParams&, const Workers&);
  void (*linear_step)(const LinearStepParams&, const Workers&);
  void (*head_gradient)(const HeadGradientParams&, const Workers&);
  double (*probe_fma)(const Workers&, int64_t iterations);              // flops done
  void (*probe_read)(const Workers&, const void* data, int64_t bytes);  // streams the buffer
};

#define ATTNFORGE_DECLARE_KERNEL(NAME, PARAMS)                  \
  int64_t NAME##_workspace(const PARAMS&, int64_t num_threads); \
  void NAME(const PARAMS&, const Workers&);

// Declares the functions that one ISA level defines; each lives in namespace attnforge::cpu::<isa>.
#define ATTNFORGE_DECLARE_ISA(ISA)                                            \
  namespace ISA {                                                             \
  int64_t flash_fwd_workspace(const FlashFwdParams&, int64_t num_threads);    \
  void flash_fwd(const FlashFwdParams&, const Workers&);                      \
  int64_t flash_decode_workspace(const FlashFwdParams&, int64_t num_threads); \
  void flash_decode(const FlashFwdParams&, const Workers&);                   \
  int64_t flash_bwd_workspace(const FlashBwdParams&, int64_t num_threads);    \
  void flash_bwd(const FlashBwdParams&, const Workers&);                      \
  void merge_states(const MergeParams&, const Workers&);                      \
  ATTNFORGE_REDUCTIONS(ATTNFORGE_DECLARE_KERNEL)                              \
  ATTNFORGE_LINEAR(ATTNFORGE_DECLARE_KERNEL)                                  \
  ATTNFORGE_DELTA(ATTNFORGE_DECLARE_KERNEL)                                   \
  void delta_step(const DeltaStepParams&, const Workers&);                    \
  void diag_scan_fwd(const DiagScanParams&, const Workers&);                  \
  void linear_step(const LinearStepParams&, const Workers&);                  \
  void head_gradient(const HeadGradientParams&, const Workers&);              \
  double probe_fma(const Workers&, int64_t iterations);                       \
  void probe_read(const Workers&, const void* data, int64_t bytes);           \
  }

const KernelTable& kernels();       // the level in force
const char* isa_levels();           // comma list of those that can run here
bool select_isa(const char* name);  // "auto" or a level; false: unknown or not runnable here

}  // namespace attnforge::cpu
