// Parameters of block-sparse attention: those of flash, and which blocks of keys each row sees.
#pragma once

#include "attnforge/params.h"

namespace attnforge {

// For each list row (q_block consecutive queries of one sequence and one list head) the ids of the
// key blocks that it sees, local to the sequence. Ids outside [0, blocks of the sequence) are
// ignored wherever they stand, and duplicates count once.
struct SelectionRef {
  const int32_t* indices =
      nullptr;  // [batch | 1, heads, rows, slots]; varlen: rows packed, no batch
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
  const int32_t* counts = nullptr;  // [batch | 1, heads, rows] or null: slots past it are not read
  int64_t counts_batch = 0;
  int64_t counts_head = 0;
  int64_t heads = 1;  // 1, heads_k or heads_q of the problem
  int64_t rows = 0;
  int64_t slots = 0;
  int64_t q_block = 1;
  int64_t kv_block = 64;
};

struct BlockSparseFwdParams {
  FlashFwdParams flash;  // route, split_keys and tiles are not used
  SelectionRef selection;
};

struct BlockSparseBwdParams {
  FlashBwdParams flash;  // no gradients of mods
  SelectionRef selection;
};

}  // namespace attnforge
