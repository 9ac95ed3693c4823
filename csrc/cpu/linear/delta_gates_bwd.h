// The backward of delta_gates.h: from gradients of scores, erase, qg, kg and kd to those of q, k.
//
// Gradients of a key fall in two parts, as the key of the row that reads and erases (`dk_read`) and
// as the key that is written and decays on (`dk_write`): with db = q dq + k dk_read - k dk_write
// they give the gradient of the gates by a reverse sum.
#pragma once

#include "cpu/linear/delta_gates.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

struct ChunkGrads {
  float *dqg, *dkg, *dkd;           // tiles, in
  float *dscores, *derase;          // squares, in; what is above the diagonal is not read
  float *dscores_t, *derase_t;      // their transposes, scratch
  float *dq, *dk_read, *dk_write;   // rows, out
  float *tile_q, *tile_r, *tile_w;  // scratch

  AF_INLINE_MEMBER void take(Arena& arena, int64_t dim) {
    take_floats(arena, tile_floats(dim), dqg, dkg, dkd, tile_q, tile_r, tile_w);
    take_floats(arena, kSquare, dscores, derase, dscores_t, derase_t);
    take_floats(arena, kChunk * padded_dim(dim), dq, dk_read, dk_write);
  }

  AF_INLINE_MEMBER void mask_squares(int64_t live) {
    for (int64_t i = 0; i < live; ++i) {
      for (int64_t j = 0; j < live; j += kLanes) {
        const int64_t at = i * kChunk + j;
        store(dscores + at, keep_up_to(i, j, load(dscores + at)));
        store(derase + at, keep_up_to(i - 1, j, load(derase + at)));
      }
    }
  }
  AF_INLINE_MEMBER void transpose_squares(int64_t live) {
    transpose(dscores, kChunk, live, live, dscores_t, kChunk);
    transpose(derase, kChunk, live, live, derase_t, kChunk);
  }
};

// tile[d][columns] += a[d][depth] b[depth][columns], a tile by a square.
AF_INLINE void tile_product(int64_t dim, int64_t columns, int64_t depth, const float* a,
                            const float* b, float* c) {
  gemm<kChunk, 1, kChunk>(dim, vectors_of(columns), depth, a, kChunk, b, kNR, c, kChunk, true);
}

// The same over all tokens with b triangular: of each panel of columns only the depth that is not
// zero, where kUpper means that rows j <= column hold something.
template <bool kUpper>
AF_INLINE void tile_triangle(int64_t dim, int64_t live, const float* a, const float* b, float* c) {
  for (int64_t column = 0; column < live; column += kNR) {
    const int64_t columns = min64(kNR, live - column);
    const int64_t first = kUpper ? 0 : column, end = kUpper ? column + columns : live;
    tile_product(dim, columns, end - first, a + first, b + first * kChunk + column, c + column);
  }
}

// A tile into rows; channels past dim hold what products left there.
AF_INLINE void tile_to_rows(float* tile, int64_t dim, int64_t live, float* rows) {
  const int64_t ld = padded_dim(dim);
  fill_zero(tile + dim * kChunk, (ld - dim) * kChunk);
  transpose(tile, kChunk, ld, live, rows, ld);
}

AF_INLINE void intra_backward(ScalarGate& gate, const Chunk& c, ChunkGrads& g) {
  gate.weigh(c, c.scale, 0, g.dscores);
  gate.weigh(c, -1.0f, 1, g.derase);
  g.transpose_squares(c.live);
  ScalarGate::scale_tile(c, g.dqg, gate.from_start, c.scale, g.tile_q);
  ScalarGate::scale_tile(c, g.dkg, gate.from_start, -1.0f, g.tile_r);
  ScalarGate::scale_tile(c, g.dkd, gate.to_end, 1.0f, g.tile_w);
  tile_triangle<true>(c.dim, c.live, c.k, g.dscores_t, g.tile_q);
  tile_triangle<true>(c.dim, c.live, c.k, g.derase_t, g.tile_r);
  tile_triangle<false>(c.dim, c.live, c.q, g.dscores, g.tile_w);
  tile_triangle<false>(c.dim, c.live, c.k, g.derase, g.tile_w);
  tile_to_rows(g.tile_q, c.dim, c.live, g.dq);
  tile_to_rows(g.tile_r, c.dim, c.live, g.dk_read);
  tile_to_rows(g.tile_w, c.dim, c.live, g.dk_write);
}

// Inside sub-chunk s, all in rows: the mirror of ChannelGate::inside.
AF_INLINE void inside_backward(ChannelGate& gate, const Chunk& c, ChunkGrads& g, int64_t s) {
  const int64_t ld = padded_dim(c.dim), first = s * kSub;
  for (int64_t i = 0; i < kSub; ++i) {
    const int64_t row = first + i;
    gate.advance(c.k_rows + row * ld, gate.step + row * ld, i);
    for (int64_t d = 0; d < ld; d += kLanes) {
      VecF dq = load(g.dq + row * ld + d), dk = load(g.dk_read + row * ld + d);
      for (int64_t j = 0; j <= i; ++j) {
        const VecF w = load(gate.window + j * ld + d);
        dq = fma(splat(g.dscores[row * kChunk + first + j] * c.scale), w, dq);
        dk = fma(splat(-g.derase[row * kChunk + first + j]), w, dk);
      }
      store(g.dq + row * ld + d, dq);
      store(g.dk_read + row * ld + d, dk);
    }
  }
  // What rows i and later give to key j, brought back to row i; at i = j it is the key's own.
  for (int64_t d = 0; d < ld; d += kLanes) {
    for (int64_t j = 0; j < kSub; ++j) store(gate.window + j * ld + d, VecF{});
    for (int64_t i = kSub - 1; i >= 0; --i) {
      const int64_t row = first + i;
      const VecF q = load(c.q_rows + row * ld + d) * splat(c.scale);
      const VecF k = load(c.k_rows + row * ld + d);
      const VecF factor = load(gate.step + row * ld + d);
      for (int64_t j = 0; j <= i; ++j) {
        VecF z = load(gate.window + j * ld + d);
        z = fma(splat(g.dscores[row * kChunk + first + j]), q, z);
        z = fma(splat(-g.derase[row * kChunk + first + j]), k, z);
        store(gate.window + j * ld + d, j < i ? z * factor : z);
      }
      float* out = g.dk_write + row * ld + d;
      store(out, load(out) + load(gate.window + i * ld + d));
    }
  }
}

AF_INLINE void intra_backward(ChannelGate& gate, const Chunk& c, ChunkGrads& g) {
  const int64_t ld = padded_dim(c.dim), subs = c.live / kSub;
  g.mask_squares(c.live);
  g.transpose_squares(c.live);
  // Rows that read: keys stand at the end of the sub-chunk before.
  gate.decayed_tile(c, c.k_rows, gate.to_end, 1.0f, g.tile_w, nullptr);
  gate.from_chunk_start(c, g.dqg, g.tile_q);
  gate.from_chunk_start(c, g.dkg, g.tile_r);
  for (int64_t s = 1; s < subs; ++s) {
    gate.carry_keys(g.tile_w, s);
    const int64_t at = s * kSub;
    tile_product(c.dim, kSub, at, g.tile_w, g.dscores_t + at, g.tile_q + at);
    tile_product(c.dim, kSub, at, g.tile_w, g.derase_t + at, g.tile_r + at);
  }
  // Keys that are written: what later sub-chunks give, carried back one sub-chunk at a time.
  for (int64_t s = subs - 1; s > 0; --s) {
    const int64_t at = s * kSub;
    for (int64_t d = 0; d < c.dim; ++d) {
      const VecF factor = splat(gate.total[s * ld + d]);
      for (int64_t j = 0; j < at; j += kLanes) {
        store(g.dkd + d * kChunk + j, load(g.dkd + d * kChunk + j) * factor);
      }
    }
    tile_product(c.dim, at, kSub, c.q + at, g.dscores + at * kChunk, g.dkd);
    tile_product(c.dim, at, kSub, c.k + at, g.derase + at * kChunk, g.dkd);
  }
  tile_to_rows(g.tile_q, c.dim, c.live, g.dq);
  tile_to_rows(g.tile_r, c.dim, c.live, g.dk_read);
  tile_to_rows(g.dkd, c.dim, c.live, g.dk_write);
  for (int64_t at = 0; at < c.live * ld; at += kLanes) {
    const VecF start = load(gate.from_start + at);
    store(g.dq + at, load(g.dq + at) * start * splat(c.scale));
    store(g.dk_read + at, load(g.dk_read + at) * start * splat(-1.0f));
    store(g.dk_write + at, load(g.dk_write + at) * load(gate.to_end + at));
  }
  for (int64_t s = 0; s < subs; ++s) inside_backward(gate, c, g, s);
}

// The transposed system: dwrite_j += sum_{i > j} E_ij derror_i, derror_j = beta_j dwrite_j.
[[gnu::noinline]] static void solve_backward(int64_t live, int64_t vectors, const float* erase,
                                             const float* beta, float* dwrite, float* derror) {
  for (int64_t first = live - kSub; first >= 0; first -= kSub) {
    const int64_t end = first + kSub;
    for (int64_t r = first; end < live && r < end; r += kSolveRows) {
      panel_tile<kSolveRows, 1, kChunk>(vectors, live - end, erase + end * kChunk + r,
                                        derror + end * kNR, dwrite + r * kNR);
    }
    for (int64_t i = end - 1; i >= first; --i) {
      VecF d0 = load(dwrite + i * kNR) * splat(beta[i]);
      VecF d1 = load(dwrite + i * kNR + kLanes) * splat(beta[i]);
      store(derror + i * kNR, d0), store(derror + i * kNR + kLanes, d1);
      for (int64_t j = first; j < i; ++j) {
        VecF e = splat(erase[i * kChunk + j]);
        float* x = dwrite + j * kNR;
        store(x, fma(e, d0, load(x)));
        store(x + kLanes, fma(e, d1, load(x + kLanes)));
      }
    }
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
