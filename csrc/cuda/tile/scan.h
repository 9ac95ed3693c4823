// Sums and prefix sums over the threads of a block, in the order of their numbers.
//
// All threads come, from the same line. scratch: 8 bytes of shared memory per warp, free again when
// a function returns. T has 4 or 8 bytes.
#pragma once

#include "cuda/tile/team.h"

namespace attnforge::cuda {

template <class T>
AF_DEVICE T lane_below(T value, uint32_t delta) {
  if constexpr (sizeof(T) == 4) {
    return ptx::shuffle_up(value, delta);
  } else {
    const uint32_t low = ptx::shuffle_up(static_cast<uint32_t>(value), delta);
    return T{ptx::shuffle_up(static_cast<uint32_t>(value >> 32), delta)} << 32 | low;
  }
}

// f over the lanes of a warp, in each of them.
template <class T, class F>
AF_DEVICE T over_warp(T value, const F& f) {
  static_assert(sizeof(T) == 4);
#pragma unroll
  for (uint32_t flip = 16; flip > 0; flip /= 2) value = f(value, ptx::shuffle_xor(value, flip));
  return value;
}

AF_DEVICE float warp_sum(float value) {
  return over_warp(value, [](float a, float b) { return a + b; });
}

struct Block {
  int warps;
  uint32_t scratch;

  template <class T>
  AF_DEVICE uint32_t at(int warp) const {
    return scratch + static_cast<uint32_t>(warp * static_cast<int>(sizeof(T)));
  }

  // f over the threads of the block, in each of them; f is associative and commutative.
  template <class T, class F>
  AF_DEVICE T over(T value, const F& f) const {
    value = over_warp(value, f);
    if (ptx::lane_id() == 0) ptx::store_shared(at<T>(warp_id()), value);
    ptx::sync_threads();
    T all = ptx::load_shared<T>(at<T>(0));
    for (int w = 1; w < warps; ++w) all = f(all, ptx::load_shared<T>(at<T>(w)));
    ptx::sync_threads();
    return all;
  }

  // The sum of the values of the threads before this one; all: that of every thread.
  template <class T>
  AF_DEVICE T sum_before(T value, T& all) const {
    T sum = value;  // with this thread's own
#pragma unroll
    for (uint32_t delta = 1; delta < 32; delta *= 2) {
      const T below = lane_below(sum, delta);
      if (ptx::lane_id() >= delta) sum += below;
    }
    if (ptx::lane_id() == 31) ptx::store_shared(at<T>(warp_id()), sum);
    ptx::sync_threads();
    T before = 0;
    all = 0;
    for (int w = 0; w < warps; ++w) {
      const T part = ptx::load_shared<T>(at<T>(w));
      if (w < warp_id()) before += part;
      all += part;
    }
    ptx::sync_threads();
    return before + sum - value;
  }
};

}  // namespace attnforge::cuda
