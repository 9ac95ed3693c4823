// Where a sequence lies and which tiles see each other: the one copy of that arithmetic on this
// floor. Loaders, products and schedulers all ask here. Index tensors are data: every value is
// clamped to the memory that exists.
//
// Positions are 32-bit (a sequence has less than 2^29 rows or keys), offsets into tensors 64-bit.
#pragma once

#include "cuda/ptx/platform.h"

#include "attnforge/params.h"

namespace attnforge::cuda {

constexpr int kFar = 1 << 29;  // a window at or past it is as wide as any sequence

template <class N>
AF_DEVICE N at_most(N a, N b) {
  return a < b ? a : b;
}
template <class N>
AF_DEVICE N at_least(N a, N b) {
  return a > b ? a : b;
}
AF_DEVICE int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

struct Sequence {
  int batch;
  int64_t q_row, k_row;  // first rows in memory (varlen)
  int q_len, k_len;
  int k_slots;  // key rows that exist in memory, k_len of them in use
  AF_DEVICE int offset() const { return k_len - q_len; }  // query i stands at position i + offset
};

// kv_head: lengths in use may differ from head to head.
AF_DEVICE Sequence sequence(const FlashProblem& p, int batch, int kv_head = 0) {
  Sequence s = {batch, 0, 0, static_cast<int>(p.seqlen_q), static_cast<int>(p.seqlen_k), 0};
  if (p.cu_seqlens_q != nullptr) {
    s.q_row = at_least<int64_t>(0, at_most<int64_t>(p.cu_seqlens_q[batch], p.total_q));
    const int64_t end = at_most<int64_t>(p.cu_seqlens_q[batch + 1], p.total_q);
    s.q_len = static_cast<int>(at_least<int64_t>(0, at_most(end - s.q_row, p.seqlen_q)));
  }
  if (p.cu_seqlens_k != nullptr) {
    s.k_row = at_least<int64_t>(0, at_most<int64_t>(p.cu_seqlens_k[batch], p.total_k));
    const int64_t end = at_most<int64_t>(p.cu_seqlens_k[batch + 1], p.total_k);
    s.k_len = static_cast<int>(at_least<int64_t>(0, at_most(end - s.k_row, p.seqlen_k)));
  }
  s.k_slots = s.k_len;
  if (p.seqused_k != nullptr) {
    const int used = p.seqused_k[batch * p.seqused_batch + kv_head * p.seqused_head];
    s.k_len = at_least(0, at_most(used, s.k_len));
  }
  return s;
}

// What a position sees of the other side: from `back` before to `ahead` after its own place.
struct Window {
  int back, ahead;
};

// [lo, hi) covers what any position of a tile sees, in tiles of a block size from lo on, which is a
// multiple of it. Tiles inside [whole_lo, whole_hi) are seen whole by every position.
struct TileRange {
  int lo, whole_lo, whole_hi, hi;

  AF_DEVICE int tiles(int block) const { return ceil_div(hi - lo, block); }
  AF_DEVICE bool whole(int first, int block) const {
    return first >= whole_lo && first + block <= whole_hi;
  }
  // The part inside [begin, end); begin is a multiple of the block size.
  AF_DEVICE TileRange within(int begin, int end) const {
    const int from = at_least(lo, begin), to = at_least(at_most(hi, end), from);
    return {from, at_most(at_least(whole_lo, from), to), at_most(whole_hi, to), to};
  }
};

// Of positions first .. last (one tile), which stand `shift` further on the other side, that has
// `count` positions. Keys of rows: shift = offset; rows of keys: shift = -offset.
AF_DEVICE TileRange seen_range(int first, int last, int count, int shift, Window w, int block) {
  TileRange r;
  r.lo = at_least(first + shift - w.back, 0) / block * block;
  r.hi = at_least(at_most(last + shift + w.ahead + 1, count), r.lo);
  r.whole_lo = at_least(last + shift - w.back, 0);
  r.whole_hi = at_most(first + shift + w.ahead + 1, count);
  return r;
}

// Whether the position that stands at `at` on the other side sees `other` there.
AF_DEVICE bool sees(int at, int other, int count, Window w) {
  return other >= at - w.back && other <= at + w.ahead && other < count;
}

template <class T>
AF_DEVICE T* row_ptr(const TensorRef& t, int batch, int64_t row, int head) {
  return static_cast<T*>(t.data) + batch * t.batch_stride + row * t.seq_stride +
         head * t.head_stride;
}

AF_DEVICE float* stat_ptr(const RowStatRef& t, int batch, int64_t row, int head) {
  return t.data + batch * t.batch_stride + head * t.head_stride + row;
}

}  // namespace attnforge::cuda
