// Backward of the delta rules: the chunks of a head from right to left, states made again.
//
// A forward walk keeps the state before every kReplay-th chunk. Then, segment by segment from the
// right, a second walk writes down the states and errors of its kReplay chunks, which stay in L2,
// and each chunk goes backward with dS, the gradient of its end state:
//
//   dwrite = scores^T dout + kd dS;   dwrite_j += sum_{i>j} erase_ij beta_i dwrite_i   (solved)
//   derror = beta dwrite = dv,   dbeta = <dwrite, error>
//   dscores = dout write^T,   derase = derror write^T
//   dqg = dout S^T,   dkg = derror S^T,   dkd = write dS^T,   ddecay = <dS, S> over values
//   dS  = decay dS + qg^T dout + kg^T derror
//
// and delta_gates_bwd.h takes it from there to q, k and gates. A task is a key head: the value
// heads that share it are walked in turn, so that dq and dk have one owner. Memory of a task: two
// segments' worth of states, one state per kReplay chunks, and with shared heads dq and dk in fp32.
// About 3.5 times the work of the forward.
#include "cpu/kernels.h"
#include "cpu/linear/delta_chunk.h"
#include "cpu/linear/delta_gates_bwd.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kReplay = 8;  // states of 64 x 64 and errors of 8 chunks are 256 KiB

struct BwdBuffers {
  ChunkGrads grads;
  float *state, *dstate;                        // states
  float* checkpoints;                           // states, one per segment
  float *states, *errors;                       // of a segment: states, panels
  float *dout, *write, *dwrite, *derror;        // one panel
  float *dout_tile, *write_tile, *derror_tile;  // its transposes [kNR][kChunk]
  float *ddecay, *end;                          // [padded dim]
  float *sum_dq, *sum_dk;                       // rows of the whole sequence, with shared heads
  float dbeta[kChunk];

  AF_INLINE_MEMBER BwdBuffers(const DeltaProblem& p, Arena& arena) {
    const int64_t floats = state_floats(p.key_dim, p.value_dim);
    const int64_t chunks = ceil_div(p.rows, kChunk);
    grads.take(arena, p.key_dim);
    take_floats(arena, floats, state, dstate);
    checkpoints = arena.take<float>(ceil_div(chunks, kReplay) * floats);
    states = arena.take<float>(min64(chunks, kReplay) * floats);
    errors = arena.take<float>(min64(chunks, kReplay) * panels_of(p.value_dim) * kPanel);
    take_floats(arena, kPanel, dout, write, dwrite, derror);
    take_floats(arena, kNR * kChunk + kSlack, dout_tile, write_tile, derror_tile);
    take_floats(arena, padded_dim(p.key_dim), ddecay, end);
    const bool shared = p.value_heads > p.heads;
    take_floats(arena, shared ? p.rows * padded_dim(p.key_dim) : 0, sum_dq, sum_dk);
  }
};

template <class T, class Gate>
struct HeadBackward {
  const DeltaChunkBwdParams& params;
  const DeltaProblem& p;
  HeadChunks<T, Gate> head;
  BwdBuffers b;
  int64_t floats, key_rows, panels;

  AF_INLINE_MEMBER HeadBackward(const DeltaChunkBwdParams& all, Arena& arena)
      : params(all), p(all.problem), head(p, arena), b(p, arena) {
    floats = state_floats(p.key_dim, p.value_dim);
    key_rows = tile_rows(p.key_dim);
    panels = panels_of(p.value_dim);
  }

  // All panels of one chunk: errors and the state behind it.
  AF_INLINE_MEMBER void walk(int64_t index, float* error) {
    head.template prepare<false>(index);
    for (int64_t n = 0; n < panels; ++n, error += kPanel) {
      float* state = b.state + n * key_rows * kNR;
      const int64_t vectors = panel_vectors(p.value_dim, n * kNR);
      head.solve(index, n * kNR, vectors, state, error, b.write);
      head.advance(vectors, b.write, state);
    }
  }

  void run(int64_t task) {
    const int64_t group = p.value_heads / p.heads;
    const int64_t sequence = task / p.heads, key_head = task % p.heads;
    head.span = token_span(p.cu_seqlens, p.rows, sequence);
    for (int64_t member = 0; member < group; ++member) {
      head.value_head = key_head * group + member;
      const int64_t at = (sequence * p.value_heads + head.value_head) * p.key_dim * p.value_dim;
      run_value_head(at, member == 0, member == group - 1);
    }
  }

  AF_INLINE_MEMBER void run_value_head(int64_t state_at, bool first, bool last) {
    const int64_t chunks = head.chunks(), segments = ceil_div(chunks, kReplay);
    load_state(p.initial_state ? p.initial_state + state_at : nullptr, p.key_dim, p.value_dim, 0,
               p.value_dim, b.state);
    for (int64_t s = 0; s < segments; ++s) {
      __builtin_memcpy(b.checkpoints + s * floats, b.state, floats * sizeof(float));
      if (s + 1 == segments) break;
      for (int64_t n = 0; n < kReplay; ++n) walk(s * kReplay + n, b.errors);
    }
    load_state(params.dfinal_state ? params.dfinal_state + state_at : nullptr, p.key_dim,
               p.value_dim, 0, p.value_dim, b.dstate);
    for (int64_t s = segments - 1; s >= 0; --s) {
      const int64_t count = min64(kReplay, chunks - s * kReplay);
      __builtin_memcpy(b.state, b.checkpoints + s * floats, floats * sizeof(float));
      for (int64_t n = 0; n < count; ++n) {
        __builtin_memcpy(b.states + n * floats, b.state, floats * sizeof(float));
        walk(s * kReplay + n, b.errors + n * panels * kPanel);
      }
      for (int64_t n = count - 1; n >= 0; --n) {
        const int64_t index = s * kReplay + n;
        head.template prepare<true>(index);
        backward(index, b.states + n * floats, b.errors + n * panels * kPanel);
        finish(index, first, last);
      }
    }
    if (params.dinitial_state) {
      store_state(b.dstate, p.key_dim, p.value_dim, 0, p.value_dim,
                  params.dinitial_state + state_at);
    }
  }

  AF_INLINE_MEMBER void backward(int64_t index, const float* states, const float* errors) {
    const Chunk& c = head.chunk;
    const int64_t t = index * kChunk;
    fill_zero(b.ddecay, padded_dim(p.key_dim));
    for (int64_t i = 0; i < kChunk; ++i) b.dbeta[i] = 0.0f;
    for (int64_t n = 0; n < panels; ++n) {
      const int64_t column = n * kNR, columns = min64(kNR, p.value_dim - column);
      const int64_t vectors = panel_vectors(p.value_dim, column);
      const float *state = states + n * key_rows * kNR, *error = errors + n * kPanel;
      float* dstate = b.dstate + n * key_rows * kNR;
      load_panel(token_row<T>(params.dout, head.span, head.value_head, t) + column,
                 params.dout.seq_stride, c.n, c.live, columns, b.dout);
      for (int64_t i = 0; i < c.live; ++i) {
        for (int64_t d = i * kNR; d < (i + 1) * kNR; d += kLanes) {
          store(b.write + d, load(error + d) * splat(c.beta[i]));
        }
      }
      fill_zero(b.dwrite, kPanel);
      upper_product(c.live, vectors, c.scores, b.dout, b.dwrite);
      panel_product<1, kChunk>(c.live, vectors, p.key_dim, c.kd, dstate, b.dwrite);
      solve_backward(c.live, vectors, c.erase, c.beta, b.dwrite, b.derror);
      store_rows(b.derror, kNR, c.n, columns,
                 token_row<T>(params.dv, head.span, head.value_head, t) + column,
                 params.dv.seq_stride);
      for (int64_t i = 0; i < c.live; ++i) {
        b.dbeta[i] += dot(b.dwrite + i * kNR, error + i * kNR, vectors);
      }
      for (int64_t k = 0; k < p.key_dim; ++k) {
        b.ddecay[k] += dot(dstate + k * kNR, state + k * kNR, vectors);
      }
      products(columns, n > 0, state, dstate);
      decay_state(vectors, dstate);
    }
  }

  AF_INLINE_MEMBER static float dot(const float* x, const float* y, int64_t vectors) {
    VecF sum = load(x) * load(y);
    if (vectors == 2) sum = fma(load(x + kLanes), load(y + kLanes), sum);
    return reduce_add(sum);
  }

  // What one panel of values adds to the gradients over channels and token pairs.
  AF_INLINE_MEMBER void products(int64_t columns, bool add, const float* state,
                                 const float* dstate) {
    const int64_t live = head.chunk.live, vectors = vectors_of(live), k = p.key_dim;
    ChunkGrads& g = b.grads;
    transpose(b.dout, kNR, live, kNR, b.dout_tile, kChunk);
    transpose(b.write, kNR, live, kNR, b.write_tile, kChunk);
    transpose(b.derror, kNR, live, kNR, b.derror_tile, kChunk);
    tile_square<kChunk>(live, columns, b.dout_tile, b.write_tile, g.dscores, add);
    tile_square<kChunk>(live, columns, b.derror_tile, b.write_tile, g.derase, add);
    auto by_state = [&](const float* s, const float* tile,
                        float* out) __attribute__((always_inline)) {
      gemm<kNR, 1, kChunk>(k, vectors, columns, s, kNR, tile, kNR, out, kChunk, add);
    };
    by_state(state, b.dout_tile, g.dqg);
    by_state(state, b.derror_tile, g.dkg);
    by_state(dstate, b.write_tile, g.dkd);
  }

  // dS of the chunk's end becomes that of its start.
  AF_INLINE_MEMBER void decay_state(int64_t vectors, float* dstate) {
    const Chunk& c = head.chunk;
    head.decay(dstate);
    panel_product<kChunk, 1>(p.key_dim, vectors, c.live, c.qg, b.dout, dstate);
    panel_product<kChunk, 1>(p.key_dim, vectors, c.live, c.kg, b.derror, dstate);
  }

  // From the products to dq, dk, dg and dbeta in memory.
  AF_INLINE_MEMBER void finish(int64_t index, bool first, bool last) {
    const Chunk& c = head.chunk;
    ChunkGrads& g = b.grads;
    const int64_t t = index * kChunk, ld = padded_dim(p.key_dim), at = head.scalar_at(t);
    for (int64_t i = 0; i < c.n; ++i) params.dbeta[at + i * p.value_heads] = b.dbeta[i];
    fill_zero(b.end, ld);
    for (int64_t d = 0; d < p.key_dim; ++d) {
      VecF sum{};
      for (int64_t i = 0; i < c.live; i += kLanes) {
        sum = fma(load(c.kd + d * kChunk + i), load(g.dkd + d * kChunk + i), sum);
      }
      b.end[d] = (c.whole[d] + c.part[d]) * b.ddecay[d] + reduce_add(sum);
    }
    intra_backward(head.gate, c, g);
    const int64_t gate_at = at * (p.channel_gates ? p.key_dim : 1);
    if (params.dg) gate_gradient(p.g + gate_at, params.dg + gate_at);
    for (int64_t x = 0; x < c.live * ld; x += kLanes) {
      store(g.dk_read + x, load(g.dk_read + x) + load(g.dk_write + x));
    }
    emit(g.dq, b.sum_dq, params.dq, t, first, last);
    emit(g.dk_read, b.sum_dk, params.dk, t, first, last);
  }

  // rows into a tensor of key heads, over the value heads that share one.
  AF_INLINE_MEMBER void emit(float* rows, float* sums, const TensorRef& out, int64_t t, bool first,
                             bool last) {
    const Chunk& c = head.chunk;
    const int64_t ld = padded_dim(p.key_dim);
    float* sum = sums + t * ld;
    for (int64_t x = 0; !first && x < c.n * ld; x += kLanes) {
      store(rows + x, load(rows + x) + load(sum + x));
    }
    if (!last) {
      __builtin_memcpy(sum, rows, c.n * ld * sizeof(float));
      return;
    }
    store_rows(rows, ld, c.n, p.key_dim, token_row<T>(out, head.span, head.key_head(), t),
               out.seq_stride);
  }

  // dg = reverse sum of q dq + k dk_read - k dk_write, to which the end of the chunk adds `end`. A
  // reset has none: what the sum leaves there is rounding.
  AF_INLINE_MEMBER void gate_gradient(const float* gates, float* dg) {
    const Chunk& c = head.chunk;
    const ChunkGrads& g = b.grads;
    const int64_t ld = padded_dim(p.key_dim);
    auto part = [&](int64_t x) __attribute__((always_inline)) {
      VecF q = load(c.q_rows + x) * load(g.dq + x);
      return fma(load(c.k_rows + x), load(g.dk_read + x) - load(g.dk_write + x), q);
    };
    if (p.channel_gates) {
      for (int64_t d = 0; d < p.key_dim; d += kLanes) {
        VecF sum = load(b.end + d);
        for (int64_t i = c.live - 1; i >= 0; --i) {
          sum += part(i * ld + d);
          if (i >= c.n) continue;
          const int64_t at = i * p.value_heads * p.key_dim + d, left = p.key_dim - d;
          const VecF gate = load_partial(gates + at, left);
          store_partial(dg + at, gate < splat(kReset) ? VecF{} : sum, left);
        }
      }
      return;
    }
    double sum = 0.0;
    for (int64_t d = 0; d < p.key_dim; ++d) sum += b.end[d];
    for (int64_t i = c.live - 1; i >= 0; --i) {
      VecF row{};
      for (int64_t d = 0; d < ld; d += kLanes) row += part(i * ld + d);
      sum += reduce_add(row);
      if (i >= c.n) continue;
      const int64_t at = i * p.value_heads;
      dg[at] = gates[at] < kReset ? 0.0f : static_cast<float>(sum);
    }
  }
};

int64_t worker_bytes(const DeltaChunkBwdParams& params) {
  Arena arena = {nullptr};
  dispatch_problem(params.problem, [&](auto element, auto gate) {
    HeadBackward<decltype(element), decltype(gate)> head(params, arena);
  });
  return arena.used;
}

}  // namespace

int64_t delta_chunk_bwd_workspace(const DeltaChunkBwdParams& params, int64_t num_threads) {
  return num_threads * worker_bytes(params);
}

void delta_chunk_bwd(const DeltaChunkBwdParams& params, const Workers& workers) {
  const DeltaProblem& p = params.problem;
  const int64_t bytes = worker_bytes(params);
  dispatch_problem(p, [&](auto element, auto gate) {
    parallel_tasks(workers, p.sequences * p.heads, [&](int64_t task, int64_t worker) {
      FlushDenormals flush;
      Arena arena = {static_cast<char*>(params.workspace) + worker * bytes};
      HeadBackward<decltype(element), decltype(gate)> head(params, arena);
      head.run(task);
    });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
