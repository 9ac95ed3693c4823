// What leaves a chunk of a walk: out, and what the gradient of gates needs of it.
#pragma once

#include "cuda/linear/walk.h"
#include "cuda/tile/rows.h"

namespace attnforge::cuda {

// A chunk of one head in memory: tokens from `row` on in walking order, `left` of which exist.
struct Chunk {
  Tokens tokens;
  int head, first_column, columns, row, left;

  // Of a row and a column: their place in contiguous [B, T, heads, columns].
  AF_DEVICE int64_t element(const LinearWalk& walk, int r, int column) const {
    return (token(walk, r) * walk.heads + head) * walk.columns + first_column + column;
  }
  // Of a row of the chunk: its token in a tensor of [B, T, ..].
  AF_DEVICE int64_t token(const LinearWalk& walk, int r) const {
    const int at = walk.reverse ? tokens.count - 1 - row - r : row + r;
    return int64_t{tokens.batch} * walk.rows + tokens.first + at;
  }
};

// f(n, i, row, column) for every element of this thread's fragments of out that exists.
template <class W, class F>
AF_DEVICE void each_result(const Chunk& chunk, const F& f) {
  const int lane = static_cast<int>(ptx::lane_id());
#pragma unroll
  for (int n = 0; n < W::kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = fragment_column(n, i), column = W::own_column() + lane / 4 + i / 2 * 8;
      if (row < chunk.left && column < chunk.columns) f(n, i, row, column);
    }
  }
}

// f(row, sum over this warp's columns) for every token that exists, by one of its lanes.
template <class W, class F>
AF_DEVICE void sum_columns(const Chunk& chunk, const typename W::Output& terms,
                           const F& f AF_SITE) {
#pragma unroll
  for (int n = 0; n < W::kN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = terms[n][e] + terms[n][2 + e];
#pragma unroll
      for (uint32_t flip = 4; flip < 32; flip *= 2) {
        sum += ptx::shuffle_xor(sum, flip, ptx::kFullWarp AF_PASS_SITE);
      }
      const int row = fragment_column(n, e);
      if (ptx::lane_id() < 4 && row < chunk.left) f(row, sum);
    }
  }
}

// Rounded rows of 16 columns through the warp's own columns of z, which nobody reads any more.
template <class W>
AF_DEVICE void store_out(const LinearWalk& walk, const W& block, int n, const Chunk& chunk,
                         const typename W::Output& out AF_SITE) {
  using T = typename W::T;
  using Tile = typename W::ColumnTile;
  const int lane = static_cast<int>(ptx::lane_id());
  const Tile tile = block.z(n);
  ptx::sync_warp(ptx::kFullWarp AF_PASS_SITE);
#pragma unroll
  for (int k = 0; k < W::kN; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = W::own_column() + lane / 4 + i / 2 * 8;
      ptx::store_shared(tile.element(fragment_column(k, i), column),
                        narrow<T>(out[k][i]) AF_PASS_SITE);
    }
  }
  ptx::sync_warp(ptx::kFullWarp AF_PASS_SITE);
  constexpr int kChunks = 16 / Tile::kPerChunk;  // of a warp's columns
  const auto to = WalkRows<T>::of(walk.out, chunk.tokens, chunk.head, walk.reverse);
  for (int e = lane; e < W::kRows * kChunks; e += 32) {
    const int r = e / kChunks, c = W::own_column() / Tile::kPerChunk + e % kChunks;
    if (r >= chunk.left || c * Tile::kPerChunk >= chunk.columns) continue;
    const auto value = ptx::load_shared<ptx::U32x4>(tile.chunk(r, c) AF_PASS_SITE);
    ptx::store_global_16(to.at(chunk.row + r) + chunk.first_column + c * Tile::kPerChunk, value);
  }
}

template <class W>
AF_DEVICE void leave(const LinearWalk& walk, const W& block, int n, const Chunk& chunk,
                     typename W::Output& out, float (&later)[2] AF_SITE) {
  using T = typename W::T;
  const int lane = static_cast<int>(ptx::lane_id());
  if (walk.extra != WalkExtra::kNone) {
    const auto beside = WalkRows<const T>::of(walk.beside, chunk.tokens, chunk.head, walk.reverse);
    typename W::Output terms;  // beside out
    zero_fragments<W::kN>(terms);
    each_result<W>(chunk, [&](int k, int i, int row, int column) {
      terms[k][i] = out[k][i] * widen(beside.at(chunk.row + row)[chunk.first_column + column]);
    });
    if (walk.extra == WalkExtra::kDots) {
      const int plane = chunk.first_column / 16 + warp_id();
      sum_columns<W>(chunk, terms, [&](int row, float sum) {
        walk.dots[plane * walk.plane + chunk.token(walk, row) * walk.heads + chunk.head] = sum;
      } AF_PASS_SITE);
    } else if (walk.extra != WalkExtra::kSuffix) {
      const float sign = walk.extra == WalkExtra::kMinus ? -1.0f : 1.0f;
      each_result<W>(chunk, [&](int k, int i, int row, int column) {
        float& gate = walk.gates[chunk.element(walk, row, column)];
        gate = (walk.extra == WalkExtra::kProduct ? 0.0f : gate) + sign * terms[k][i];
      });
    } else {
      each_result<W>(chunk, [&](int k, int i, int row, int column) {
        terms[k][i] = walk.gates[chunk.element(walk, row, column)] - terms[k][i];
      });
      // Sums over the tokens walked so far: two of a lane, then of the lanes of a column before it.
#pragma unroll
      for (int k = 0; k < W::kN; ++k) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& first = terms[k][2 * h];
          float& second = terms[k][2 * h + 1];
          second += first;
          float sum = second;
#pragma unroll
          for (uint32_t step = 1; step < 4; step *= 2) {
            const float other = ptx::shuffle_up(sum, step, ptx::kFullWarp AF_PASS_SITE);
            if (lane % 4 >= static_cast<int>(step)) sum += other;
          }
          const float others = ptx::shuffle_up(sum, 1, ptx::kFullWarp AF_PASS_SITE);
          const float before = lane % 4 == 0 ? later[h] : later[h] + others;
          first += before, second += before;
          later[h] +=
              ptx::shuffle_from(sum, static_cast<uint32_t>(lane | 3), ptx::kFullWarp AF_PASS_SITE);
        }
      }
      each_result<W>(chunk, [&](int k, int i, int row, int column) {
        const int64_t at = chunk.element(walk, row, column);
        walk.gates[at] = walk.gate[at] <= kReset ? 0.0f : terms[k][i];
      });
    }
  }
  if (walk.plus != nullptr) {
    each_result<W>(chunk, [&](int k, int i, int row, int column) {
      out[k][i] += walk.plus[chunk.element(walk, row, column)];
    });
  }
  if (walk.out32 != nullptr) {
    each_result<W>(chunk, [&](int k, int i, int row, int column) {
      walk.out32[chunk.element(walk, row, column)] = out[k][i];
    });
  } else {
    store_out(walk, block, n, chunk, out AF_PASS_SITE);
  }
}

}  // namespace attnforge::cuda
