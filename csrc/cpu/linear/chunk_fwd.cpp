// Additive recurrence, forward: o_t = scale q_t^T S_t, S_t = decay_t S_{t-1} + k_t v_t^T.
//
// See scan.h: by chunks as products of matrices without a gate or with one per token
// (scan_chunk.h), by four tokens with gates of channels (scan_group.h, scan_tile.h).
//   tasks   some value heads of a sequence side by side, or one split by columns of the state where
//           there are few: heads and columns are independent, the numbers do not depend on it
//   flops   4 K V per token and value head for the state, and of the order of kBlock (K + V) beside
//   bytes   q, k, v, gates, out once; states once per sequence
//   memory  per thread the states of its heads in fp32 and what scan.h keeps of a block of tokens
#include "cpu/kernels.h"
#include "cpu/linear/scan.h"
#include "cpu/micro/denormals.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

// A task walks some heads of a sequence side by side, or some columns of one head.
struct Plan {
  int64_t heads, parts, splits;

  Plan(const LinearProblem& p, int64_t threads) {
    const int64_t all = max64(1, p.sequences * p.value_heads);
    const int64_t tiles = ceil_div(p.value_dim, kTile);
    splits = all >= threads ? 1 : max64(1, min64(tiles, ceil_div(2 * threads, all)));
    heads = heads_abreast(p.sequences, p.value_heads,
                          room_for(p.key_dim) * round_up(p.value_dim, kTile), threads);
    parts = p.value_heads / heads;
  }
};

struct Scratch {
  float* states;
  Block block;
  float* zs;
  int64_t state_size, z_size, bytes;

  Scratch(Arena arena, const LinearProblem& p, const Plan& plan)
      : state_size(room_for(p.key_dim) * round_up(p.value_dim, kTile)),
        z_size(round_up(p.key_dim, kLanes)) {
    states = arena.take<float>(plan.heads * state_size);
    block = take_block(arena, p, p.key_dim, p.value_dim);
    zs = arena.take<float>(plan.heads * z_size);
    bytes = arena.used;
  }
};

// One head of a task.
template <class T>
struct Head {
  const LinearFwdParams& params;
  int64_t sequence, head;
  TokenSpan span;
  float *states, *z;

  AF_INLINE_MEMBER const LinearProblem& p() const { return params.problem; }
  AF_INLINE_MEMBER int64_t state() const { return sequence * p().value_heads + head; }
  AF_INLINE_MEMBER StateRef state_ref(const float* data) const {
    float* own = data ? const_cast<float*>(data) + state() * p().key_dim * p().value_dim : nullptr;
    return {own, nullptr, p().value_dim, 1};
  }
  AF_INLINE_MEMBER Scan<T> scan(bool writes_den) const {
    const int64_t shared = head / (p().value_heads / p().heads);
    Scan<T> scan{
        rows_of<T>(p().q, span, shared, p().key_dim), rows_of<T>(p().k, span, shared, p().key_dim),
        rows_of<T>(p().v, span, head, p().value_dim), decay_of_head(p(), span, head, false)};
    scan.read.scale = p().scale;
    scan.begin = span.first, scan.end = span.end();
    if (p().normalize == LinearNorm::kNone) return scan;
    float* den = params.den + span.batch * p().rows * p().value_heads + head;
    scan.norm = {z, writes_den ? den : nullptr, p().value_heads, p().normalize, p().eps};
    return scan;
  }
  AF_INLINE_MEMBER Sink<T> sink() const {
    Sink<T> sink;
    sink.out = row_ptr<T>(params.out, span.batch, 0, head), sink.stride = params.out.seq_stride;
    if (params.out_lo.data) {
      sink.lo = row_ptr<T>(params.out_lo, span.batch, 0, head);
      sink.lo_stride = params.out_lo.seq_stride;
    }
    sink.dim = p().value_dim;
    sink.large = streamed<T>(params.out, token_rows(p()), p().value_heads, sink.dim);
    return sink;
  }
};

// Heads [head0, head0 + heads), tiles [tile0, tile1).
template <class T>
AF_INLINE void forward_heads(const LinearFwdParams& params, int64_t sequence, int64_t head0,
                             int64_t heads, int64_t tile0, int64_t tile1, Scratch& w) {
  const LinearProblem& p = params.problem;
  const DecayOn on = decay_on(p.gate_kind, false);
  const TokenSpan span = token_span(p.cu_seqlens, p.rows, sequence);
  const int64_t tile_size = room_for(p.key_dim) * kTile;
  const auto head_of = [&](int64_t g) __attribute__((always_inline)) {
    return Head<T>{
        params, sequence, head0 + g, span, w.states + g * w.state_size, w.zs + g * w.z_size};
  };
  for (int64_t g = 0; g < heads; ++g) {
    const Head<T> h = head_of(g);
    for (int64_t tile = tile0; tile < tile1; ++tile) {
      load_state(h.state_ref(p.initial_state), p.key_dim, p.key_dim, p.value_dim, tile,
                 h.states + (tile - tile0) * tile_size);
    }
    for (int64_t i = 0; i < w.z_size; ++i) {
      const bool given = p.initial_z && i < p.key_dim;
      h.z[i] = given ? p.initial_z[h.state() * p.key_dim + i] : 0.0f;
    }
  }
  for_walks(p.causal, [&](Walk walk) __attribute__((always_inline)) {
    for (int64_t step = 0; step < span.rows; step += kBlock) {
      for (int64_t g = 0; g < heads; ++g) {
        const Head<T> h = head_of(g);
        Scan<T> scan = h.scan(tile0 == 0);
        scan.walk = walk;
        run_block(on, scan, step, tile0, tile1, w.block, h.states, tile_size, h.sink());
      }
    }
  });
  for (int64_t g = 0; g < heads; ++g) {
    const Head<T> h = head_of(g);
    for (int64_t tile = tile0; params.final_state && tile < tile1; ++tile) {
      store_state(h.state_ref(params.final_state), p.key_dim, p.key_dim, p.value_dim, tile,
                  h.states + (tile - tile0) * tile_size, nullptr, nullptr);
    }
    for (int64_t i = 0; params.final_z && tile0 == 0 && i < p.key_dim; ++i) {
      params.final_z[h.state() * p.key_dim + i] = h.z[i];
    }
  }
}

}  // namespace

int64_t linear_chunk_fwd_workspace(const LinearFwdParams& params, int64_t num_threads) {
  const Plan plan(params.problem, num_threads);
  return Scratch({nullptr}, params.problem, plan).bytes * num_threads;
}

void linear_chunk_fwd(const LinearFwdParams& params, const Workers& workers) {
  const LinearProblem& p = params.problem;
  const Plan plan(p, workers.num_threads);
  const int64_t bytes = Scratch({nullptr}, p, plan).bytes, tiles = ceil_div(p.value_dim, kTile);
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_tasks(
        workers, p.sequences * plan.parts * plan.splits, [&](int64_t task, int64_t worker) {
          const FlushDenormals guard;
          const int64_t split = task % plan.splits, part = task / plan.splits % plan.parts;
          Scratch w({static_cast<char*>(params.workspace) + worker * bytes}, p, plan);
          forward_heads<T>(params, task / plan.splits / plan.parts, part * plan.heads, plan.heads,
                           tiles * split / plan.splits, tiles * (split + 1) / plan.splits, w);
          end_stream();
        });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
