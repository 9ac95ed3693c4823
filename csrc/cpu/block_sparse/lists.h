// Block lists as kernels walk them: which list row a query has, and the inverse of a range of list
// rows, for each key block the list rows that name it. Lists are data: ids are checked, repeated
// ones dropped.
#pragma once

#include "attnforge/block_sparse.h"
#include "cpu/flash/problem.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// The lists of one sequence.
struct Lists {
  const SelectionRef& selection;
  int64_t batch;   // 0 where sequences share lists, or are packed
  int64_t row0;    // of the sequence's first list row
  int64_t rows;    // list rows of the sequence
  int64_t blocks;  // key blocks of the sequence
};

// Packed sequences start a list row each: those of the sequences before this one come first.
AF_INLINE Lists lists_of(const FlashProblem& p, const SelectionRef& selection,
                         const Sequence& seq) {
  Lists l = {selection, p.cu_seqlens_q ? 0 : seq.batch, 0, ceil_div(seq.q_len, selection.q_block),
             ceil_div(seq.k_len, selection.kv_block)};
  for (int64_t b = 0; p.cu_seqlens_q && b < seq.batch; ++b) {
    l.row0 += ceil_div(sequence(p, b).q_len, selection.q_block);
  }
  l.rows = max64(0, min64(l.rows, selection.rows - l.row0));
  return l;
}

// Calls f(id) for each valid entry of a list row, in the order of the list.
template <class F>
AF_INLINE void for_ids(const Lists& l, int64_t head, int64_t row, const F& f) {
  const SelectionRef& s = l.selection;
  const int64_t at = l.row0 + row;
  const int32_t* ids =
      s.indices + l.batch * s.batch_stride + head * s.head_stride + at * s.row_stride;
  int64_t slots = s.slots;
  if (s.counts) {
    slots = max64(0, min64(slots, s.counts[l.batch * s.counts_batch + head * s.counts_head + at]));
  }
  for (int64_t n = 0; n < slots; ++n) {
    if (ids[n] >= 0 && ids[n] < l.blocks) f(static_cast<int64_t>(ids[n]));
  }
}

// start[j] .. start[j + 1]: list rows of block j in `items`, ascending, each once.
struct Inverse {
  int32_t* start;  // [blocks + 1]
  int32_t* last;   // [blocks] scratch
  int32_t* items;  // [list rows * slots]
};

AF_INLINE Inverse take_inverse(Arena& a, int64_t blocks, int64_t rows, int64_t slots) {
  Inverse inverse;
  inverse.start = a.take<int32_t>(blocks + 1);
  inverse.last = a.take<int32_t>(blocks);
  inverse.items = a.take<int32_t>(rows * slots);
  return inverse;
}

// Of list rows [row0, row1): a counting sort by block.
AF_INLINE void invert(const Lists& l, int64_t head, int64_t row0, int64_t row1, const Inverse& v) {
  for (int64_t j = 0; j < l.blocks; ++j) v.start[j] = 0, v.last[j] = -1;
  v.start[l.blocks] = 0;
  auto for_entries = [&](const auto& f) __attribute__((always_inline)) {
    for (int64_t row = row0; row < row1; ++row) {
      for_ids(l, head, row, [&](int64_t id) __attribute__((always_inline)) {
        if (v.last[id] == row) return;
        v.last[id] = static_cast<int32_t>(row);
        f(row, id);
      });
    }
  };
  for_entries([&](int64_t, int64_t id) { ++v.start[id + 1]; });
  for (int64_t j = 0; j < l.blocks; ++j) v.start[j + 1] += v.start[j], v.last[j] = -1;
  // Filling moves each start to its end, which is the next one's start: shift them back after.
  for_entries([&](int64_t row, int64_t id) { v.items[v.start[id]++] = static_cast<int32_t>(row); });
  for (int64_t j = l.blocks; j > 0; --j) v.start[j] = v.start[j - 1];
  v.start[0] = 0;
}

// Query heads that share a list and a KV head, as one unit of work.
struct Units {
  int64_t count;  // per sequence
  int64_t heads;  // query heads of one

  AF_INLINE_MEMBER int64_t list_head(const SelectionRef& s, int64_t unit) const {
    return s.heads == 1 ? 0 : unit;
  }
};

AF_INLINE Units units_of(const FlashProblem& p, const SelectionRef& s) {
  const int64_t count = s.heads == p.heads_q ? p.heads_q : p.heads_k;
  return {count, p.heads_q / count};
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
