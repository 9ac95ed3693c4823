// Chunks of a walk whose gates have a channel each: decays as products of numbers at most 1 (for
// gates at most 0), never as quotients, so that nothing overflows and a reset is exact. What goes
// over more than the chunk is the exponential of a sum, whose error does not grow by token.
//
// A thread has a channel, and all tokens of the chunk.
#pragma once

#include "cuda/linear/walk.h"

namespace attnforge::cuda {

// Gates on the side that is read: they become decays, and every token of this thread's channel
// passes by with its decay from the start, then with that to the end. Then a barrier.
template <class W, class FromStart, class ToEnd>
AF_DEVICE void decay_read_side(const W& block, int n, const FromStart& from_start,
                               const ToEnd& to_end AF_SITE) {
  const int channel = static_cast<int>(threadIdx.x);
  if (channel >= W::kDim) return;
  const auto gates = block.gates(n);
  float decay[W::kRows], sum = 0.0f, product = 1.0f;
#pragma unroll
  for (int i = 0; i < W::kRows; ++i) {
    const uint32_t place = gates.element(i, channel);
    const float log = clamped_gate(ptx::load_shared<float>(place AF_PASS_SITE));
    sum += log;
    decay[i] = decay_of(log);
    product *= decay[i];
    ptx::store_shared(place, decay[i] AF_PASS_SITE);
    from_start(i, channel, product);
  }
  ptx::store_shared(block.total(channel), decay_of(sum) AF_PASS_SITE);
  product = 1.0f;
#pragma unroll
  for (int i = W::kRows - 1; i >= 0; --i) {
    to_end(i, channel, product);
    product *= decay[i];
  }
}

// to[i, channel] = from[i, channel] factor
template <class From, class To>
AF_DEVICE void scale_element(const From& from, const To& to, int i, int channel,
                             float factor AF_SITE) {
  const auto x = ptx::load_shared<typename From::Element>(from.element(i, channel) AF_PASS_SITE);
  ptx::store_shared(to.element(i, channel), widen(x) * factor AF_PASS_SITE);
}

// Lanes a flip apart meet: each adds up one half of the sums and gives the other away.
template <int kHalf>
AF_DEVICE void halve(float (&sums)[16], int flip AF_SITE) {
  const bool upper = (static_cast<int>(ptx::lane_id()) & flip) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float mine = upper ? sums[i + kHalf] : sums[i];
    const float other = upper ? sums[i] : sums[i + kHalf];
    sums[i] =
        mine + ptx::shuffle_xor(other, static_cast<uint32_t>(flip), ptx::kFullWarp AF_PASS_SITE);
  }
}

// to = x_i y_j for all tokens i and j <= i (strict: j < i) of a chunk of 16, with the decays
// between them if they are of the channels summed over, times `factor`. A thread has one j, whose
// factor it is, and an eighth of the channels.
AF_DEVICE int product_column() {
  return static_cast<int>(threadIdx.x) / 8;
}
template <class W>
AF_DEVICE void products_between(const W& block, int n, const typename W::ReadTile& x_tile,
                                const typename W::ReadTile& y_tile, const typename W::Between& to,
                                float factor, bool strict AF_SITE) {
  static_assert(W::kRows == 16);
  constexpr int kParts = W::kDim / 64, kPer = 16 / static_cast<int>(sizeof(typename W::Read));
  const int j = product_column(), slice = static_cast<int>(threadIdx.x) % 8;
  const auto load = [&](const typename W::ReadTile& tile, int row, float (&values)[kParts][8]) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int c = 0; c < 8 / kPer; ++c) {
        const int chunk = (part * 64 + slice * 8) / kPer + c;
        const auto raw = ptx::load_shared<ptx::U32x4>(tile.chunk(row, chunk) AF_PASS_SITE);
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          if constexpr (kPer == 4) {
            values[part][4 * c + i] = ptx::float_from_bits(raw.v[i]);
          } else {
            values[part][i] = unpack<typename W::Read>(raw.v[i / 2], i % 2);
          }
        }
      }
    }
  };
  float y[kParts][8], x[kParts][8], sums[16];
  load(y_tile, j, y);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    load(x_tile, i, x);
    sums[i] = 0.0f;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float decays[8];
      if constexpr (W::kRead) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const auto raw = ptx::load_shared<ptx::U32x4>(
              block.gates(n).chunk(i, part * 16 + slice * 2 + c) AF_PASS_SITE);
#pragma unroll
          for (int e = 0; e < 4; ++e) decays[4 * c + e] = ptx::float_from_bits(raw.v[e]);
        }
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (W::kRead) y[part][c] *= i > j ? decays[c] : 1.0f;
        sums[i] = ptx::fma(x[part][c], y[part][c], sums[i]);
      }
    }
  }
  halve<8>(sums, 4 AF_PASS_SITE);
  halve<4>(sums, 2 AF_PASS_SITE);
  halve<2>(sums, 1 AF_PASS_SITE);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * slice + e;  // bits of the slice are those of the halves
    ptx::store_shared(to.element(i, j), i < j + strict ? 0.0f : sums[e] * factor AF_PASS_SITE);
  }
}

// Gates on columns: a thread has one of its warp's 16 columns and, of out, half of the tokens.
template <class W>
struct ColumnDecays {
  float decay[16], z[16];
  int column, half;

  // The decays from the start, z decayed to the end (times `write`), and their total.
  AF_DEVICE static ColumnDecays of(const W& block, int n, float write AF_SITE) {
    const int lane = static_cast<int>(ptx::lane_id());
    ColumnDecays d;
    d.column = W::own_column() + lane % 16, d.half = lane / 16;
    float sum = 0.0f, product = 1.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t place = block.gates(n).element(i, d.column);
      const float log = clamped_gate(ptx::load_shared<float>(place AF_PASS_SITE));
      sum += log;
      d.decay[i] = decay_of(log);
      product *= d.decay[i];
      d.z[i] = widen(ptx::load_shared<typename W::T>(block.z(n).element(i, d.column) AF_PASS_SITE));
      if (d.half == 0)
        ptx::store_shared(block.from_start().element(i, d.column), product AF_PASS_SITE);
    }
    if (d.half == 0) {
      ptx::store_shared(block.total(d.column), decay_of(sum) AF_PASS_SITE);
    } else {
      product = write;
#pragma unroll
      for (int i = 15; i >= 0; --i) {
        ptx::store_shared(block.to_end().element(i, d.column), d.z[i] * product AF_PASS_SITE);
        product *= d.decay[i];
      }
    }
    return d;
  }

  // What the chunk's own tokens add to out, into inside().
  AF_DEVICE void add_inside(const W& block AF_SITE) const {
    float out[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      float w = z[j];
#pragma unroll
      for (int i = j; i < 16; ++i) {
        if (i > j) w *= decay[i];
        if (i / 8 != half) continue;
        const float a = ptx::load_shared<float>(block.between().element(i, j) AF_PASS_SITE);
        out[i % 8] = ptx::fma(a, w, out[i % 8]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      ptx::store_shared(block.inside().element(8 * half + i, column), out[i] AF_PASS_SITE);
    }
  }
};

}  // namespace attnforge::cuda
