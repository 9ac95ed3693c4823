// The recurrence over one sequence of one head, block by block: y_t = S_t^T read_t with
// S_t = decay_t S_{t-1} + write_t x_t^T, forwards or backwards in time.
//
// One walk serves the forward and all of the backward, since gradients of the recurrence are such
// recurrences with exchanged roles (scan_chunk.h and scan_group.h have the arithmetic):
//   o   read q,   write k,   columns x = v    forwards
//   dq  read dO,  write v,   columns x = k    forwards, on S^T
//   dv  read k,   write q,   columns x = dO   backwards
//   dk  read v,   write dO,  columns x = q    backwards, on dS^T
// The state of a task stays in L1 or L2 and no state of a chunk goes to memory, forward or
// backward.
#pragma once

#include "cpu/linear/scan_chunk.h"
#include "cpu/linear/scan_tile.h"
#include "cpu/linear/tokens.h"
#include "cpu/micro/softmax.h"
#include "cpu/micro/stream.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// What is done with <other, y> beside y itself, for gradients of gates: its sum over the columns
// of a tile, its elements, or elements that become the sum of (stored - <other, y>) so far.
enum class Side { kNothing, kTileSum, kElements, kRunning };

template <class T>
struct Sink {
  T *out = nullptr, *lo = nullptr;  // token t at t * stride; lo: what rounding dropped, or null
  int64_t stride = 0, lo_stride = 0, dim = 0;
  bool large = false;  // a plain out goes past the caches (micro/stream.h)
  // Sums over a group of heads: [kBlock][sums_stride] by step and column, null for one head.
  float* sums = nullptr;
  int64_t sums_stride = 0, first_column = 0;
  bool first = true, last = true;  // of the group
  Side side = Side::kNothing;
  const T* other = nullptr;
  int64_t other_stride = 0;
  float* side_out = nullptr;  // elements: token t at t * side_stride; sums: of one tile
  int64_t side_stride = 0;
  int64_t side_tile_stride = 0;
  const float* own_gate = nullptr;  // kRunning: log gates, laid out as side_out
  float* running = nullptr;         // kRunning: [2][columns] sum and what it lacks
  int64_t running_stride = 0;

  // y is stored and that is all.
  AF_INLINE_MEMBER bool plain() const { return out && !lo && !sums && side == Side::kNothing; }
  AF_INLINE_MEMBER bool past() const { return large && plain(); }
};

// The gradient of a gate is the sum of q.dq - k.dk over all later tokens: compensated, and begun
// anew at a reset, which no gradient passes.
template <class T>
AF_INLINE void add_running(const Sink<T>& sink, int64_t t, int64_t column, int64_t n,
                           VecF product) {
  float* element = sink.side_out + t * sink.side_stride + column;
  float* sum = sink.running + column - sink.first_column;
  float* lack = sum + sink.running_stride;
  const VecF term = load_partial(element, n) - product - load(lack), before = load(sum);
  VecF now = before + term;
  VecF lost = (now - before) - term;
  const VecF gate = load_partial(sink.own_gate + t * sink.side_stride + column, n);
  const VecI reset = decay_of(gate) == splat(0.0f);
  now = reset ? splat(0.0f) : now;
  lost = reset ? splat(0.0f) : lost;
  store(sum, now);
  store(lack, lost);
  store_partial(element, now, n);
}

template <class T>
AF_INLINE void emit(const Sink<T>& sink, int64_t t, int64_t step, int64_t tile, const float* y,
                    float factor) {
  VecF total{};
  for (int64_t c = 0; c < kTile; c += kLanes) {
    const int64_t column = tile * kTile + c, n = sink.dim - column;
    if (n <= 0) break;
    VecF value = load(y + c) * splat(factor);
    if (sink.side != Side::kNothing) {
      VecF product = load_partial(sink.other + t * sink.other_stride + column, n) * value;
      if (sink.side == Side::kTileSum) total += product;
      if (sink.side == Side::kElements) {
        store_partial(sink.side_out + t * sink.side_stride + column, product, n);
      }
      if (sink.side == Side::kRunning) add_running(sink, t, column, n, product);
    }
    if (sink.sums) {
      float* sum = sink.sums + step * sink.sums_stride + column - sink.first_column;
      if (!sink.first) value += load(sum);
      store(sum, value);
    }
    if (!sink.last || !sink.out) continue;
    T* out = sink.out + t * sink.stride + column;
    store_partial(out, value, n);
    if (sink.lo) {
      store_partial(sink.lo + t * sink.lo_stride + column, value - load_partial(out, n), n);
    }
  }
  if (sink.side == Side::kTileSum) {
    sink.side_out[tile * sink.side_tile_stride + t * sink.side_stride] = reduce_add(total);
  }
}

// Where the gates of a head act on a state with rows K and columns V, or on its transpose.
AF_INLINE DecayOn decay_on(LinearGate kind, bool transposed) {
  switch (kind) {
    case LinearGate::kNone:
      return DecayOn::kNothing;
    case LinearGate::kKey:
      return transposed ? DecayOn::kLanesOf : DecayOn::kRows;
    case LinearGate::kValue:
      return transposed ? DecayOn::kRows : DecayOn::kLanesOf;
    default:
      return DecayOn::kNumber;
  }
}

// What a block of tokens needs: what its columns have in common, in the form that its decays ask
// for, and panels [tile][kBlock][kTile] of x and of y. Rows of a head may lie 2 KiB apart in
// memory, where a cache has room for a few of them: each is read once and written once, as a whole.
struct Block {
  Coefficients groups;
  ScanChunk chunk;
  float *x, *y;
  float* inverse;  // [kBlock] of denominators
};

AF_INLINE Block take_block(Arena& arena, const LinearProblem& p, int64_t rows, int64_t columns) {
  Block block{};
  block.x = arena.take<float>(kBlock * round_up(columns, kTile));
  block.y = arena.take<float>(kBlock * round_up(columns, kTile));
  block.inverse = arena.take<float>(kBlock);
  if (by_channel(decay_on(p.gate_kind, false))) {
    block.groups = take_coefficients(arena, rows);
    block.groups.inverse = block.inverse;
  } else {
    take_chunk(arena, rows, block.chunk);
  }
  return block;
}

// The x of n tokens, zeros behind the last token and the last column. True if all are finite.
template <class T>
[[gnu::noinline]] static bool load_rows(const Scan<T>& scan, int64_t step0, int64_t n,
                                        int64_t first, int64_t columns, float* panels) {
  VecF poison{};
  for (int64_t s = 0; s < kBlock; ++s) {
    const int64_t t = scan.token(step0 + min64(s, n - 1));
    const T* row = scan.lane.data + t * scan.lane.stride + first;
    const VecF scale = splat(s < n ? scan.lane.scale_at(t) : 0.0f);
    const int64_t live = s < n ? scan.lane.dim - first : 0;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const VecF x = c < live ? load_partial(row + c, live - c) * scale : VecF{};
      poison += x * splat(0.0f);  // NaN as soon as one is NaN or infinite
      store(panels + c / kTile * (kBlock * kTile) + s * kTile + c % kTile, x);
    }
  }
  return reduce_add(poison) == 0.0f;
}

// The y of n tokens where that is all a sink wants.
template <bool kPast, class T>
[[gnu::noinline]] static void store_rows(const Scan<T>& scan, int64_t step0, int64_t n,
                                         int64_t first, int64_t columns, const Block& block,
                                         const Sink<T>& sink) {
  for (int64_t s = 0; s < n; ++s) {
    T* out = sink.out + scan.token(step0 + s) * sink.stride + first;
    const float* y = block.y + s * kTile;
    const VecF factor = splat(scan.norm.z ? block.inverse[s] : 1.0f);
    for (int64_t c = 0; c < min64(columns, sink.dim - first); c += kLanes) {
      const VecF value = load(y + c / kTile * (kBlock * kTile) + c % kTile) * factor;
      if constexpr (kPast) {
        stream(out + c, value);
      } else {
        store_partial(out + c, value, sink.dim - first - c);
      }
    }
  }
}

// The y of n tokens on one tile of the state, for any other sink.
template <class T>
[[gnu::noinline]] static void emit_rows(const Scan<T>& scan, int64_t step0, int64_t n, int64_t tile,
                                        const float* y, const float* inverse, const Sink<T>& sink) {
  for (int64_t s = 0; s < n; ++s) {
    emit(sink, scan.token(step0 + s), s, tile, y + s * kTile, scan.norm.z ? inverse[s] : 1.0f);
  }
}

// The coefficients of the block of tokens that starts at `step0`.
template <DecayOn kOn, class T>
[[gnu::noinline]] static void prepare_groups(const Scan<T>& scan, int64_t step0,
                                             const Coefficients& c) {
  for (int64_t group = 0; group < kGroups; ++group) {
    const int64_t step = step0 + group * kGroup, n = min64(kGroup, scan.length() - step);
    if (n <= 0) return;
    int64_t tokens[kGroup];
    for (int64_t u = 0; u < n; ++u) tokens[u] = scan.token(step + u);
    prepare_group<kOn>(scan.read, scan.write, scan.decay, scan.norm, tokens, n, c.at(group));
  }
}

// A group of tokens on one tile of the state, [kGroup][kTile] each.
struct Columns {
  alignas(64) float x[kGroup * kTile];       // carried to the end of the group
  alignas(64) float y[kGroup * kTile];       // what its tokens add, then with the state's part
  alignas(64) float own[kGroup * kTile];     // decays of columns: what its tokens add, and
  alignas(64) float prefix[kGroup * kTile];  // by which the state's part is to be multiplied
  alignas(64) float lanes[2 * kTile];        // the decay of the group, whole and part
};

// The n tokens from `step` on, whose rows x are, before the state comes in.
template <DecayOn kOn, class T>
AF_INLINE void load_columns(const Scan<T>& scan, int64_t step, int64_t n, int64_t first,
                            int64_t vectors, const Coefficients& c, const float* x, Columns& w) {
  constexpr bool kByLane = kOn == DecayOn::kLanesOf;
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t at = v * kLanes;
    VecF log{}, product{};
// Vectors have names, as arrays of them get spilled.
#define AF_LOAD(u)                                                                               \
  VecF x##u = load(x + u * kTile + at), y##u{}, a##u = splat(1.0f);                              \
  if (kByLane && u < n) {                                                                        \
    const VecF gate = scan.decay.log_vector(scan.decay.token(scan.token(step + u)), first + at); \
    a##u = decay_of(gate), log += gate;                                                          \
  }
#define AF_PAIR(u, j)                           \
  if constexpr (kByLane && u > j) x##j *= a##u; \
  y##u = fma(splat(c.pairs[u * (u + 1) / 2 + j]), x##j, y##u);
#define AF_STORE(u)                                     \
  store(w.x + u * kTile + at, x##u);                    \
  store(w.y + u * kTile + at, kByLane ? VecF{} : y##u); \
  if constexpr (kByLane) {                              \
    product = u == 0 ? a##u : product * a##u;           \
    store(w.own + u * kTile + at, y##u);                \
    store(w.prefix + u * kTile + at, product);          \
  }
    AF_LOAD(0);
    AF_LOAD(1);
    AF_LOAD(2);
    AF_LOAD(3);
    AF_PAIR(0, 0);
    AF_PAIR(1, 0);
    AF_PAIR(2, 0);
    AF_PAIR(3, 0);
    AF_PAIR(1, 1);
    AF_PAIR(2, 1);
    AF_PAIR(3, 1);
    AF_PAIR(2, 2);
    AF_PAIR(3, 2);
    AF_PAIR(3, 3);
    AF_STORE(0);
    AF_STORE(1);
    AF_STORE(2);
    AF_STORE(3);
#undef AF_LOAD
#undef AF_PAIR
#undef AF_STORE
    if (kByLane) {
      const Kept kept = kept_of(log);
      store(w.lanes + at, kept.whole);
      store(w.lanes + kTile + at, kept.part);
    }
  }
}

// The block's tokens on one tile of the state, four by four: x and y are [kBlock][kTile].
template <DecayOn kOn, class T>
[[gnu::noinline]] static void scan_groups(const Scan<T>& scan, int64_t step0, int64_t tile,
                                          const Coefficients& coefficients, Ahead<T>& ahead,
                                          const float* x, float* y, float* state) {
  const int64_t first = tile * kTile;
  const int64_t vectors = min64(2, ceil_div(scan.lane.dim - first, kLanes));
  const int64_t positions = positions_of(scan.read.rows());
  Columns w;
  for (int64_t group = 0; group < kGroups; ++group) {
    const int64_t step = step0 + group * kGroup, n = min64(kGroup, scan.length() - step);
    if (n <= 0) return;
    const Coefficients c = coefficients.at(group);
    ahead.turn();
    const int64_t row = group * kGroup * kTile;
    load_columns<kOn>(scan, step, n, first, vectors, c, x + row, w);
    run_tile<kOn>(vectors, positions, c, w.lanes, w.x, w.y, state);
    for (int64_t i = 0; i < kGroup * kTile; i += kLanes) {
      const VecF from_state = load(w.y + i);
      const bool by_lane = kOn == DecayOn::kLanesOf;
      store(y + row + i,
            by_lane ? fma(load(w.prefix + i), from_state, load(w.own + i)) : from_state);
    }
  }
}

template <DecayOn kOn, class T>
AF_INLINE void run_block_on(const Scan<T>& scan, int64_t step0, int64_t tile0, int64_t tile1,
                            Block& block, float* states, int64_t tile_size, const Sink<T>& sink) {
  const int64_t n = min64(kBlock, scan.length() - step0);
  const int64_t first = tile0 * kTile, columns = (tile1 - tile0) * kTile;
  if constexpr (by_channel(kOn)) {
    prepare_groups<kOn>(scan, step0, block.groups);
  } else {
    prepare_chunk<kOn>(scan, step0, block.chunk, block.inverse);
  }
  const bool finite = load_rows(scan, step0, n, first, columns, block.x);
  const int64_t turns = by_channel(kOn) ? kGroups : chunk_turns(positions_of(scan.read.rows()));
  Ahead<T> ahead(scan, step0, turns * (tile1 - tile0), sink.past() ? nullptr : sink.out,
                 sink.stride);
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    const float* x = block.x + (tile - tile0) * kBlock * kTile;
    float* y = block.y + (tile - tile0) * kBlock * kTile;
    float* state = states + (tile - tile0) * tile_size;
    if constexpr (by_channel(kOn)) {
      scan_groups<kOn>(scan, step0, tile, block.groups, ahead, x, y, state);
    } else {
      scan_chunk<kOn>(scan, step0, tile, block.chunk, finite, ahead, x, y, state);
    }
    if (scan.walk != Walk::kWrite && !sink.plain()) {
      emit_rows(scan, step0, n, tile, y, block.inverse, sink);
    }
  }
  if (scan.walk != Walk::kWrite && sink.plain()) {
    const auto store_them = sink.past() ? store_rows<true, T> : store_rows<false, T>;
    store_them(scan, step0, n, first, columns, block, sink);
  }
}

template <DecayOn kDecay>
struct DecayConstant {
  static constexpr DecayOn kOn = kDecay;
};

// f with DecayOn as a constant.
template <class F>
AF_INLINE void with_decay(DecayOn on, const F& f) {
  switch (on) {
    case DecayOn::kNothing:
      return f(DecayConstant<DecayOn::kNothing>{});
    case DecayOn::kNumber:
      return f(DecayConstant<DecayOn::kNumber>{});
    case DecayOn::kRows:
      return f(DecayConstant<DecayOn::kRows>{});
    case DecayOn::kLanesOf:
      return f(DecayConstant<DecayOn::kLanesOf>{});
  }
}

// The block's tokens on tiles [tile0, tile1), whose states of tile_size follow one another. What
// walks over blocks is the same code for every kind of decay, and much of it.
template <class T>
[[gnu::noinline]] static void run_block(DecayOn on, const Scan<T>& scan, int64_t step0,
                                        int64_t tile0, int64_t tile1, Block& block, float* states,
                                        int64_t tile_size, const Sink<T>& sink) {
  with_decay(on, [&](auto is) __attribute__((always_inline)) {
    run_block_on<decltype(is)::kOn>(scan, step0, tile0, tile1, block, states, tile_size, sink);
  });
}

// A state in memory: element (row, column) at row * row_stride + column * column_stride, and the
// extra row apart. Null is zero.
struct StateRef {
  float *data = nullptr, *extra = nullptr;
  int64_t row_stride = 0, column_stride = 0;

  AF_INLINE_MEMBER float* at(int64_t row, int64_t dim, int64_t column) const {
    return row < dim ? data + row * row_stride + column * column_stride : extra + column;
  }
};

// Columns of tile `tile` of a state with `rows` rows, `dim` of them in ref.data.
[[gnu::noinline, maybe_unused]] static void load_state(const StateRef& ref, int64_t rows,
                                                       int64_t dim, int64_t columns, int64_t tile,
                                                       float* state) {
  const int64_t positions = round_up(rows, kLanes);
  for (int64_t i = 0; i < positions * kTile; ++i) state[i] = 0.0f;
  const int64_t n = min64(kTile, columns - tile * kTile);
  for (int64_t row = 0; row < rows; ++row) {
    if (!(row < dim ? ref.data : ref.extra)) continue;
    for (int64_t c = 0; c < n; ++c) {
      state[position_of(row) * kTile + c] = *ref.at(row, dim, tile * kTile + c);
    }
  }
}

// The way back, times row_factor and column_factor where they are not null.
[[gnu::noinline, maybe_unused]] static void store_state(const StateRef& ref, int64_t rows,
                                                        int64_t dim, int64_t columns, int64_t tile,
                                                        const float* state, const float* row_factor,
                                                        const float* column_factor) {
  const int64_t n = min64(kTile, columns - tile * kTile);
  for (int64_t row = 0; row < rows; ++row) {
    if (!(row < dim ? ref.data : ref.extra)) continue;
    const float by = row_factor ? row_factor[row] : 1.0f;
    for (int64_t c = 0; c < n; ++c) {
      const int64_t column = tile * kTile + c;
      const float more = column_factor ? column_factor[column] : 1.0f;
      *ref.at(row, dim, column) = state[position_of(row) * kTile + c] * by * more;
    }
  }
}

// How many of a sequence's heads a task walks side by side. Heads lie side by side in the row of a
// token, and a page of memory may hold two of these rows: one head after the other waits for the
// pages' addresses again and again (docs/linear.md has the times). `size`: floats of a state.
AF_INLINE int64_t heads_abreast(int64_t sequences, int64_t heads, int64_t size, int64_t threads) {
  constexpr int64_t kMost = 128 * 1024 / sizeof(float);  // of states, which should stay in L2
  int64_t n = 1;
  const auto even = [&](int64_t tasks) __attribute__((always_inline)) {
    return tasks >= 4 * threads || (sequences == 1 && tasks >= 1 && tasks % threads == 0);
  };
  while (heads % (2 * n) == 0 && 2 * n * size <= kMost && even(sequences * heads / (2 * n))) n *= 2;
  return n;
}

// Both walks of a bidirectional call, or the one of a causal call: f(walk).
template <class F>
AF_INLINE void for_walks(bool causal, const F& f) {
  if (causal) return f(Walk::kBoth);
  f(Walk::kWrite);
  f(Walk::kRead);
}

// Tokens of all sequences.
AF_INLINE int64_t token_rows(const LinearProblem& p) {
  return (p.cu_seqlens ? 1 : p.sequences) * p.rows;
}

AF_INLINE int64_t gate_width(const LinearProblem& p) {
  return p.gate_kind == LinearGate::kKey     ? p.key_dim
         : p.gate_kind == LinearGate::kValue ? p.value_dim
                                             : 1;
}

AF_INLINE Decay decay_of_head(const LinearProblem& p, const TokenSpan& span, int64_t head,
                              bool backward) {
  Decay d;
  d.kind = p.gate_kind, d.end = span.end(), d.backward = backward, d.dim = gate_width(p);
  if (!p.gate) return d;
  d.stride = p.value_heads * d.dim;
  d.log = p.gate_kind == LinearGate::kHead ? p.gate + head
                                           : p.gate + span.batch * p.rows * d.stride + head * d.dim;
  return d;
}

template <class T>
AF_INLINE Rows<T> rows_of(const TensorRef& t, const TokenSpan& span, int64_t head, int64_t dim) {
  return {row_ptr<const T>(t, span.batch, 0, head), t.seq_stride, dim};
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
