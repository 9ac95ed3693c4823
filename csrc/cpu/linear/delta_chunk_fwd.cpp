// Forward of the delta rules (DeltaNet, Gated DeltaNet, KDA), chunk by chunk.
//
// In a chunk with start state S (delta_gates.h has the names), for every panel of value columns:
//
//   error = v + kg S            what the state of each token lacks of its value,
//   error_i += sum_{j<i} erase_ij beta_j error_j       solved by block forward substitution
//   out   = qg S + scores (beta error)
//   S     = decay S + kd^T (beta error)
//
// The inverse of the triangular matrix is never formed, and no chunk state leaves the cache. A task
// is a head of a sequence; where there are fewer of them than threads its panels of columns are
// dealt out, which only repeats the work on keys. Per token and head about
// 2 (3 K V + C (K + V)) flops with C = 64, from q, k, v, gates and out once each.
//
// After "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (Yang et al.
// 2024), "Gated Delta Networks" (2024) and "Kimi Linear" (2025).
#include "cpu/kernels.h"
#include "cpu/linear/delta_chunk.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

struct FwdPlan {
  int64_t splits;  // tasks of one head
  int64_t panels;  // of one task
  int64_t worker_bytes;
};

struct FwdBuffers {
  float *state, *error, *write, *out;

  AF_INLINE_MEMBER FwdBuffers(const DeltaProblem& p, int64_t panels, Arena& arena) {
    state = arena.take<float>(panels * tile_rows(p.key_dim) * kNR);
    error = arena.take<float>(kPanel);
    write = arena.take<float>(kPanel);
    out = arena.take<float>(kPanel);
  }
};

FwdPlan make_plan(const DeltaProblem& p, int64_t threads) {
  FwdPlan plan;
  const int64_t heads = max64(1, p.sequences * p.value_heads), panels = panels_of(p.value_dim);
  plan.panels = ceil_div(panels, min64(panels, ceil_div(threads, heads)));
  plan.splits = ceil_div(panels, plan.panels);
  Arena arena = {nullptr};
  dispatch_problem(p, [&](auto element, auto gate) {
    HeadChunks<decltype(element), decltype(gate)> head(p, arena);
    FwdBuffers buffers(p, plan.panels, arena);
  });
  plan.worker_bytes = arena.used;
  return plan;
}

template <class T, class Gate>
void run_head(const DeltaChunkFwdParams& params, const FwdPlan& plan, int64_t task, char* scratch) {
  const DeltaProblem& p = params.problem;
  Arena arena = {scratch};
  HeadChunks<T, Gate> head(p, arena);
  FwdBuffers b(p, plan.panels, arena);
  const int64_t index = task / plan.splits, sequence = index / p.value_heads;
  head.value_head = index % p.value_heads;
  head.span = token_span(p.cu_seqlens, p.rows, sequence);
  const int64_t first = task % plan.splits * plan.panels * kNR;
  const int64_t end = min64(p.value_dim, first + plan.panels * kNR);
  const int64_t state_at = index * p.key_dim * p.value_dim;
  load_state(p.initial_state ? p.initial_state + state_at : nullptr, p.key_dim, p.value_dim, first,
             end, b.state);
  for (int64_t i = 0; i < head.chunks(); ++i) {
    head.template prepare<true>(i);
    const Chunk& c = head.chunk;
    float* state = b.state;
    for (int64_t column = first; column < end; column += kNR) {
      const int64_t vectors = panel_vectors(p.value_dim, column);
      head.solve(i, column, vectors, state, b.error, b.write);
      gemm<1, kChunk>(c.live, vectors, p.key_dim, c.qg, 1, state, 0, b.out, kNR, false);
      lower_product(c.live, vectors, c.scores, b.write, b.out);
      store_rows(b.out, kNR, c.n, min64(kNR, p.value_dim - column),
                 token_row<T>(params.out, head.span, head.value_head, i * kChunk) + column,
                 params.out.seq_stride);
      head.advance(vectors, b.write, state);
      state += tile_rows(p.key_dim) * kNR;
    }
  }
  if (params.final_state) {
    store_state(b.state, p.key_dim, p.value_dim, first, end, params.final_state + state_at);
  }
}

}  // namespace

int64_t delta_chunk_fwd_workspace(const DeltaChunkFwdParams& params, int64_t num_threads) {
  return num_threads * make_plan(params.problem, num_threads).worker_bytes;
}

void delta_chunk_fwd(const DeltaChunkFwdParams& params, const Workers& workers) {
  const DeltaProblem& p = params.problem;
  const FwdPlan plan = make_plan(p, workers.num_threads);
  dispatch_problem(p, [&](auto element, auto gate) {
    parallel_tasks(workers, p.sequences * p.value_heads * plan.splits,
                   [&](int64_t task, int64_t worker) {
                     FlushDenormals flush;
                     run_head<decltype(element), decltype(gate)>(
                         params, plan, task,
                         static_cast<char*>(params.workspace) + worker * plan.worker_bytes);
                   });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
