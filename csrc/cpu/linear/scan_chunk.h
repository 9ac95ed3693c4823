// A block of tokens of the recurrence at once, where a token's decay is one number or none.
//
// With S before the block and r_uj the product of the decays of the tokens after j, up to u,
//   y_u = (r_u read_u)^T S + sum_{j <= u} A_uj x_j     A_uj = <read_u, write_j> r_uj
//   S  <- r S + sum_j (r_endj write_j) x_j^T
// the chunkwise form of the literature (Yang et al., 2024): products of matrices, on the register
// tiles of gemm.h. Four rows of these tiles are a block: a longer one adds products inside itself,
// C (R + columns) per token, a shorter one loads and stores the state more often.
// All decays are products of numbers at most 1, never differences of sums of logs: nothing
// overflows, a reset (decay 0) is exact, and the last bit does not depend on how far back a gate
// lies. r S, which rounds once per block for as long as the sequence is, is taken as in `Kept`.
#pragma once

#include "cpu/linear/scan_operands.h"
#include "cpu/linear/squares.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// What all columns of the state have in common. Tokens behind the end are zeros.
struct ScanChunk {
  float *read, *write;              // tiles [positions][kBlock]: r_u read_u and r_endj write_j
  float* scores;                    // square: A, zeros above the diagonal
  alignas(64) float each[kBlock];   // decays of tokens
  alignas(64) float upto[kBlock];   // r_u
  alignas(64) float after[kBlock];  // r_endj
  Kept kept;                        // r
};

AF_INLINE int64_t chunk_turns(int64_t positions) {
  return kBlock / kTall + ceil_div(positions, kTall);
}

// Rows that a product may write for `rows` of them.
AF_INLINE int64_t room_for(int64_t rows) {
  return round_up(round_up(rows, kLanes), kTall);
}

AF_INLINE void take_chunk(Arena& arena, int64_t rows, ScanChunk& c) {
  c.read = arena.take<float>(room_for(rows) * kBlock);
  c.write = arena.take<float>(room_for(rows) * kBlock);
  c.scores = arena.take<float>(kBlock * kBlock);
}

// Part p of x, its elements 4 p .. 4 p + 3, goes to out + p * stride.
AF_INLINE void store_parts(float* out, [[maybe_unused]] int64_t stride, VecF x) {
#if ATTNFORGE_LANES == 4
  store4(out, x);
#elif ATTNFORGE_LANES == 8
  const auto half = halves8(x);
  store4(out, half.lo), store4(out + stride, half.hi);
#else
  const auto wide = halves16(x);
  const auto low = halves8(wide.lo), high = halves8(wide.hi);
  store4(out, low.lo), store4(out + stride, low.hi);
  store4(out + 2 * stride, high.lo), store4(out + 3 * stride, high.hi);
#endif
}

// n tokens of an operand, turned about.
template <class T>
AF_INLINE void load_tile(const Scan<T>& scan, const Rows<T>& rows, int64_t step0, int64_t n,
                         float* tile) {
  for (int64_t s = 0; s < kBlock; s += 4) {
    int64_t t[4];
    VecF scale[4];
    for (int u = 0; u < 4; ++u) {
      t[u] = scan.token(step0 + min64(s + u, n - 1));
      scale[u] = splat(rows.scale_at(t[u]));
    }
    for (int64_t r0 = 0; r0 < rows.rows(); r0 += kLanes) {
      VecF x[4];
      if (s + 4 <= n && r0 + kLanes <= rows.dim) {
        for (int u = 0; u < 4; ++u) x[u] = load(rows.data + t[u] * rows.stride + r0) * scale[u];
      } else {
        for (int u = 0; u < 4; ++u) x[u] = s + u < n ? rows.block(t[u], r0) : VecF{};
      }
      transpose4_parts(x[0], x[1], x[2], x[3]);
      for (int u = 0; u < 4; ++u) {  // channel 4 p + u at position_of(4 p + u)
        store_parts(tile + (r0 + u * (kLanes / 4)) * kBlock + s, kBlock, x[u]);
      }
    }
  }
}

AF_INLINE void scale_tile(int64_t positions, const float* factors, float* tile) {
  for (int64_t s = 0; s < kBlock; s += kLanes) {
    const VecF f = load(factors + s);
    for (int64_t p = 0; p < positions; ++p) {
      store(tile + p * kBlock + s, load(tile + p * kBlock + s) * f);
    }
  }
}

template <class T>
AF_INLINE void load_decays(const Scan<T>& scan, int64_t step0, int64_t n, ScanChunk& c) {
  alignas(64) float logs[kBlock] = {};
  for (int64_t s = 0; s < n; ++s) {
    logs[s] = scan.decay.log_number(scan.decay.token(scan.token(step0 + s)));
  }
  VecF sum{};
  for (int64_t s = 0; s < kBlock; s += kLanes) {
    sum += load(logs + s);
    store(c.each + s, decay_of(load(logs + s)));
  }
  c.kept = kept_of(splat(reduce_add(sum)));
  float product = 1.0f;
  for (int64_t s = 0; s < kBlock; ++s) c.upto[s] = product *= c.each[s];
}

// Row u of the products becomes row u of A; leaves c.after.
template <bool kDecays>
AF_INLINE void weigh(int64_t live, ScanChunk& c) {
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int64_t j = 0; kDecays && j < kBlock; j += kLanes) store(c.after + j, VecF{});
  for (int64_t u = 0; u < live; ++u) {
    for (int64_t j = 0; j < round_up(u + 1, kTall); j += kLanes) {
      float* score = c.scores + u * kBlock + j;
      VecF x = load(score);
      if constexpr (kDecays) {
        VecF r = load(c.after + j) * splat(c.each[u]);
        r = lane == splat_int(static_cast<int32_t>(u - j)) ? splat(1.0f) : r;
        store(c.after + j, r);
        x *= r;
      }
      store(score, keep_up_to(u, j, x));
    }
  }
}

// d_u = <read_u, z_u>, and z behind the block.
template <class T>
AF_INLINE void denominators(const Scan<T>& scan, int64_t step0, int64_t n, const ScanChunk& c,
                            float* inverse) {
  const Denominator& norm = scan.norm;
  alignas(64) float d[kBlock] = {};
  for (int64_t r = 0; r < scan.read.rows(); ++r) {
    const int64_t at = position_of(r) * kBlock;
    VecF more{};
    for (int64_t s = 0; s < kBlock; s += kLanes) {
      if (scan.walk != Walk::kWrite) {
        store(d + s, fma(load(c.read + at + s), splat(norm.z[r]), load(d + s)));
      }
      if (scan.walk != Walk::kRead) more += load(c.write + at + s);
    }
    if (scan.walk != Walk::kRead) {
      norm.z[r] = c.kept(splat(norm.z[r]), splat(reduce_add(more)))[0];
    }
  }
  if (scan.walk == Walk::kWrite) return;
  for (int64_t u = 0; u < n; ++u) {
    VecF own{};
    for (int64_t j = 0; scan.walk == Walk::kBoth && j <= u; j += kLanes) {
      own += load(c.scores + u * kBlock + j);
    }
    d[u] += reduce_add(own);
    if (norm.den) norm.den[scan.token(step0 + u) * norm.stride] = d[u];
    inverse[u] = norm.inverse(d[u]);
  }
}

// The block of tokens that starts at `step0`.
template <DecayOn kOn, class T>
[[gnu::noinline]] static void prepare_chunk(const Scan<T>& scan, int64_t step0, ScanChunk& c,
                                            float* inverse) {
  constexpr bool kDecays = kOn == DecayOn::kNumber;
  const int64_t n = min64(kBlock, scan.length() - step0), live = round_up(n, kTall);
  const int64_t positions = positions_of(scan.read.rows());
  if (scan.walk != Walk::kWrite) load_tile(scan, scan.read, step0, n, c.read);
  if (scan.walk != Walk::kRead) load_tile(scan, scan.write, step0, n, c.write);
  c.kept = {splat(1.0f), splat(0.0f)};
  if (kDecays) load_decays(scan, step0, n, c);
  if (scan.walk == Walk::kBoth) {
    tile_square<kBlock, kTall>(live, positions, c.read, c.write, c.scores);
    weigh<kDecays>(live, c);
  }
  if (kDecays) {
    scale_tile(positions, c.upto, c.read);
    scale_tile(positions, c.after, c.write);
  }
  if (scan.norm.z) denominators(scan, step0, n, c, inverse);
}

// The block's tokens on one tile of the state: x and y are [kBlock][kTile].
template <DecayOn kOn, class T>
[[gnu::noinline]] static void scan_chunk(const Scan<T>& scan, int64_t step0, int64_t tile,
                                         const ScanChunk& c, bool finite, Ahead<T>& ahead,
                                         const float* x, float* y, float* state) {
  const int64_t live = round_up(min64(kBlock, scan.length() - step0), kTall);
  const int64_t positions = positions_of(scan.read.rows());
  const int64_t vectors = min64(2, ceil_div(scan.lane.dim - tile * kTile, kLanes));
  for (int64_t row = 0; row < live; row += kTall) {
    ahead.turn();
    if (scan.walk == Walk::kWrite) continue;
    float* out = y + row * kTile;
    panel_tile<kTall, 1, kBlock>(vectors, positions, c.read + row, state, out, false);
    if (scan.walk == Walk::kRead) continue;
    const float* scores = c.scores + row * kBlock;
    if (finite) {
      panel_tile<kTall, kBlock, 1>(vectors, row + kTall, scores, x, out);
      continue;
    }
    // A zero above the diagonal times infinity: what is later must not be seen at all.
    for (int64_t u = 0; u < kTall; ++u) {
      panel_tile<1, kBlock, 1>(vectors, row + u + 1, scores + u * kBlock, x, out + u * kTile);
    }
  }
  if (scan.walk == Walk::kRead) return;
  for (int64_t i = 0; kOn == DecayOn::kNumber && i < positions * kTile; i += kLanes) {
    store(state + i, c.kept(load(state + i), VecF{}));
  }
  for (int64_t p = 0; p < positions; p += kTall) {
    ahead.turn();
    panel_tile<kTall, kBlock, 1>(vectors, live, c.write + p * kBlock, x, state + p * kTile);
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
