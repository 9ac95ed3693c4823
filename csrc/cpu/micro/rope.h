// Rotary positions: rows of Q and K turned pair by pair as they are packed, gradients turned back.
#pragma once

#include "cpu/micro/gemm.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// The angles of one position of one kv head.
struct Rotation {
  const float *cos, *sin;  // [half]
  int64_t half;
  bool interleaved;  // pairs (2 n, 2 n + 1) instead of (n, n + half)
};

// direction -1 is the inverse. Of x, 2 * half floats change.
AF_INLINE void rotate(const Rotation& r, float direction, float* x) {
  if (r.interleaved) {
    for (int64_t i = 0; i < r.half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1], c = r.cos[i], s = r.sin[i] * direction;
      x[2 * i] = a * c - b * s;
      x[2 * i + 1] = b * c + a * s;
    }
    return;
  }
  for (int64_t i = 0; i < r.half; i += kLanes) {
    const int64_t n = r.half - i;
    VecF a = load_partial(x + i, n), b = load_partial(x + r.half + i, n);
    VecF c = load_partial(r.cos + i, n), s = load_partial(r.sin + i, n) * splat(direction);
    store_partial(x + i, a * c - b * s, n);
    store_partial(x + r.half + i, b * c + a * s, n);
  }
}

// dst has room for dim floats rounded up to a vector.
template <class T>
AF_INLINE void rotate_row(const Rotation& r, const T* src, int64_t dim, float* dst) {
  for (int64_t d = 0; d < dim; d += kLanes) store(dst + d, load_partial(src + d, dim - d));
  rotate(r, 1.0f, dst);
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
