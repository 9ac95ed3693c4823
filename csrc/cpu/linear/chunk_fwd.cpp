// Additive recurrence, forward: o_t = scale q_t^T S_t, S_t = decay_t S_{t-1} + k_t v_t^T.
//
// Algorithm (Yang et al., 2024, chunkwise form, with chunks of four tokens held in registers): see
// scan.h, scan_group.h, scan_tile.h. With a state in L1 there is nothing to win by longer chunks:
// their products inside a chunk grow with its length, while a row of the state, once loaded, is
// used 8 times already by four tokens.
//   tasks   (sequence, value head), split by columns of the state where there are few: columns are
//           independent, so the numbers do not depend on the split
//   flops   4 K V per token and value head for the state, and of the order of 32 (K + V) beside it
//   bytes   q, k, v, gates, out once; states once per sequence
//   memory  per thread a state in fp32, the coefficients of 32 tokens and their rows of v and o
#include "cpu/kernels.h"
#include "cpu/linear/scan.h"
#include "cpu/micro/denormals.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

struct Scratch {
  float* state;
  Block block;
  float* z;

  Scratch(Arena arena, const LinearProblem& p)
      : state(arena.take<float>(round_up(p.key_dim, kLanes) * round_up(p.value_dim, kTile))),
        block(take_block(arena, p.key_dim, p.value_dim)),
        z(arena.take<float>(round_up(p.key_dim, kLanes))),
        bytes(arena.used) {}
  int64_t bytes;
};

struct Plan {
  int64_t tiles, splits;

  Plan(const LinearProblem& p, int64_t threads) : tiles(ceil_div(p.value_dim, kTile)) {
    const int64_t heads = max64(1, p.sequences * p.value_heads);
    splits = max64(1, min64(tiles, ceil_div(2 * threads, heads)));
    if (heads >= threads) splits = 1;
  }
};

template <DecayOn kOn, class T>
AF_INLINE void forward_head(const LinearFwdParams& params, int64_t sequence, int64_t head,
                            int64_t tile0, int64_t tile1, const Scratch& w) {
  const LinearProblem& p = params.problem;
  const TokenSpan span = token_span(p.cu_seqlens, p.rows, sequence);
  const int64_t shared = head / (p.value_heads / p.heads), state = sequence * p.value_heads + head;
  const int64_t stat = span.batch * p.rows * p.value_heads + head;
  Scan<T> scan{rows_of<T>(p.q, span, shared, p.key_dim), rows_of<T>(p.k, span, shared, p.key_dim),
               rows_of<T>(p.v, span, head, p.value_dim), decay_of_head(p, span, head, false)};
  scan.read.scale = p.scale;
  scan.begin = span.first, scan.end = span.end();
  if (p.normalize != LinearNorm::kNone) {
    scan.norm = {w.z, tile0 == 0 ? params.den + stat : nullptr, p.value_heads, p.normalize, p.eps};
    for (int64_t i = 0; i < round_up(p.key_dim, kLanes); ++i) {
      w.z[i] = p.initial_z && i < p.key_dim ? p.initial_z[state * p.key_dim + i] : 0.0f;
    }
  }
  const auto ref = [&](const float* data) __attribute__((always_inline)) {
    float* own = data ? const_cast<float*>(data) + state * p.key_dim * p.value_dim : nullptr;
    return StateRef{own, nullptr, p.value_dim, 1};
  };
  Sink<T> sink;
  sink.out = row_ptr<T>(params.out, span.batch, 0, head), sink.stride = params.out.seq_stride;
  if (params.out_lo.data) {
    sink.lo = row_ptr<T>(params.out_lo, span.batch, 0, head);
    sink.lo_stride = params.out_lo.seq_stride;
  }
  sink.dim = p.value_dim;

  const int64_t tile_size = round_up(p.key_dim, kLanes) * kTile;
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    load_state(ref(p.initial_state), p.key_dim, p.key_dim, p.value_dim, tile,
               w.state + (tile - tile0) * tile_size);
  }
  for_walks(p.causal, [&](Walk walk) __attribute__((always_inline)) {
    scan.walk = walk;
    for (int64_t step = 0; step < scan.length(); step += kBlock) {
      run_block<kOn>(scan, step, tile0, tile1, w.block, w.state, tile_size, sink);
    }
  });
  if (params.final_state) {
    for (int64_t tile = tile0; tile < tile1; ++tile) {
      store_state(ref(params.final_state), p.key_dim, p.key_dim, p.value_dim, tile,
                  w.state + (tile - tile0) * tile_size, nullptr, nullptr);
    }
  }
  if (params.final_z && tile0 == 0) {
    for (int64_t i = 0; i < p.key_dim; ++i) params.final_z[state * p.key_dim + i] = w.z[i];
  }
}

}  // namespace

int64_t linear_chunk_fwd_workspace(const LinearFwdParams& params, int64_t num_threads) {
  return Scratch({nullptr}, params.problem).bytes * num_threads;
}

void linear_chunk_fwd(const LinearFwdParams& params, const Workers& workers) {
  const LinearProblem& p = params.problem;
  const Plan plan(p, workers.num_threads);
  const int64_t bytes = linear_chunk_fwd_workspace(params, 1);
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_tasks(
        workers, p.sequences * p.value_heads * plan.splits, [&](int64_t task, int64_t worker) {
          const FlushDenormals guard;
          const int64_t part = task % plan.splits, head = task / plan.splits % p.value_heads;
          const int64_t sequence = task / plan.splits / p.value_heads;
          const Scratch w({static_cast<char*>(params.workspace) + worker * bytes}, p);
          with_decay(decay_on(p.gate_kind, false), [&](auto on) {
            forward_head<decltype(on)::kOn, T>(params, sequence, head,
                                               plan.tiles * part / plan.splits,
                                               plan.tiles * (part + 1) / plan.splits, w);
          });
        });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
