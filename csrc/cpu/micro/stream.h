// Stores past the caches, for results that are larger than what a core's caches keep: a line that
// is written as a whole is not read first, and does not push out what is still to be read.
//
// A core keeps few misses in flight, and those are what bounds a walk over rows that lie apart; of
// five rows that come and go per token one is then not fetched. Where the result would have stayed
// in a cache, whoever reads it next pays more than was saved (docs/linear.md has the times).
#pragma once

#include "cpu/kernels.h"
#include "cpu/micro/gemm.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int64_t kStreamBytes = 8 << 20;

#if ATTNFORGE_LANES == 16 && defined(__AVX512F__)
constexpr bool kStreams = true;  // measured there alone

template <class T>
AF_INLINE void stream(T* p, VecF x) {
  if constexpr (sizeof(T) == 4) {
    _mm512_stream_ps(p, (__m512)x);
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(x, T{}));
  }
}

// Before another thread may read what was streamed.
AF_INLINE void end_stream() {
  _mm_sfence();
}
#else
constexpr bool kStreams = false;

template <class T>
AF_INLINE void stream(T* p, VecF x) {
  store(p, x);
}

AF_INLINE void end_stream() {}
#endif

// A row of whole lines, times scale.
template <class T>
AF_INLINE void stream_row(const float* row, float scale, int64_t dim, T* out) {
  for (int64_t d = 0; d < dim; d += kLanes) stream(out + d, load(row + d) * splat(scale));
}

// Whether `rows` rows of `dim` elements of so many heads are large, and whole lines each.
template <class T>
AF_INLINE bool streamed(const TensorRef& out, int64_t rows, int64_t heads, int64_t dim) {
  constexpr int64_t kSize = sizeof(T);
  const int64_t offsets = reinterpret_cast<int64_t>(out.data) |
                          (out.batch_stride | out.seq_stride | out.head_stride | dim) * kSize;
  return kStreams && rows * heads * dim * kSize >= kStreamBytes && offsets % 64 == 0;
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
