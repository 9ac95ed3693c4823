// What forward and backward do with one chunk: read, prepare, solve, advance the state.
#pragma once

#include "cpu/linear/delta_gates.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// One head of one sequence: reads a chunk and prepares it for its gate.
template <class T, class Gate>
struct HeadChunks {
  const DeltaProblem& p;
  TokenSpan span;
  int64_t value_head;
  Chunk chunk;
  Gate gate;

  AF_INLINE_MEMBER HeadChunks(const DeltaProblem& problem, Arena& arena) : p(problem) {
    chunk.take(arena, p.key_dim, p.scale);
    gate.take(arena, p.key_dim);
  }

  AF_INLINE_MEMBER int64_t key_head() const { return value_head / (p.value_heads / p.heads); }
  AF_INLINE_MEMBER int64_t chunks() const { return ceil_div(span.rows, kChunk); }
  // Of [B, T, value_heads].
  AF_INLINE_MEMBER int64_t scalar_at(int64_t t) const {
    return (span.batch * p.rows + span.first + t) * p.value_heads + value_head;
  }

  // Reads a chunk; without kQueries only what moves the state is made.
  template <bool kQueries>
  AF_INLINE_MEMBER void prepare(int64_t index) {
    const int64_t t = index * kChunk, ld = padded_dim(p.key_dim);
    chunk.n = min64(kChunk, span.rows - t);
    chunk.live = round_up(chunk.n, kSub);
    if (kQueries) {
      load_rows(token_row<T>(p.q, span, key_head(), t), p.q.seq_stride, chunk.n, chunk.live,
                p.key_dim, chunk.q_rows, ld);
    }
    load_rows(token_row<T>(p.k, span, key_head(), t), p.k.seq_stride, chunk.n, chunk.live,
              p.key_dim, chunk.k_rows, ld);
    const int64_t at = scalar_at(t);
    for (int64_t i = 0; i < chunk.live; ++i) {
      chunk.beta[i] = i < chunk.n ? p.beta[at + i * p.value_heads] : 0.0f;
    }
    const int64_t width = p.channel_gates ? p.key_dim : 1;
    gate.read(p.g ? p.g + at * width : nullptr, p.value_heads * width, chunk.n, chunk.live);
    gate.template prepare<kQueries>(chunk);
  }

  // error = v - kg' S solved, write = beta error, for one panel of columns.
  AF_INLINE_MEMBER void solve(int64_t index, int64_t column, int64_t vectors, const float* state,
                              float* error, float* write) const {
    const T* v = token_row<T>(p.v, span, value_head, index * kChunk) + column;
    load_panel(v, p.v.seq_stride, chunk.n, chunk.live, p.value_dim - column, error);
    panel_product<1, kChunk>(chunk.live, vectors, p.key_dim, chunk.kg, state, error);
    solve_forward(chunk.live, vectors, chunk.erase, chunk.beta, error, write);
  }

  // state = decay state, of one panel.
  AF_INLINE_MEMBER void decay(float* state) const {
    for (int64_t k = 0; k < p.key_dim; ++k) {
      const Kept kept = {splat(chunk.whole[k]), splat(chunk.part[k])};
      float* row = state + k * kNR;
      store(row, kept(load(row), VecF{}));
      store(row + kLanes, kept(load(row + kLanes), VecF{}));
    }
  }

  // state = decay state + kd write
  AF_INLINE_MEMBER void advance(int64_t vectors, const float* write, float* state) const {
    decay(state);
    panel_product<kChunk, 1>(p.key_dim, vectors, chunk.live, chunk.kd, write, state);
  }
};

AF_INLINE int64_t panel_vectors(int64_t value_dim, int64_t column) {
  return min64(2, vectors_of(value_dim - column));
}

// f(element, gate): the types of a problem.
template <class F>
AF_INLINE void dispatch_problem(const DeltaProblem& p, const F& f) {
  dispatch_dtype(p.dtype, [&](auto element) {
    if (p.channel_gates) {
      f(element, ChannelGate{});
    } else {
      f(element, ScalarGate{});
    }
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
