// A chunk of a delta rule: its matrices, its decayed queries and keys, and its triangular system.
#pragma once

#include <type_traits>

#include "cuda/linear/channels.h"
#include "cuda/tile/rows.h"

namespace attnforge::cuda {

// What the decays of a chunk multiply beside the matrices, gates acting on the whole state.
struct WholeDecays {
  DecaySums sums, end;

  AF_DEVICE float from_start(int c, int i) const {
    return sums.of_lane(fragment_column(c, i)).decay();
  }
  AF_DEVICE float to_end(int c, int i) const {
    return end.decay_since(sums.of_lane(fragment_column(c, i)));
  }
  template <class W>
  AF_DEVICE float whole(const W&, int, int) const {
    return end.decay();
  }
};

// With gates of channels they are in the tiles.
struct ChannelDecays {
  AF_DEVICE float from_start(int, int) const { return 1.0f; }
  AF_DEVICE float to_end(int, int) const { return 1.0f; }
  template <class W>
  AF_DEVICE float whole(const W& block, int d, int i) const {
    return ptx::load_shared<float>(block.total(fragment_column(d, i)));
  }
};

// x are queries, y are keys. between = scale D_ij q_i k_j on and below the diagonal, in reverse
// scale D_ij k_i q_j; erase = D_ij k_i k_j beta_j below it; zeros elsewhere.
template <class W>
struct DeltaBlock : W {
  using Between = typename W::Between;
  using ReadTile = typename W::ReadTile;
  using GateTile = typename W::GateTile;
  // Decayed keys are fp32.
  using Fine = FineProduct<std::conditional_t<W::kRead, float, typename W::T>>;
  // Gates of channels: queries from the start or to the end, keys to the end, keys from the start.
  static constexpr int kSharedBytes = W::kSharedBytes + Between::kBytes + W::kGateBytes;
  static_assert(kSharedBytes <= kMostShared);

  AF_DEVICE Between erase() const { return {this->shared + W::kSharedBytes}; }
  AF_DEVICE GateTile third() const { return {erase().base + Between::kBytes}; }
  AF_DEVICE auto queries_from_start(int n) const {
    if constexpr (W::kRead) {
      return this->from_start();
    } else {
      return this->x(n);
    }
  }
  AF_DEVICE auto queries_to_end(int n) const { return queries_from_start(n); }
  AF_DEVICE auto keys_to_end(int n) const {
    if constexpr (W::kRead) {
      return this->to_end();
    } else {
      return this->y(n);
    }
  }
  AF_DEVICE auto keys_from_start(int n) const {
    if constexpr (W::kRead) {
      return third();
    } else {
      return this->y(n);
    }
  }

  // Both matrices and, with gates of channels, the decayed tiles; a barrier at the end. A lane has
  // a token's gate and beta.
  template <bool kReverse>
  AF_DEVICE auto prepare(int n, const float* gate, float beta, float scale) const {
    const ReadTile q = this->x(n), k = this->y(n);
    const ReadTile left = kReverse ? k : q, right = kReverse ? q : k;
    if constexpr (W::kRead) {
      decay_read_side(
          *this, n,
          [&](int i, int channel, float decay) {
            if (!kReverse) scale_element(q, this->from_start(), i, channel, decay);
            scale_element(k, third(), i, channel, decay);
          },
          [&](int i, int channel, float decay) {
            if (kReverse) scale_element(q, this->from_start(), i, channel, decay);
            scale_element(k, this->to_end(), i, channel, decay);
          });
      W::Team::sync();
      const float share = ptx::shuffle_from(beta, static_cast<uint32_t>(product_column()));
      products_between(*this, n, left, right, this->between(), scale, false);
      products_between(*this, n, k, k, erase(), share, true);
      W::Team::sync();
      return ChannelDecays{};
    } else {
      const DecaySums sums = DecaySums::of(gate == nullptr ? 0.0f : *gate);
      products(left, right, k, sums, beta, scale);
      W::Team::sync();
      return WholeDecays{sums, sums.of_lane(31)};
    }
  }

  // A warp has 16 x 16 of both matrices.
  AF_DEVICE void products(const ReadTile& left, const ReadTile& right, const ReadTile& k,
                          const DecaySums& sums, float beta, float scale) const {
    const int row = warp_id() / 2 * 16, column = warp_id() % 2 * 16;
    Accumulators<1, 2> scores, keys;
    zero<1, 2>(scores), zero<1, 2>(keys);
    if (column <= row) {
      product_nt<1, 2>(scores, left, row, right, column);
      product_nt<1, 2>(keys, k, row, k, column);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = fragment_row(row, 0, h);
      const DecaySums later = sums.of_lane(i);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int j = column + fragment_column(c / 2, c % 2);
        const float decay = later.decay_since(sums.of_lane(j));
        const float share = ptx::shuffle_from(beta, static_cast<uint32_t>(j));
        const float score = scores[0][c / 2][2 * h + c % 2] * (scale * decay);
        const float key = keys[0][c / 2][2 * h + c % 2] * (share * decay);
        ptx::store_shared(this->between().element(i, j), j <= i ? score : 0.0f);
        ptx::store_shared(erase().element(i, j), j < i ? key : 0.0f);
      }
    }
  }

  // Solves in the fragments of 16 tokens from block 2 `half` on, which earlier tokens are out of.
  template <int kHalf>
  AF_DEVICE void substitute(typename W::Output& e) const {
    const int lane = static_cast<int>(ptx::lane_id());
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int block = 2 * kHalf + j / 8;
      const auto owner = static_cast<uint32_t>(lane / 4 * 4 + j % 8 / 2);
      const float first = ptx::shuffle_from(e[block][j % 2], owner);
      const float second = ptx::shuffle_from(e[block][2 + j % 2], owner);
#pragma unroll
      for (int n = block; n < 2 * kHalf + 2; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float l =
              ptx::load_shared<float>(erase().element(fragment_column(n, i), 16 * kHalf + j));
          e[n][i] = ptx::fma(-l, first, e[n][i]);
          e[n][2 + i] = ptx::fma(-l, second, e[n][2 + i]);
        }
      }
    }
  }

  // Solves for the tokens of a chunk; of 32, the second half takes the first's by a product.
  AF_DEVICE void solve(typename W::Output& e) const {
    substitute<0>(e);
    if constexpr (W::kRows == 32) {
      Fragments<2> early, late;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) early[n][i] = -e[n][i], late[n][i] = e[2 + n][i];
      }
      using Matrix = AlongRows<Between>;
      struct LaterRows {
        Matrix matrix;
        AF_DEVICE Blocks load(int n, int k AF_SITE) const {
          return matrix.load(n + 2, k AF_PASS_SITE);
        }
      };
      state_product<Product<float>, 2, 2>(late, early, LaterRows{Matrix::of(erase())});
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) e[2 + n][i] = late[n][i];
      }
      substitute<1>(e);
    }
  }
};

}  // namespace attnforge::cuda
