// Additive recurrence, backward. With dS_t = decay_{t+1} dS_{t+1} + scale q_t dO_t^T,
//   dq_t = scale S_t dO_t    dk_t = dS_t v_t    dv_t = dS_t^T k_t    dS_{-1} = decay_0 dS_0
//   dgate_t = sum_{i >= t} (q_i . dq_i - k_i . dk_i) + <dS_T, S_T>   (per channel for vector gates)
//
// Each is a walk of the recurrence with exchanged roles (scan.h), so nothing is stored between
// forward and backward, and no state or gradient of a state goes to memory: dq rebuilds S^T from
// the left, dk and dv build dS^T and dS from the right. A gate of value channels takes o . dO and
// v . dv instead, for which o is rebuilt in fp32.
//
// With a denominator, dO is divided by it and the column of ones that v has in mind makes one more
// row of S^T, z, whose share of dO is -<dO, o> / d (LinearNorm).
//   phases  1  per row: 1 / d and the share of the ones column
//           2  per (sequence, head of q, columns): dq, then dk; the value heads of a group add up
//              per (sequence, value head, columns): dv
//           3  per (sequence, value head): sums over time for a gate that is one number
//   flops   12 K V per token and value head; 16 K V with a gate of value channels
//   bytes   q, k, v, dO read three times at most; gradients once
//   memory  per thread the states of a group of heads; 8 bytes per row with a denominator, 8 per
//           row and tile of columns with a gate per token
#include "cpu/kernels.h"
#include "cpu/linear/scan.h"
#include "cpu/micro/denormals.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

struct Scratch {
  float* states;  // of a group of heads, or of one head
  Block block;
  float* sums;     // [kBlock][columns]
  float* running;  // [heads][2][columns]
  float* factors;  // [rows or columns]

  Scratch(Arena arena, const LinearProblem& p) {
    const int64_t group = p.value_heads / p.heads;
    const int64_t k = round_up(p.key_dim, kTile), v = round_up(p.value_dim, kTile);
    const int64_t with_ones = room_for(p.value_dim + 1);
    states = arena.take<float>(max64(group * with_ones * k, room_for(p.key_dim) * v));
    block = take_block(arena, p, max64(p.key_dim, p.value_dim + 1), max64(k, v));
    sums = arena.take<float>(kBlock * k);
    running = arena.take<float>(max64(group * 2 * k, 2 * v));
    factors = arena.take<float>(max64(k, v));
    bytes = arena.used;
  }
  int64_t bytes;
};

// What tasks share: statistics of rows, and sums over columns for a gate per token.
struct Shared {
  float *inverse = nullptr, *ones = nullptr;   // [B, T, value_heads]
  float *q_sums = nullptr, *k_sums = nullptr;  // [tiles][B, T, value_heads]
  int64_t bytes, rows;

  Shared(Arena arena, const LinearBwdParams& params) {
    const LinearProblem& p = params.problem;
    rows = (p.cu_seqlens ? 1 : p.sequences) * p.rows * p.value_heads;
    if (p.normalize != LinearNorm::kNone) {
      inverse = arena.take<float>(rows), ones = arena.take<float>(rows);
    }
    if (params.dgate && p.gate_kind == LinearGate::kScalar) {
      q_sums = arena.take<float>(rows * ceil_div(p.key_dim, kTile));
      k_sums = arena.take<float>(rows * ceil_div(p.key_dim, kTile));
    }
    bytes = arena.used;
  }
};

struct Plan {
  int64_t key_tiles, value_tiles, key_splits, value_splits;

  Plan(const LinearProblem& p, int64_t threads)
      : key_tiles(ceil_div(p.key_dim, kTile)), value_tiles(ceil_div(p.value_dim, kTile)) {
    // dv tasks even out what the dq, dk tasks leave: two of these per thread are enough.
    const auto splits = [&](int64_t tasks, int64_t tiles) {
      return max64(1, min64(tiles, ceil_div(2 * threads, max64(1, tasks))));
    };
    key_splits = splits(p.sequences * p.heads, key_tiles);
    value_splits = splits(p.sequences * p.value_heads, value_tiles);
  }
};

// One head of a task.
struct Head {
  const LinearBwdParams& params;
  const Shared& shared;
  int64_t sequence, head;
  TokenSpan span;

  AF_INLINE_MEMBER const LinearProblem& p() const { return params.problem; }
  AF_INLINE_MEMBER int64_t of_q() const { return head / (p().value_heads / p().heads); }
  AF_INLINE_MEMBER int64_t state() const { return sequence * p().value_heads + head; }
  AF_INLINE_MEMBER int64_t stat() const { return span.batch * p().rows * p().value_heads + head; }

  // dO / d, with the share of the ones column if it has one.
  template <class T>
  AF_INLINE_MEMBER Rows<T> dout(float scale, bool extended) const {
    Rows<T> rows = rows_of<T>(params.dout, span, head, p().value_dim);
    rows.scale = scale;
    if (!shared.inverse) return rows;
    rows.factor = shared.inverse + stat(), rows.stat_stride = p().value_heads;
    if (extended) rows.extra = shared.ones + stat();
    return rows;
  }
  template <class T>
  AF_INLINE_MEMBER Rows<T> values() const {
    Rows<T> rows = rows_of<T>(p().v, span, head, p().value_dim);
    rows.ones = shared.inverse;
    return rows;
  }
  // A state with rows V (and z) and columns K, or as it lies in memory.
  AF_INLINE_MEMBER StateRef state_ref(const float* data, const float* z, bool transposed) const {
    const int64_t k = p().key_dim, v = p().value_dim;
    float* own = data ? const_cast<float*>(data) + state() * k * v : nullptr;
    if (!transposed) return {own, nullptr, v, 1};
    return {own, z ? const_cast<float*>(z) + state() * k : nullptr, 1, v};
  }
};

// <dS_T, S_T> of a column of S (per value channel), or of a row with its z (per key channel).
AF_INLINE float end_product(const Head& h, int64_t channel, bool row) {
  const LinearBwdParams& b = h.params;
  const LinearProblem& p = b.problem;
  float sum = 0.0f;
  if (b.dfinal_state && b.final_state) {
    const int64_t base = h.state() * p.key_dim * p.value_dim;
    const int64_t at = base + channel * (row ? p.value_dim : 1), step = row ? 1 : p.value_dim;
    for (int64_t i = 0; i < (row ? p.value_dim : p.key_dim); ++i) {
      sum += b.dfinal_state[at + i * step] * b.final_state[at + i * step];
    }
  }
  if (row && b.dfinal_z && b.final_z) {
    const int64_t at = h.state() * p.key_dim + channel;
    sum += b.dfinal_z[at] * b.final_z[at];
  }
  return sum;
}

// The sink's part for the gradient of a gate per channel of its columns.
template <class T>
AF_INLINE void channel_side(const Head& h, Side side, const TensorRef& other, int64_t other_head,
                            Sink<T>& sink) {
  const LinearProblem& p = h.p();
  const int64_t width = gate_width(p);
  sink.side = side;
  sink.other = row_ptr<const T>(other, h.span.batch, 0, other_head);
  sink.other_stride = other.seq_stride;
  sink.side_stride = p.value_heads * width;
  sink.side_out = h.params.dgate + h.stat() * width;
  sink.own_gate = p.gate + h.stat() * width;
}

// Sums over time start at <dS_T, S_T>.
AF_INLINE void begin_running(const Head& h, int64_t column0, int64_t columns, float* running) {
  const bool row = h.p().gate_kind == LinearGate::kKey;
  for (int64_t c = 0; c < columns; ++c) {
    running[c] = column0 + c < gate_width(h.p()) ? end_product(h, column0 + c, row) : 0.0f;
    running[columns + c] = 0.0f;
  }
}

// What leaves the sequence at its front has decayed by the first token's gate, too.
AF_INLINE void store_front(const Head& h, const StateRef& ref, DecayOn on, int64_t rows,
                           int64_t dim, int64_t columns, int64_t tile, const float* state,
                           float* factors) {
  const Decay decay = decay_of_head(h.p(), h.span, h.head, false);
  const int64_t first = h.span.first < h.span.end() ? h.span.first : -1;
  if (on == DecayOn::kNothing || first < 0) {
    return store_state(ref, rows, dim, columns, tile, state, nullptr, nullptr);
  }
  const bool by_row = on == DecayOn::kRows;
  const int64_t n = by_row ? rows : columns;
  for (int64_t i = 0; i < n; i += kLanes) {
    VecF factor = on == DecayOn::kNumber ? splat(decay.number(first)) : decay.vector(first, i);
    store_partial(factors + i, factor, n - i);
  }
  store_state(ref, rows, dim, columns, tile, state, by_row ? factors : nullptr,
              by_row ? nullptr : factors);
}

// One walk over a sequence on tiles [tile0, tile1) for heads [head0, head1), whose outputs add up.
// `scan_of(head)` and `sink_of(head)` give each head's part.
template <class T, class ScanOf, class SinkOf>
AF_INLINE void walk_heads(DecayOn on, bool causal, int64_t heads, int64_t tile0, int64_t tile1,
                          int64_t head_size, int64_t tile_size, Scratch& w, const ScanOf& scan_of,
                          const SinkOf& sink_of) {
  for_walks(causal, [&](Walk walk) __attribute__((always_inline)) {
    const int64_t length = scan_of(0).length();
    for (int64_t step = 0; step < length; step += kBlock) {
      for (int64_t g = 0; g < heads; ++g) {
        Scan<T> scan = scan_of(g);
        scan.walk = walk;
        run_block(on, scan, step, tile0, tile1, w.block, w.states + g * head_size, tile_size,
                  sink_of(g));
      }
    }
  });
}

// dq and dk of one head of q, columns of tiles [tile0, tile1) of K; the rows of states are V.
template <class T>
AF_INLINE void queries_and_keys(const LinearBwdParams& params, const Shared& shared,
                                int64_t sequence, int64_t head, int64_t tile0, int64_t tile1,
                                Scratch& w) {
  const LinearProblem& p = params.problem;
  const int64_t group = p.value_heads / p.heads;
  const TokenSpan span = token_span(p.cu_seqlens, p.rows, sequence);
  const int64_t rows = p.value_dim + (shared.inverse != nullptr);
  const int64_t tile_size = room_for(rows) * kTile, head_size = (tile1 - tile0) * tile_size;
  const int64_t column0 = tile0 * kTile, columns = (tile1 - tile0) * kTile;
  const auto head_of = [&](int64_t g) __attribute__((always_inline)) {
    return Head{params, shared, sequence, head * group + g, span};
  };
  const auto each_tile = [&](auto f) __attribute__((always_inline)) {
    for (int64_t g = 0; g < group; ++g) {
      for (int64_t tile = tile0; tile < tile1; ++tile) {
        f(head_of(g), tile, w.states + g * head_size + (tile - tile0) * tile_size);
      }
    }
  };
  const auto walk = [&](bool backward) __attribute__((always_inline)) {
    const auto scan_of = [&](int64_t g) __attribute__((always_inline)) {
      const Head h = head_of(g);
      const Rows<T> dout = h.dout<T>(p.scale, true), values = h.values<T>();
      Scan<T> scan{backward ? values : dout, backward ? dout : values,
                   rows_of<T>(backward ? p.q : p.k, span, head, p.key_dim),
                   decay_of_head(p, span, h.head, backward)};
      scan.begin = span.first, scan.end = span.end(), scan.backward = backward;
      return scan;
    };
    const auto sink_of = [&](int64_t g) __attribute__((always_inline)) {
      const Head h = head_of(g);
      const TensorRef& out = backward ? params.dk : params.dq;
      Sink<T> sink;
      sink.out = row_ptr<T>(out, span.batch, 0, head);
      sink.stride = out.seq_stride, sink.dim = p.key_dim;
      sink.sums = group > 1 ? w.sums : nullptr;
      sink.sums_stride = columns, sink.first_column = column0;
      sink.first = g == 0, sink.last = g == group - 1;
      if (!params.dgate) return sink;
      const TensorRef& other = backward ? p.k : p.q;
      if (p.gate_kind == LinearGate::kScalar) {
        channel_side(h, Side::kTileSum, other, head, sink);
        sink.side_out = (backward ? shared.k_sums : shared.q_sums) + h.stat();
        sink.side_tile_stride = shared.rows;
      } else if (p.gate_kind == LinearGate::kKey) {
        channel_side(h, backward ? Side::kRunning : Side::kElements, other, head, sink);
        sink.running = w.running + g * 2 * columns, sink.running_stride = columns;
      }
      return sink;
    };
    walk_heads<T>(decay_on(p.gate_kind, true), p.causal, group, tile0, tile1, head_size, tile_size,
                  w, scan_of, sink_of);
  };

  each_tile([&](const Head& h, int64_t tile, float* state) __attribute__((always_inline)) {
    load_state(h.state_ref(p.initial_state, p.initial_z, true), rows, p.value_dim, p.key_dim, tile,
               state);
  });
  walk(false);
  each_tile([&](const Head& h, int64_t tile, float* state) __attribute__((always_inline)) {
    load_state(h.state_ref(params.dfinal_state, params.dfinal_z, true), rows, p.value_dim,
               p.key_dim, tile, state);
  });
  for (int64_t g = 0; params.dgate && p.gate_kind == LinearGate::kKey && g < group; ++g) {
    begin_running(head_of(g), column0, columns, w.running + g * 2 * columns);
  }
  walk(true);
  if (!params.dinitial_z) return;
  each_tile([&](const Head& h, int64_t tile, float* state) __attribute__((always_inline)) {
    store_front(h, h.state_ref(nullptr, params.dinitial_z, true), decay_on(p.gate_kind, true), rows,
                p.value_dim, p.key_dim, tile, state, w.factors);
  });
}

// dv of one value head, columns of tiles [tile0, tile1) of V; the rows of states are K.
template <class T>
AF_INLINE void values_of_head(const LinearBwdParams& params, const Shared& shared, int64_t sequence,
                              int64_t head, int64_t tile0, int64_t tile1, Scratch& w) {
  const LinearProblem& p = params.problem;
  const Head h = {params, shared, sequence, head, token_span(p.cu_seqlens, p.rows, sequence)};
  const int64_t tile_size = room_for(p.key_dim) * kTile;
  const int64_t column0 = tile0 * kTile, columns = (tile1 - tile0) * kTile;
  const auto each_tile = [&](auto f) __attribute__((always_inline)) {
    for (int64_t tile = tile0; tile < tile1; ++tile) f(tile, w.states + (tile - tile0) * tile_size);
  };
  const auto walk = [&](bool backward, const Sink<T>& sink) __attribute__((always_inline)) {
    const Rows<T> q = rows_of<T>(p.q, h.span, h.of_q(), p.key_dim);
    const Rows<T> k = rows_of<T>(p.k, h.span, h.of_q(), p.key_dim);
    Scan<T> scan{backward ? k : q, backward ? q : k,
                 backward ? h.dout<T>(1.0f, false) : rows_of<T>(p.v, h.span, head, p.value_dim),
                 decay_of_head(p, h.span, head, backward)};
    (backward ? scan.write : scan.read).scale = p.scale;
    scan.begin = h.span.first, scan.end = h.span.end(), scan.backward = backward;
    walk_heads<T>(
        decay_on(p.gate_kind, false), p.causal, 1, tile0, tile1, 0, tile_size, w,
        [&](int64_t) __attribute__((always_inline)) { return scan; },
        [&](int64_t) __attribute__((always_inline)) { return sink; });
  };
  const bool channels = params.dgate && p.gate_kind == LinearGate::kValue;
  Sink<T> sink;
  sink.dim = p.value_dim, sink.first_column = column0;
  if (channels) {  // o once more, in fp32
    each_tile([&](int64_t tile, float* state) __attribute__((always_inline)) {
      load_state(h.state_ref(p.initial_state, nullptr, false), p.key_dim, p.key_dim, p.value_dim,
                 tile, state);
    });
    channel_side(h, Side::kElements, params.dout, head, sink);
    walk(false, sink);
    channel_side(h, Side::kRunning, p.v, head, sink);
    sink.running = w.running, sink.running_stride = columns;
    begin_running(h, column0, columns, w.running);
  }
  each_tile([&](int64_t tile, float* state) __attribute__((always_inline)) {
    load_state(h.state_ref(params.dfinal_state, nullptr, false), p.key_dim, p.key_dim, p.value_dim,
               tile, state);
  });
  sink.out = row_ptr<T>(params.dv, h.span.batch, 0, head), sink.stride = params.dv.seq_stride;
  walk(true, sink);
  if (!params.dinitial_state) return;
  each_tile([&](int64_t tile, float* state) __attribute__((always_inline)) {
    store_front(h, h.state_ref(params.dinitial_state, nullptr, false), decay_on(p.gate_kind, false),
                p.key_dim, p.key_dim, p.value_dim, tile, state, w.factors);
  });
}

// Phase 1 of one row: o is n / base, so dn = dO / base and dd = -<dO, o> / base * dbase/dd.
template <class T>
AF_INLINE void differentiate_denominator(const LinearBwdParams& params, const Shared& shared,
                                         int64_t batch, int64_t t, int64_t head) {
  const LinearProblem& p = params.problem;
  const T* o = row_ptr<const T>(params.out, batch, t, head);
  const T* lo = params.out_lo.data ? row_ptr<const T>(params.out_lo, batch, t, head) : nullptr;
  const T* dout = row_ptr<const T>(params.dout, batch, t, head);
  VecF sum{};
  for (int64_t d = 0; d < p.value_dim; d += kLanes) {
    VecF value = load_partial(o + d, p.value_dim - d);
    if (lo) value += load_partial(lo + d, p.value_dim - d);
    sum = fma(load_partial(dout + d, p.value_dim - d), value, sum);
  }
  const int64_t at = (batch * p.rows + t) * p.value_heads + head;
  const Denominator norm = {nullptr, nullptr, 0, p.normalize, p.eps};
  const float den = params.den[at], inverse = norm.inverse(den);
  float slope = 1.0f;
  if (p.normalize == LinearNorm::kAbs) slope = den > p.eps ? 1.0f : den < -p.eps ? -1.0f : 0.0f;
  shared.inverse[at] = inverse;
  shared.ones[at] = -reduce_add(sum) * inverse * slope;
}

// Phase 3: dgate_t, the sum over later tokens; a reset stops it (see add_running).
AF_INLINE void sum_over_time(const LinearBwdParams& params, const Shared& shared, int64_t sequence,
                             int64_t head) {
  const LinearProblem& p = params.problem;
  const Head h = {params, shared, sequence, head, token_span(p.cu_seqlens, p.rows, sequence)};
  const Decay decay = decay_of_head(p, h.span, head, false);
  double sum = 0.0;
  for (int64_t i = 0; i < p.key_dim; ++i) sum += end_product(h, i, true);
  for (int64_t t = h.span.end() - 1; t >= h.span.first; --t) {
    const int64_t at = h.stat() + t * p.value_heads;
    for (int64_t tile = 0; tile < ceil_div(p.key_dim, kTile); ++tile) {
      sum += static_cast<double>(shared.q_sums[tile * shared.rows + at]);
      sum -= static_cast<double>(shared.k_sums[tile * shared.rows + at]);
    }
    if (decay.number(t) == 0.0f) sum = 0.0;
    params.dgate[at] = static_cast<float>(sum);
  }
}

}  // namespace

int64_t linear_chunk_bwd_workspace(const LinearBwdParams& params, int64_t num_threads) {
  return Shared({nullptr}, params).bytes + Scratch({nullptr}, params.problem).bytes * num_threads;
}

void linear_chunk_bwd(const LinearBwdParams& params, const Workers& workers) {
  const LinearProblem& p = params.problem;
  const Plan plan(p, workers.num_threads);
  const Shared shared({static_cast<char*>(params.workspace)}, params);
  const int64_t bytes = Scratch({nullptr}, p).bytes;
  const int64_t key_tasks = p.sequences * p.heads * plan.key_splits;
  const int64_t value_tasks = p.sequences * p.value_heads * plan.value_splits;
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (shared.inverse) {
      parallel_tasks(workers, ceil_div(shared.rows, kBlock), [&](int64_t task, int64_t) {
        for (int64_t i = task * kBlock; i < min64(shared.rows, (task + 1) * kBlock); ++i) {
          const int64_t row = i / p.value_heads;
          differentiate_denominator<T>(params, shared, row / p.rows, row % p.rows,
                                       i % p.value_heads);
        }
      });
    }
    parallel_tasks(workers, key_tasks + value_tasks, [&](int64_t task, int64_t worker) {
      const FlushDenormals guard;
      Scratch w({static_cast<char*>(params.workspace) + shared.bytes + worker * bytes}, p);
      if (task < key_tasks) {
        const int64_t part = task % plan.key_splits, head = task / plan.key_splits % p.heads;
        queries_and_keys<T>(params, shared, task / plan.key_splits / p.heads, head,
                            plan.key_tiles * part / plan.key_splits,
                            plan.key_tiles * (part + 1) / plan.key_splits, w);
        return;
      }
      const int64_t rest = task - key_tasks, part = rest % plan.value_splits;
      const int64_t head = rest / plan.value_splits % p.value_heads;
      values_of_head<T>(params, shared, rest / plan.value_splits / p.value_heads, head,
                        plan.value_tiles * part / plan.value_splits,
                        plan.value_tiles * (part + 1) / plan.value_splits, w);
    });
  });
  if (!shared.q_sums) return;
  parallel_tasks(workers, p.sequences * p.value_heads, [&](int64_t task, int64_t) {
    sum_over_time(params, shared, task / p.value_heads, task % p.value_heads);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
