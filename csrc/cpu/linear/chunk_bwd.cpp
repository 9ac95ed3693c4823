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
//           2  per (sequence, some heads, columns): dq from the left, then dk and dv from the
//              right, block by block, as they read the same rows; value heads of a group add up
//           3  per (sequence, value head): sums over time for a gate that is one number
//   flops   12 K V per token and value head; 16 K V with a gate of value channels
//   bytes   q, k, v, dO read twice at most; gradients once
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

struct Tiles {
  int64_t begin, end;  // of columns

  AF_INLINE_MEMBER int64_t count() const { return end - begin; }
};

// A task is some heads of q of a sequence side by side, or some columns of one of them, of K and of
// V alike. Where these are fewer than threads, dv of each value head of a group is one of its own.
struct Plan {
  int64_t key_tiles, value_tiles, splits, heads, parts;
  bool apart;

  Plan(const LinearProblem& p, int64_t threads)
      : key_tiles(ceil_div(p.key_dim, kTile)), value_tiles(ceil_div(p.value_dim, kTile)) {
    const int64_t all = max64(1, p.sequences * p.heads);
    splits = max64(1, min64(max64(key_tiles, value_tiles), ceil_div(2 * threads, all)));
    const int64_t keyed = room_for(p.value_dim + 1) * key_tiles * kTile;
    const int64_t valued = room_for(p.key_dim) * value_tiles * kTile;
    const int64_t group = p.value_heads / p.heads;
    heads = heads_abreast(p.sequences, p.heads, group * (keyed + valued), threads);
    parts = p.heads / heads;
    apart = group > 1 && all * splits < threads;
  }
  AF_INLINE_MEMBER static Tiles share(int64_t tiles, int64_t split, int64_t splits) {
    return {tiles * split / splits, tiles * (split + 1) / splits};
  }
};

struct Scratch {
  float *keyed, *valued;  // states of the heads of a task: rows V and columns K, and as they are
  Block block;
  float* sums;     // [kBlock][columns]
  float* running;  // [heads][2][columns]
  float* factors;  // [rows or columns]

  Scratch(Arena arena, const LinearProblem& p, const Plan& plan) {
    const int64_t heads = plan.heads * (p.value_heads / p.heads);
    const int64_t k = plan.key_tiles * kTile, v = plan.value_tiles * kTile;
    keyed = arena.take<float>(heads * room_for(p.value_dim + 1) * k);
    valued = arena.take<float>(heads * room_for(p.key_dim) * v);
    block = take_block(arena, p, max64(p.key_dim, p.value_dim + 1), max64(k, v));
    sums = arena.take<float>(kBlock * k);
    running = arena.take<float>(heads * 2 * max64(k, v));
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
    rows = token_rows(p) * p.value_heads;
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

// What a task does: columns `keys` of K, with states S^T, and `values` of V, with states S, of the
// value heads from head0 on, which belong to whole heads of q.
template <class T>
struct Part {
  const LinearBwdParams& params;
  const Shared& shared;
  Scratch& w;
  int64_t sequence, head0, heads;
  TokenSpan span;
  Tiles keys, values;

  AF_INLINE_MEMBER const LinearProblem& p() const { return params.problem; }
  AF_INLINE_MEMBER Head head_of(int64_t g) const {
    return {params, shared, sequence, head0 + g, span};
  }
  AF_INLINE_MEMBER bool gate_of(LinearGate kind) const {
    return params.dgate && p().gate_kind == kind;
  }
  AF_INLINE_MEMBER int64_t rows(bool keyed) const {
    return keyed ? p().value_dim + (shared.inverse != nullptr) : p().key_dim;
  }
  AF_INLINE_MEMBER int64_t tile_size(bool keyed) const { return room_for(rows(keyed)) * kTile; }
  AF_INLINE_MEMBER Tiles tiles(bool keyed) const { return keyed ? keys : values; }
  AF_INLINE_MEMBER float* states(bool keyed, int64_t g) const {
    return (keyed ? w.keyed : w.valued) + g * tiles(keyed).count() * tile_size(keyed);
  }
  AF_INLINE_MEMBER float* running(Tiles tiles, int64_t g) const {
    return w.running + g * 2 * tiles.count() * kTile;
  }

  // f(head, tile, its state) for every tile of every head.
  template <class F>
  AF_INLINE_MEMBER void each_state(bool keyed, const F& f) const {
    for (int64_t g = 0; g < heads; ++g) {
      float* state = states(keyed, g);
      for (int64_t tile = tiles(keyed).begin; tile < tiles(keyed).end; ++tile) {
        f(head_of(g), tile, state);
        state += tile_size(keyed);
      }
    }
  }
  AF_INLINE_MEMBER void load_states(bool keyed, const float* data, const float* z) const {
    each_state(
        keyed, [&](const Head& h, int64_t tile, float* state) __attribute__((always_inline)) {
          load_state(h.state_ref(data, z, keyed), rows(keyed), keyed ? p().value_dim : p().key_dim,
                     keyed ? p().key_dim : p().value_dim, tile, state);
        });
  }
  AF_INLINE_MEMBER void store_fronts(bool keyed, float* data, float* z) const {
    each_state(keyed,
               [&](const Head& h, int64_t tile, float* state) __attribute__((always_inline)) {
                 store_front(h, h.state_ref(data, z, keyed), decay_on(p().gate_kind, keyed),
                             rows(keyed), keyed ? p().value_dim : p().key_dim,
                             keyed ? p().key_dim : p().value_dim, tile, state, w.factors);
               });
  }
  AF_INLINE_MEMBER void begin_sums(Tiles tiles) const {
    for (int64_t g = 0; g < heads; ++g) {
      begin_running(head_of(g), tiles.begin * kTile, tiles.count() * kTile, running(tiles, g));
    }
  }
  AF_INLINE_MEMBER void run(bool keyed, int64_t g, int64_t step, Scan<T>& scan, Walk walk,
                            bool backward, const Sink<T>& sink) const {
    scan.begin = span.first, scan.end = span.end(), scan.backward = backward, scan.walk = walk;
    run_block(decay_on(p().gate_kind, keyed), scan, step, tiles(keyed).begin, tiles(keyed).end,
              w.block, states(keyed, g), tile_size(keyed), sink);
  }

  // A block of tokens of dq, or backwards of dk.
  AF_INLINE_MEMBER void query_or_key(int64_t g, int64_t step, Walk walk, bool backward) const {
    if (keys.count() == 0) return;
    const Head h = head_of(g);
    const int64_t group = p().value_heads / p().heads, columns = keys.count() * kTile;
    const Rows<T> dout = h.dout<T>(p().scale, true), of_v = h.values<T>();
    Scan<T> scan{backward ? of_v : dout, backward ? dout : of_v,
                 rows_of<T>(backward ? p().q : p().k, span, h.of_q(), p().key_dim),
                 decay_of_head(p(), span, h.head, backward)};
    const TensorRef& out = backward ? params.dk : params.dq;
    Sink<T> sink;
    sink.out = row_ptr<T>(out, span.batch, 0, h.of_q());
    sink.stride = out.seq_stride, sink.dim = p().key_dim;
    sink.large = streamed<T>(out, token_rows(p()), p().heads, sink.dim);
    sink.sums = group > 1 ? w.sums : nullptr;
    sink.sums_stride = columns, sink.first_column = keys.begin * kTile;
    sink.first = g % group == 0, sink.last = g % group == group - 1;
    const TensorRef& other = backward ? p().k : p().q;
    if (gate_of(LinearGate::kScalar)) {
      channel_side(h, Side::kTileSum, other, h.of_q(), sink);
      sink.side_out = (backward ? shared.k_sums : shared.q_sums) + h.stat();
      sink.side_tile_stride = shared.rows;
    } else if (gate_of(LinearGate::kKey)) {
      channel_side(h, backward ? Side::kRunning : Side::kElements, other, h.of_q(), sink);
      sink.running = running(keys, g), sink.running_stride = columns;
    }
    run(true, g, step, scan, walk, backward, sink);
  }

  // A block of tokens of dv, or forwards of o once more, in fp32, for gates of value channels.
  AF_INLINE_MEMBER void value(int64_t g, int64_t step, Walk walk, bool backward) const {
    if (values.count() == 0) return;
    const Head h = head_of(g);
    const Rows<T> q = rows_of<T>(p().q, span, h.of_q(), p().key_dim);
    const Rows<T> k = rows_of<T>(p().k, span, h.of_q(), p().key_dim);
    Scan<T> scan{backward ? k : q, backward ? q : k,
                 backward ? h.dout<T>(1.0f, false) : rows_of<T>(p().v, span, h.head, p().value_dim),
                 decay_of_head(p(), span, h.head, backward)};
    (backward ? scan.write : scan.read).scale = p().scale;
    Sink<T> sink;
    sink.dim = p().value_dim, sink.first_column = values.begin * kTile;
    if (gate_of(LinearGate::kValue)) {
      channel_side(h, backward ? Side::kRunning : Side::kElements, backward ? p().v : params.dout,
                   h.head, sink);
      sink.running = running(values, g), sink.running_stride = values.count() * kTile;
    }
    if (backward) {
      sink.out = row_ptr<T>(params.dv, span.batch, 0, h.head);
      sink.stride = params.dv.seq_stride;
      sink.large = streamed<T>(params.dv, token_rows(p()), p().value_heads, sink.dim);
    }
    run(false, g, step, scan, walk, backward, sink);
  }

  AF_INLINE_MEMBER void walk_heads(bool backward) const {
    const bool with_values = backward || gate_of(LinearGate::kValue);
    for_walks(p().causal, [&](Walk walk) __attribute__((always_inline)) {
      for (int64_t step = 0; step < span.rows; step += kBlock) {
        for (int64_t g = 0; g < heads; ++g) {
          query_or_key(g, step, walk, backward);
          if (with_values) value(g, step, walk, backward);
        }
      }
    });
  }

  AF_INLINE_MEMBER void differentiate() const {
    load_states(true, p().initial_state, p().initial_z);
    if (gate_of(LinearGate::kValue)) load_states(false, p().initial_state, nullptr);
    walk_heads(false);
    load_states(true, params.dfinal_state, params.dfinal_z);
    load_states(false, params.dfinal_state, nullptr);
    if (gate_of(LinearGate::kKey)) begin_sums(keys);
    if (gate_of(LinearGate::kValue)) begin_sums(values);
    walk_heads(true);
    if (params.dinitial_z) store_fronts(true, nullptr, params.dinitial_z);
    if (params.dinitial_state) store_fronts(false, params.dinitial_state, nullptr);
  }
};

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
  const Plan plan(params.problem, num_threads);
  return Shared({nullptr}, params).bytes +
         Scratch({nullptr}, params.problem, plan).bytes * num_threads;
}

void linear_chunk_bwd(const LinearBwdParams& params, const Workers& workers) {
  const LinearProblem& p = params.problem;
  const Plan plan(p, workers.num_threads);
  const Shared shared({static_cast<char*>(params.workspace)}, params);
  const int64_t bytes = Scratch({nullptr}, p, plan).bytes;
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
    const int64_t tasks = p.sequences * plan.parts * plan.splits;
    const int64_t alone = plan.apart ? p.sequences * p.value_heads : 0;
    parallel_tasks(workers, tasks + alone, [&](int64_t task, int64_t worker) {
      const FlushDenormals guard;
      Scratch w({static_cast<char*>(params.workspace) + shared.bytes + worker * bytes}, p, plan);
      const auto differentiate = [&](int64_t sequence, int64_t head0, int64_t heads, Tiles keys,
                                     Tiles values) __attribute__((always_inline)) {
        const TokenSpan span = token_span(p.cu_seqlens, p.rows, sequence);
        Part<T>{params, shared, w, sequence, head0, heads, span, keys, values}.differentiate();
      };
      if (task < tasks) {
        const int64_t split = task % plan.splits, part = task / plan.splits % plan.parts;
        const int64_t heads = plan.heads * (p.value_heads / p.heads);
        differentiate(task / plan.splits / plan.parts, part * heads, heads,
                      Plan::share(plan.key_tiles, split, plan.splits),
                      Plan::share(plan.apart ? 0 : plan.value_tiles, split, plan.splits));
      } else {
        differentiate((task - tasks) / p.value_heads, (task - tasks) % p.value_heads, 1, {0, 0},
                      {0, plan.value_tiles});
      }
      end_stream();
    });
  });
  if (!shared.q_sums) return;
  parallel_tasks(workers, p.sequences * p.value_heads, [&](int64_t task, int64_t) {
    sum_over_time(params, shared, task / p.value_heads, task % p.value_heads);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
