// Split-KV plan of a batch: pieces of keys of nearly equal length for a fixed number of workers,
// merged per sequence afterwards. Made once per step from the lengths alone, run by every layer.
//
// The table has the size of the largest batch from the start and never moves: a captured CUDA graph
// keeps its address and replays with what the next plan writes there. Unused pieces say
// sequence -1. A sequence without keys has no piece.
//
// Pieces end at page ends. Their size is the smallest that yields at most `max_pieces` pieces
// (every worker busy, no second wave for a short rest), or `fixed`: then a sequence is always cut
// in the same way, whatever runs beside it, and results do not depend on the batch.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace attnforge::host {

class SplitPlan {
 public:
  SplitPlan(int64_t max_batch, int64_t max_pieces, int64_t page_size);

  // lengths [batch <= max_batch] in tokens; fixed: tokens per piece, or 0 for the balanced size.
  void plan(std::span<const int64_t> lengths, int64_t fixed);

  // One block, so that one copy takes a plan to a device: sequence, begin and end of each piece
  // [3, max_pieces], then the first piece of each sequence [max_batch + 1]; begin and end in
  // tokens.
  std::span<int32_t> table() { return table_; }
  int64_t piece() const { return piece_; }  // tokens per piece

 private:
  int64_t max_batch_, max_pieces_, page_size_, piece_ = 0;
  std::vector<int32_t> table_;
};

}  // namespace attnforge::host
