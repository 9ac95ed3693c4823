// Products of a state that stays in registers (mma.sync by tf32, fp32 accumulators). A warp has 16
// rows of everything on the left, in the accumulators' layout (product.h), so that results are left
// operands again and never pass through shared memory:
//
//   product_along    acc[rows, n] += L[rows, k] B[n, k]^T    rows of the tile are n
//   product_across   acc[rows, n] += L[rows, k] B[k, n]      rows of the tile are k
//   left_across      L[rows, k] = tile[k, rows]              columns of a tile as left operand
//
// The k index is permuted as in product_nn: a lane's (t, t + 4) stand for k = (2 t, 2 t + 1), so a
// lane needs two neighbours in k of every 8 x 8 block, which ldmatrix gives for 16-bit elements.
//
// tf32 holds 16-bit elements exactly: bf16 has 8 bits and its exponents, fp16 has 11 bits. What is
// computed in fp32 is rounded to 11 bits once as an operand, without fp16's overflow. In fp32 calls
// both operands are split in two (element.h).
#pragma once

#include "cuda/tile/product.h"

namespace attnforge::cuda {

struct RoundedProduct {
  struct Left {
    uint32_t x[4];
  };
  struct Right {
    uint32_t x[2];
  };
  AF_DEVICE static uint32_t rounded(uint32_t x) {
    return ptx::tf32_from_float(ptx::float_from_bits(x));
  }
  AF_DEVICE static Left left(const uint32_t (&r)[4]) {
    return {{rounded(r[0]), rounded(r[1]), rounded(r[2]), rounded(r[3])}};
  }
  AF_DEVICE static Right right(uint32_t r0, uint32_t r1) { return {{rounded(r0), rounded(r1)}}; }
  AF_DEVICE static void add(float (&d)[4], const Left& a, const Right& b) {
    ptx::mma_m16n8k8_tf32(d, a.x, b.x);
  }
};

// The left operand in two parts, for one on the right that tf32 holds exactly.
struct SplitProduct {
  struct Left {
    RoundedProduct::Left hi, lo;
  };
  using Right = RoundedProduct::Right;
  AF_DEVICE static Left left(const uint32_t (&r)[4]) {
    const auto parts = Product<float>::left(r);
    return {{{parts.hi[0], parts.hi[1], parts.hi[2], parts.hi[3]}},
            {{parts.lo[0], parts.lo[1], parts.lo[2], parts.lo[3]}}};
  }
  AF_DEVICE static Right right(uint32_t r0, uint32_t r1) { return RoundedProduct::right(r0, r1); }
  AF_DEVICE static void add(float (&d)[4], const Left& a, const Right& b) {
    RoundedProduct::add(d, a.lo, b);
    RoundedProduct::add(d, a.hi, b);
  }
};

// The products of a call whose tensors have elements T, and those with tiles of T whose results
// feed back into what they came from, where rounding would add up.
template <class T>
struct StateProductOf {
  using Type = RoundedProduct;
  using Fine = SplitProduct;
};
template <>
struct StateProductOf<float> {
  using Type = Product<float>;
  using Fine = Product<float>;
};
template <class T>
using StateProduct = typename StateProductOf<T>::Type;
template <class T>
using FineProduct = typename StateProductOf<T>::Fine;

// kK blocks of 8 columns.
template <int kK>
using Fragments = float[kK][4];

template <int kK>
AF_DEVICE void zero_fragments(Fragments<kK>& x) {
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[k][i] = 0.0f;
  }
}

// x *= factor(k, i), of the column that is element i = 0, 1 of block k.
template <int kK, class F>
AF_DEVICE void scale_columns(Fragments<kK>& x, const F& factor) {
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float f = factor(k, i);
      x[k][i] *= f, x[k][2 + i] *= f;
    }
  }
}

// x += sign y
template <int kK>
AF_DEVICE void add_fragments(Fragments<kK>& x, const Fragments<kK>& y, float sign) {
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[k][i] = ptx::fma(sign, y[k][i], x[k][i]);
  }
}

// Two neighbours in k of four 8 x 8 blocks, [n][k].
struct Blocks {
  float x[2][2][2];
};

template <class T>
AF_DEVICE Blocks unpacked(const uint32_t (&r)[4]) {
  Blocks b;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) b.x[n][k][i] = unpack<T>(r[2 * n + k], i);
    }
  }
  return b;
}

// What a lane loads of a tile whose rows are n: blocks n, n + 1 of rows and k, k + 1 of columns.
template <class Tile>
struct AlongRows {
  using T = typename Tile::Element;
  uint32_t home;

  AF_DEVICE static AlongRows of(const Tile& tile) {
    const int lane = static_cast<int>(ptx::lane_id());
    if constexpr (sizeof(T) == 2) return {tile.chunk(lane % 8 + lane / 16 * 8, lane / 8 % 2)};
    return {tile.element(lane / 4, lane % 4 * 2)};
  }
  AF_DEVICE Blocks load(int n, int k AF_SITE) const {
    if constexpr (sizeof(T) == 2) {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, Tile::from(home, 8 * n, k) AF_PASS_SITE);
      return unpacked<T>(r);
    } else {
      Blocks b;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const auto pair =
              ptx::load_shared<ptx::U32x2>(Tile::from(home, 8 * (n + i), 2 * (k + j)) AF_PASS_SITE);
          b.x[i][j][0] = ptx::float_from_bits(pair.v[0]);
          b.x[i][j][1] = ptx::float_from_bits(pair.v[1]);
        }
      }
      return b;
    }
  }
};

// The same of a tile whose rows are k: blocks k, k + 1 of rows and n, n + 1 of columns.
template <class Tile>
struct AcrossRows {
  using T = typename Tile::Element;
  uint32_t home[2];

  AF_DEVICE static AcrossRows of(const Tile& tile) {
    const int lane = static_cast<int>(ptx::lane_id());
    if constexpr (sizeof(T) == 2) return {{tile.chunk(lane % 16, lane / 16), 0}};
    const int row = lane % 4 * 2, column = lane / 4;
    return {{tile.element(row, column), tile.element(row + 1, column)}};
  }
  AF_DEVICE Blocks load(int n, int k AF_SITE) const {
    if constexpr (sizeof(T) == 2) {
      uint32_t r[4];
      ptx::ldmatrix_x4_trans(r, Tile::from(home[0], 8 * k, n) AF_PASS_SITE);
      return unpacked<T>(r);
    } else {
      Blocks b;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            b.x[i][j][e] =
                ptx::load_shared<float>(Tile::from(home[e], 8 * (k + j), 2 * (n + i)) AF_PASS_SITE);
          }
        }
      }
      return b;
    }
  }
};

// Columns column .. column + 15 of a tile, rows of which are k.
template <int kK, class Tile>
AF_DEVICE void left_across(Fragments<kK>& left, const Tile& tile, int column AF_SITE) {
  const auto rows = AcrossRows<Tile>::of(tile);
#pragma unroll
  for (int k = 0; k < kK; k += 2) {
    const Blocks b = rows.load(column / 8, k AF_PASS_SITE);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) left[k + j][i] = b.x[i / 2][j][i % 2];
    }
  }
}

template <class P, int kN, int kK, class Loads>
AF_DEVICE void state_product(Fragments<kN>& acc, const Fragments<kK>& left,
                             const Loads& right AF_SITE) {
  static_assert(kN % 2 == 0 && kK % 2 == 0);
#pragma unroll
  for (int k = 0; k < kK; k += 2) {
    typename P::Left a[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float (&c)[4] = left[k + j];
      const uint32_t r[4] = {ptx::bits_of_float(c[0]), ptx::bits_of_float(c[2]),
                             ptx::bits_of_float(c[1]), ptx::bits_of_float(c[3])};
      a[j] = P::left(r);
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      const Blocks b = right.load(n, k AF_PASS_SITE);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          P::add(acc[n + i], a[j],
                 P::right(ptx::bits_of_float(b.x[i][j][0]), ptx::bits_of_float(b.x[i][j][1])));
        }
      }
    }
  }
}

template <class P, int kN, int kK, class Tile>
AF_DEVICE void product_along(Fragments<kN>& acc, const Fragments<kK>& left,
                             const Tile& tile AF_SITE) {
  state_product<P, kN, kK>(acc, left, AlongRows<Tile>::of(tile) AF_PASS_SITE);
}
template <class P, int kN, int kK, class Tile>
AF_DEVICE void product_across(Fragments<kN>& acc, const Fragments<kK>& left,
                              const Tile& tile AF_SITE) {
  state_product<P, kN, kK>(acc, left, AcrossRows<Tile>::of(tile) AF_PASS_SITE);
}

}  // namespace attnforge::cuda
