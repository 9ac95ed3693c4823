// A row of up to 64 kPairs channels in the registers of a warp: lane l has channels 2 l + 64 i and
// the next, so that a load of the warp is one piece of memory. Channels past the row are 0.
#pragma once

#include "cuda/tile/epilogue.h"
#include "cuda/tile/scan.h"

namespace attnforge::cuda {

template <class T>
AF_DEVICE FloatPair load_pair(const T* x) {
  if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const FloatPair*>(x);
  } else {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(x);
    return {unpack<T>(pair, 0), unpack<T>(pair, 1)};
  }
}

template <int kPairs>
struct LaneRow {
  FloatPair x[kPairs];

  AF_DEVICE static int channel(int i) { return 2 * static_cast<int>(ptx::lane_id()) + 64 * i; }

  template <class T>
  AF_DEVICE static LaneRow of(const T* row, int dim) {
    LaneRow r;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      r.x[i] = channel(i) < dim ? load_pair(row + channel(i)) : FloatPair{0.0f, 0.0f};
    }
    return r;
  }

  // This lane's part of a sum of f over the channels of two rows.
  template <class F>
  AF_DEVICE float part(const LaneRow& other, const F& f) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      sum = f(sum, x[i].x, other.x[i].x);
      sum = f(sum, x[i].y, other.x[i].y);
    }
    return sum;
  }
  AF_DEVICE float dot(const LaneRow& other) const {
    return warp_sum(part(other, [](float sum, float a, float b) { return ptx::fma(a, b, sum); }));
  }
};

}  // namespace attnforge::cuda
