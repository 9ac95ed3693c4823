// What gates do to a chunk: its scores, its erase matrix and its decayed queries and keys.
//
// With b the inclusive sum of the gates from the start of the chunk and r_ij = exp(b_i - b_j):
//
//   scores_ij = scale <q_i, k_j r_ij>  (j <= i)       qg = scale q exp(b)   kg = -k exp(b)
//   erase_ij  =      -<k_i, k_j r_ij>  (j <  i)       kd = k exp(b_end - b) decay = exp(b_end)
//
// ScalarGate: one gate per token or none; r is a matrix, and differences of b are taken in double.
// ChannelGate: one gate per channel; r may not be split into exp(b_i) exp(-b_j), which overflows.
// Sub-chunks of 16 instead: between sub-chunks every key is decayed to the end of its own and on to
// the start of the query's, inside a sub-chunk row by row; all are products of factors exp(g), so
// nothing overflows and no difference of large sums is taken.
//
// A gate below kReset resets: its factor is exactly 0.
#pragma once

#include "cpu/linear/delta_tiles.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// One chunk of one head, all buffers of one worker.
struct Chunk {
  int64_t n, live;  // tokens, and those rounded up to kSub
  int64_t dim;      // of keys
  float scale;
  float *q_rows, *k_rows;  // rows [kChunk][padded dim]
  float *q, *k;            // tiles: plain (ScalarGate) or decayed from their sub-chunk's start
  float *qg, *kg, *kd;     // tiles
  float *scores, *erase;   // squares, zeros above the diagonal
  float *whole, *part;     // [padded dim]: what the state keeps, as in `Kept`
  float beta[kChunk];

  AF_INLINE_MEMBER void take(Arena& arena, int64_t key_dim, float factor) {
    dim = key_dim;
    scale = factor;
    take_floats(arena, kChunk * padded_dim(dim), q_rows, k_rows);
    take_floats(arena, tile_floats(dim), q, k, qg, kg, kd);
    take_floats(arena, kSquare, scores, erase);
    take_floats(arena, padded_dim(dim), whole, part);
  }

  AF_INLINE_MEMBER void keep(int64_t d, VecF log_decay) {
    const Kept kept = kept_of(log_decay);
    store(whole + d, kept.whole), store(part + d, kept.part);
  }
};

struct ScalarGate {
  float* ratio;                              // square r_ij, zeros above the diagonal
  float from_start[kChunk], to_end[kChunk];  // exp(b), exp(b_end - b)
  float log_decay;                           // b_end

  AF_INLINE_MEMBER void take(Arena& arena, int64_t) { ratio = arena.take<float>(kSquare); }

  // g: of the first token, gates of one head lie `stride` apart; null is no gate.
  AF_INLINE_MEMBER void read(const float* g, int64_t stride, int64_t n, int64_t live) {
    double b[kChunk], sum = 0.0;
    for (int64_t i = 0; i < live; ++i) {
      if (g && i < n) sum += g[i * stride] < kReset ? kReset : g[i * stride];
      b[i] = sum;
    }
    log_decay = static_cast<float>(sum);
    for (int64_t i = 0; i < live; ++i) {
      float* row = ratio + i * kChunk;
      for (int64_t j = 0; j < live; ++j) row[j] = static_cast<float>(kLog2E * (b[i] - b[j]));
      for (int64_t j = 0; j < live; j += kLanes) {
        // Masked before exp2: above the diagonal the difference is positive.
        VecF r = exp2(keep_up_to(i, j, load(row + j)));
        store(row + j, keep_up_to(i, j, r));
      }
    }
    for (int64_t i = 0; i < live; ++i) {
      from_start[i] = decay_of(splat(static_cast<float>(b[i])))[0];
      to_end[i] = ratio[(live - 1) * kChunk + i];
    }
  }

  // Everything of the chunk, or without kQueries what moves its state alone.
  template <bool kQueries>
  AF_INLINE_MEMBER void prepare(Chunk& c) {
    const int64_t padded = padded_dim(c.dim);
    transpose(c.k_rows, padded, c.live, padded, c.k, kChunk);
    tile_square<kChunk>(c.live, c.dim, c.k, c.k, c.erase);
    weigh(c, -1.0f, 1, c.erase);
    scale_tile(c, c.k, from_start, -1.0f, c.kg);
    scale_tile(c, c.k, to_end, 1.0f, c.kd);
    for (int64_t d = 0; d < padded; d += kLanes) c.keep(d, splat(log_decay));
    if (!kQueries) return;
    transpose(c.q_rows, padded, c.live, padded, c.q, kChunk);
    tile_square<kChunk>(c.live, c.dim, c.q, c.k, c.scores);
    weigh(c, c.scale, 0, c.scores);
    scale_tile(c, c.q, from_start, c.scale, c.qg);
  }

  // square_ij *= factor r_ij for j <= i - below, the others become zeros.
  AF_INLINE_MEMBER void weigh(const Chunk& c, float factor, int64_t below, float* square) const {
    for (int64_t i = 0; i < c.live; ++i) {
      for (int64_t j = 0; j < c.live; j += kLanes) {
        const int64_t at = i * kChunk + j;
        VecF x = load(square + at) * load(ratio + at) * splat(factor);
        store(square + at, keep_up_to(i - below, j, x));
      }
    }
  }

  // out[d][i] = in[d][i] factor[i] sign
  AF_INLINE_MEMBER static void scale_tile(const Chunk& c, const float* in, const float* factor,
                                          float sign, float* out) {
    for (int64_t i = 0; i < c.live; i += kLanes) {
      VecF f = load(factor + i) * splat(sign);
      for (int64_t d = 0; d < c.dim; ++d) {
        const int64_t at = d * kChunk + i;
        store(out + at, load(in + at) * f);
      }
    }
  }
};

struct ChannelGate {
  int64_t dim;
  float *step, *from_start, *to_end;  // rows: exp(g), and its products within the sub-chunk
  float *total, *before;  // [sub-chunk][padded dim]: their products, and of those before
  float* log_decay;       // [padded dim]: sum of the gates
  float *rows, *window;   // scratch: rows [kChunk], [kSub] of padded dim

  AF_INLINE_MEMBER void take(Arena& arena, int64_t key_dim) {
    dim = key_dim;
    const int64_t ld = padded_dim(dim);
    take_floats(arena, kChunk * ld, step, from_start, to_end, rows);
    take_floats(arena, kSub * ld, total, before, window);
    log_decay = arena.take<float>(ld);
  }

  // g: gates [dim] of the first token, rows `stride` apart.
  AF_INLINE_MEMBER void read(const float* g, int64_t stride, int64_t n, int64_t live) {
    const int64_t ld = padded_dim(dim);
    load_rows(g, stride, n, live, dim, step, ld);
    for (int64_t d = 0; d < ld; d += kLanes) {
      VecF all = splat(1.0f), sum{};
      for (int64_t first = 0; first < live; first += kSub) {
        VecF product = splat(1.0f), rest = splat(1.0f);
        for (int64_t i = first; i < first + kSub; ++i) {
          const VecF gate = load(step + i * ld + d), factor = decay_of(gate);
          sum += gate;
          store(step + i * ld + d, factor);
          product *= factor;
          store(from_start + i * ld + d, product);
        }
        for (int64_t i = first + kSub - 1; i >= first; --i) {
          store(to_end + i * ld + d, rest);
          rest *= load(step + i * ld + d);
        }
        store(total + first / kSub * ld + d, product);
        store(before + first / kSub * ld + d, all);
        all *= product;
      }
      store(log_decay + d, sum);
    }
  }

  template <bool kQueries>
  AF_INLINE_MEMBER void prepare(Chunk& c) {
    const int64_t ld = padded_dim(dim), subs = c.live / kSub;
    if (kQueries) decayed_tile(c, c.q_rows, from_start, c.scale, c.q, c.qg);
    decayed_tile(c, c.k_rows, from_start, -1.0f, c.k, c.kg);
    decayed_tile(c, c.k_rows, to_end, 1.0f, c.kd, nullptr);
    for (int64_t s = 0; s < subs; ++s) {
      carry_keys(c.kd, s);
      if (kQueries) sub_rows(c, s, c.q, c.scores);
      sub_rows(c, s, c.k, c.erase);
      inside<kQueries>(c, s);
    }
    carry_keys(c.kd, subs);
    for (int64_t d = 0; d < ld; d += kLanes) c.keep(d, load(log_decay + d));
  }

  // Rows of sub-chunk s of a square: products with earlier sub-chunks, then zeros.
  AF_INLINE_MEMBER void sub_rows(const Chunk& c, int64_t s, const float* left, float* square) {
    float* block = square + s * kSub * kChunk;
    if (s > 0) {
      gemm<1, kChunk, kChunk>(kSub, vectors_of(s * kSub), dim, left + s * kSub, 1, c.kd, kNR, block,
                              kChunk, false);
    }
    for (int64_t i = 0; i < kSub; ++i) {
      for (int64_t j = s * kSub; j < c.live; j += kLanes) store(block + i * kChunk + j, VecF{});
    }
  }

  // tile = (in * factor * sign)^T; if asked for, `whole` is the same from the start of the chunk.
  AF_INLINE_MEMBER void decayed_tile(const Chunk& c, const float* in, const float* factor,
                                     float sign, float* tile, float* whole) {
    const int64_t ld = padded_dim(dim);
    for (int64_t at = 0; at < c.live * ld; at += kLanes) {
      store(rows + at, load(in + at) * load(factor + at) * splat(sign));
    }
    transpose(rows, ld, c.live, ld, tile, kChunk);
    if (whole) from_chunk_start(c, tile, whole);
  }

  AF_INLINE_MEMBER void from_chunk_start(const Chunk& c, const float* tile, float* whole) const {
    const int64_t ld = padded_dim(dim);
    for (int64_t d = 0; d < dim; ++d) {
      for (int64_t i = 0; i < c.live; i += kLanes) {
        const int64_t at = d * kChunk + i;
        store(whole + at, load(tile + at) * splat(before[i / kSub * ld + d]));
      }
    }
  }

  // Keys of the sub-chunks before s - 1, which stand at the end of s - 2, go to the end of s - 1.
  AF_INLINE_MEMBER void carry_keys(float* tile, int64_t s) {
    const int64_t ld = padded_dim(dim);
    if (s < 2) return;
    for (int64_t d = 0; d < dim; ++d) {
      const VecF factor = splat(total[(s - 1) * ld + d]);
      for (int64_t j = 0; j < (s - 1) * kSub; j += kLanes) {
        store(tile + d * kChunk + j, load(tile + d * kChunk + j) * factor);
      }
    }
  }

  // The diagonal blocks of sub-chunk s: keys decay along with the rows that read them.
  template <bool kQueries>
  AF_INLINE_MEMBER void inside(Chunk& c, int64_t s) {
    const int64_t ld = padded_dim(dim), first = s * kSub;
    for (int64_t i = 0; i < kSub; ++i) {
      const float* q = c.q_rows + (first + i) * ld;
      const float* k = c.k_rows + (first + i) * ld;
      advance(k, step + (first + i) * ld, i);
      VecF read[kSub] = {}, erased[kSub] = {};
      for (int64_t j = 0; j <= i; ++j) {
        VecF x{}, y{};
        for (int64_t d = 0; d < ld; d += kLanes) {
          VecF w = load(window + j * ld + d);
          if (kQueries) x = fma(w, load(q + d), x);
          y = fma(w, load(k + d), y);
        }
        read[j] = x, erased[j] = y;
      }
      for (int64_t j = 0; j < kSub; j += kLanes) {
        const int64_t at = (first + i) * kChunk + first + j;
        if (kQueries) store(c.scores + at, sum_each(read + j) * splat(c.scale));
        store(c.erase + at, keep_up_to(i - 1, j, sum_each(erased + j) * splat(-1.0f)));
      }
    }
  }

  // window[j] = keys j <= i of the sub-chunk, decayed to row i.
  AF_INLINE_MEMBER void advance(const float* k, const float* factor, int64_t i) {
    const int64_t ld = padded_dim(dim);
    for (int64_t d = 0; d < ld; d += kLanes) {
      const VecF f = load(factor + d);
      for (int64_t j = 0; j < i; ++j) store(window + j * ld + d, load(window + j * ld + d) * f);
      store(window + i * ld + d, load(k + d));
    }
  }
};

}  // namespace attnforge::cpu::ATTNFORGE_ISA
