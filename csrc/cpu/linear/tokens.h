// Where the tokens of a sequence lie, for the whole family; what a gate is for the delta rules and
// the diagonal scan.
#pragma once

#include "attnforge/delta.h"
#include "cpu/flash/problem.h"
#include "cpu/linear/decay.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

struct TokenSpan {
  int64_t batch, first, rows;  // rows of memory: batch * batch_stride + (first + t) * seq_stride

  AF_INLINE_MEMBER int64_t end() const { return first + rows; }
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

constexpr float kReset = -100.0f;  // a gate below it is a reset: exp2 of it is exactly 0

}  // namespace attnforge::cpu::ATTNFORGE_ISA
