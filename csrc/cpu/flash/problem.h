// Where a sequence lies and what each of its queries may see: the one copy of that arithmetic, used
// by forward, backward and decode. Index tensors are data: every value is clamped to the memory
// that exists.
#pragma once

#include "cpu/micro/gemm.h"
#include "cpu/simd/float8.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

struct Sequence {
  int64_t batch;
  int64_t q_row, q_len;  // first row in memory (varlen) and number of queries
  int64_t k_row, k_len;
  int64_t k_rows;  // key rows that exist in memory, k_len of them in use
  int64_t offset;  // query i stands at key position i + offset (bottom-right alignment)
};

// kv_head matters where heads have lengths of their own.
AF_INLINE Sequence sequence(const FlashProblem& p, int64_t batch, int64_t kv_head = 0) {
  Sequence s = {batch, 0, p.seqlen_q, 0, p.seqlen_k, p.seqlen_k, 0};
  if (p.cu_seqlens_q) {
    s.q_row = max64(0, min64(p.cu_seqlens_q[batch], p.total_q));
    int64_t end = max64(s.q_row, min64(p.cu_seqlens_q[batch + 1], p.total_q));
    s.q_len = min64(end - s.q_row, p.seqlen_q);
  }
  if (p.cu_seqlens_k) {
    s.k_row = max64(0, min64(p.cu_seqlens_k[batch], p.total_k));
    int64_t end = max64(s.k_row, min64(p.cu_seqlens_k[batch + 1], p.total_k));
    s.k_len = min64(end - s.k_row, p.seqlen_k);
  }
  s.k_rows = s.k_len;
  if (p.seqused_k) {
    const int32_t used = p.seqused_k[batch * p.seqused_batch + kv_head * p.seqused_head];
    s.k_len = max64(0, min64(used, s.k_len));
  }
  s.offset = s.k_len - s.q_len;
  return s;
}

struct Interval {
  int64_t lo, hi;  // [lo, hi); empty has lo == hi
};

// Keys of which query i of the sequence and of one query head may see some: its window, within its
// own bounds if there are any. All of them are seen unless segments or a mask hide single ones.
AF_INLINE Interval visible_keys(const FlashProblem& p, const Sequence& s, int64_t head, int64_t i) {
  int64_t at = i + s.offset;
  int64_t lo = p.window_left < 0 ? 0 : max64(0, at - p.window_left);
  int64_t hi = p.window_right < 0 ? s.k_len : min64(s.k_len, at + p.window_right + 1);
  if (const FlashMods& m = p.mods; m.row_bounds) {
    const int32_t* own =
        m.row_bounds + 2 * (s.batch * m.row_bounds_batch + head * m.row_bounds_head + s.q_row + i);
    lo = max64(lo, own[0]);
    hi = min64(hi, own[1]);
  }
  lo = min64(lo, s.k_len);
  return {lo, max64(lo, hi)};
}

AF_INLINE int64_t group_size(const FlashProblem& p) {
  return p.heads_q / p.heads_k;
}

// A size that tuning may set: `own` if it is 0, else within [step, most], a multiple of step.
AF_INLINE int64_t chosen(int64_t tuned, int64_t own, int64_t step, int64_t most) {
  return tuned <= 0 ? own : max64(step, min64(tuned, most) / step * step);
}

// The query rows of one (batch, kv head), head-major, cut into tiles of block_m rows. Long
// sequences keep every tile inside one head (a band); short ones put the rows of several heads into
// one tile.
struct RowTiling {
  int64_t block_m, band_rows, bands;

  AF_INLINE_MEMBER int64_t tiles_per_band() const { return ceil_div(band_rows, block_m); }
  AF_INLINE_MEMBER int64_t tiles() const { return bands * tiles_per_band(); }
  // Tile `index`: neighbours are the same queries of every head of the group.
  AF_INLINE_MEMBER int64_t first_row(int64_t index) const {
    return index % bands * band_rows + index / bands * block_m;
  }
  AF_INLINE_MEMBER int64_t rows(int64_t index) const {
    return min64(block_m, band_rows - index / bands * block_m);
  }
};

AF_INLINE RowTiling row_tiling(int64_t q_len, int64_t group, int64_t block_m) {
  return q_len < block_m / 2 ? RowTiling{block_m, q_len * group, 1}
                             : RowTiling{block_m, q_len, group};
}

// An upper bound of tiles() over all sequences of at most q_len queries.
AF_INLINE int64_t max_tiles(int64_t q_len, int64_t group, int64_t block_m) {
  return max64(row_tiling(q_len, group, block_m).tiles(),
               row_tiling(min64(q_len, block_m / 2 - 1), group, block_m).tiles());
}

template <class T>
AF_INLINE T* row_ptr(const TensorRef& t, int64_t batch, int64_t row, int64_t head) {
  return static_cast<T*>(t.data) + batch * t.batch_stride + row * t.seq_stride +
         head * t.head_stride;
}

AF_INLINE float* stat_ptr(const RowStatRef& t, const Sequence& s, int64_t head, int64_t i) {
  return t.data + s.batch * t.batch_stride + head * t.head_stride + s.q_row + i;
}

AF_INLINE bool served_here(const FlashFwdParams& params, const Sequence& s) {
  if (params.route == RowRoute::kAll) return true;
  const int64_t rows = s.q_len * group_size(params.problem);
  if (params.route == RowRoute::kFewRows) return rows <= params.few_rows;
  return rows > params.few_rows && rows <= params.most_rows;
}

// Calls f with a value of the element type: of outputs, and of inputs that may not be fp8.
template <class F>
AF_INLINE void dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat8:  // the bindings refuse it
      return;
  }
}

template <class T>
constexpr bool kIsFloat8 = false;
template <>
constexpr bool kIsFloat8<E4M3> = true;

// The same with fp8 among the types.
template <class F>
AF_INLINE void dispatch_input(DType dtype, const F& f) {
  if (dtype == DType::kFloat8) return f(E4M3{});
  dispatch_dtype(dtype, f);
}

// The element types of Q and of O beside K and V of type T: the same, or with fp8 what the call
// has.
template <class T, class F>
AF_INLINE void with_query_type(const FlashProblem& p, const F& f) {
  if constexpr (kIsFloat8<T>) {
    dispatch_input(p.q_dtype, f);
  } else {
    f(T{});
  }
}
template <class T, class F>
AF_INLINE void with_output_type(const FlashProblem& p, const F& f) {
  if constexpr (kIsFloat8<T>) {
    dispatch_dtype(p.out_dtype, f);
  } else {
    f(T{});
  }
}

AF_INLINE int64_t item_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat8 ? 1 : 2;
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
