// Parameters of block importance and of NSA's choice of blocks.
#pragma once

#include "attnforge/params.h"

namespace attnforge {

// Key i of the problem stands for tokens [i cmp_stride, i cmp_stride + cmp_block), block j for
// tokens [j slc_block, (j + 1) slc_block). A query sees the keys whose tokens all lie at or before
// its position.
struct NsaSelectParams {
  FlashProblem problem;  // no masks, no mods; v_head_dim is not used
  TensorRef q, k;
  RowStatRef lse;                      // of the attention to the compressed keys
  const int32_t* positions = nullptr;  // [batch | 1, seqlen_q], varlen [total_q]: among the tokens
  int64_t positions_batch = 0;
  int64_t cmp_block = 32;
  int64_t cmp_stride = 16;  // divides the blocks
  int64_t slc_block = 64;
  int64_t blocks = 0;           // of the longest sequence, or more
  float* importance = nullptr;  // [batch, heads_k, seqlen_q, blocks], varlen [heads_k, total_q, ..]
  int32_t* indices = nullptr;   // the same with top_n: ascending ids, then -1
  int64_t top_n = 0;
  int64_t init_blocks = 0;   // always chosen: the first,
  int64_t local_blocks = 0;  // and those up to the query's own
  void* workspace = nullptr;
};

// Attention to the compressed keys and the choice that follows from it: `select` with its lse as
// an output, and v_head_dim in use.
struct NsaAttendParams {
  NsaSelectParams select;
  TensorRef v, out;
};

// Branches of one layout mixed by gates, see cpu/nsa/combine.cpp.
struct CombineParams {
  static constexpr int64_t kMost = 8;
  DType dtype = DType::kFloat32;
  const void* x[kMost] = {};     // [rows, dim]
  const float* gates = nullptr;  // [rows, branches]
  void* out = nullptr;
  int64_t branches = 0, rows = 0, dim = 0;
};

}  // namespace attnforge
