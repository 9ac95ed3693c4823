// Parameter structs of contextual position encoding (CoPE); conventions as in params.h.
#pragma once

#include "attnforge/params.h"

namespace attnforge {

// Embeddings of positions 0 .. positions - 1: fp32 [heads|1, head_dim, padded], zeros behind them.
// padded is a multiple of kCopePadding.
struct CopeTable {
  const float* data = nullptr;
  int64_t heads = 1;
  int64_t positions = 1;
  int64_t padded = 0;
};
constexpr int64_t kCopePadding = 32;

// problem: windows, packed and used keys, and the scale; none of its mods, sinks, ALiBi, softcap.
struct CopeFwdParams {
  FlashProblem problem;
  CopeTable table;
  TensorRef q, k, v, out;
  TensorRef out_lo;  // data null: not wanted
  RowStatRef lse;
  void* workspace = nullptr;
};

struct CopeBwdParams {
  FlashProblem problem;
  CopeTable table;
  TensorRef dout, q, k, v, out, out_lo;
  TensorRef dq, dk, dv;
  RowStatRef lse;
  RowStatRef dlse;          // data null: the loss does not use the LSE
  float* dtable = nullptr;  // [batch, heads_q, chunks, padded, head_dim], zeroed by the caller
  int64_t chunks = 1;       // parts that the query tiles of a (batch, kv head) are dealt to
  void* workspace = nullptr;
};

}  // namespace attnforge
