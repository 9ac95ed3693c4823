// Where the tokens of a sequence lie, and what a gate is: shared by the delta rules and the
// diagonal scan.
#pragma once

#include "attnforge/delta.h"
#include "cpu/flash/problem.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

struct TokenSpan {
  int64_t batch, first, rows;  // rows of memory: batch * batch_stride + (first + t) * seq_stride
};

// Boundaries are data: clamped to the rows that exist.
AF_INLINE TokenSpan token_span(const int32_t* cu_seqlens, int64_t rows, int64_t sequence) {
  if (!cu_seqlens) return {sequence, 0, rows};
  const int64_t first = max64(0, min64(cu_seqlens[sequence], rows));
  const int64_t end = max64(first, min64(cu_seqlens[sequence + 1], rows));
  return {0, first, end - first};
}

template <class T>
AF_INLINE T* token_row(const TensorRef& x, const TokenSpan& s, int64_t head, int64_t t) {
  return static_cast<T*>(x.data) + s.batch * x.batch_stride + (s.first + t) * x.seq_stride +
         head * x.head_stride;
}

// Natural-log gate to base 2; one below kReset goes to where exp2 is 0. A NaN stays.
constexpr float kReset = -100.0f;
AF_INLINE VecF gate_log2(VecF g) {
  VecF l = g * splat(kLog2E);
  return l < splat(kReset * kLog2E) ? splat(kReset * kLog2E) : l;
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
