// Block-sparse attention, forward.
//
// Algorithm (the key-block-major order of FlashMoBA, on CPU tiles): a task is a tile of queries of
// all heads that share lists and a KV head; their O, m, l and widened Q stay in L2. The lists of
// the tile are inverted, and for each key block, ascending, the rows that name it are gathered, 48
// at a time: S = Q K^T, online softmax in base 2, O += P V. So per-token lists (NSA, MoBA) and
// lists of query blocks (SeerAttention) are one kernel, and a key block is read once per tile.
//
//   tile       rows whose Q and O take kTileBytes: 512 at D 64, 256 at D 128
//   gather     copies D floats of Q per row and block, adds Dv floats of O: 2 to 4% of the products
//              over a block of 64 keys
//   flops      2 (D + Dv) per row and listed key
//   bytes      Q, O once; K, V packed once per KV head, then from cache once per tile and block
//   order      (batch, KV head) in waves whose packed K and V stay inside kWaveBytes
//
// A row's result depends on its own Q, list and keys only. NaN or infinity in a key that a row does
// not see never reaches the row.
#include "cpu/block_sparse/lists.h"
#include "cpu/kernels.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/softmax.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

// Gathered rows of one product, a multiple of every kMR: more of them where blocks are small, so
// that lists of 64 queries go whole.
constexpr int64_t kBatchRows = 48;
constexpr int64_t kMaxBatchRows = 96;
constexpr int64_t kSmallBlock = 128;
constexpr int64_t kSpan = 256;  // keys of one product: S 48 x 288 floats are 54 KiB
// Row stride of S and gathered Q, off the power of two; room for the start of a panel, and for D
// 256.
constexpr int64_t kLds = kSpan + 2 * kNR + 16;
constexpr int64_t kMaxSpans = 8;  // blocks of one softmax
constexpr int64_t kTileBytes = 256 << 10;
constexpr int64_t kWaveBytes = 4 << 20;
constexpr int64_t kPackKeys = 256;

struct PackedHead {
  float* k;         // [panels][D][kNR]
  float* v;         // [Dv / kNR][keys][kNR]
  uint8_t* finite;  // [panels]: every V element of those keys is finite
};

struct Tile {
  float* q;  // [rows][D], scaled
  float* o;  // [rows][ldo]
  float* m;
  float* l;
  Interval* keys;
  Inverse inverse;
  // One batch of gathered rows.
  float* q_batch;  // [batch][kLds]
  float* s;        // [batch][kLds]
  float* pv;       // [batch][kNR]
  float* alpha;    // [batch]
  int32_t* rows;   // [batch]
};

struct Plan {
  int64_t keys;    // of the longest sequence, rounded up to whole panels
  int64_t tokens;  // of a tile, a multiple of q_block
  int64_t tiles;   // of the longest sequence and one unit
  int64_t slots;   // (batch, KV head) pairs per wave
  int64_t batch;   // gathered rows of one product
  int64_t ldo;
  Units units;
};

AF_INLINE Plan make_plan(const BlockSparseFwdParams& params, int64_t threads) {
  const FlashProblem& p = params.flash.problem;
  const SelectionRef& s = params.selection;
  Plan plan;
  plan.units = units_of(p, s);
  plan.batch = s.kv_block <= kSmallBlock ? kMaxBatchRows : kBatchRows;
  plan.keys = max64(kNR, round_up(p.seqlen_k, kNR));
  plan.ldo = padded_columns(p.v_head_dim);
  // A list that has rows enough for a product is a tile of its own.
  const bool alone = s.q_block * plan.units.heads >= kBatchRows;
  const int64_t rows = alone ? 0 : kTileBytes / 4 / (p.head_dim + plan.ldo);
  plan.tokens = max64(1, rows / plan.units.heads / s.q_block) * s.q_block;
  plan.tokens = min64(plan.tokens, round_up(max64(1, p.seqlen_q), s.q_block));
  plan.tiles = max64(1, ceil_div(p.seqlen_q, plan.tokens));
  const int64_t pairs = p.batch * p.heads_k;
  const int64_t bytes = plan.keys * (p.head_dim + plan.ldo) * 4;
  const int64_t enough = ceil_div(4 * threads, plan.tiles);
  plan.slots = max64(1, min64(pairs, max64(enough, kWaveBytes / bytes)));
  return plan;
}

AF_INLINE PackedHead take_head(Arena& a, const FlashProblem& p, const Plan& plan) {
  PackedHead head;
  head.k = a.take<float>(plan.keys * p.head_dim);
  head.v = a.take<float>(plan.keys * plan.ldo);
  head.finite = a.take<uint8_t>(plan.keys / kNR);
  return head;
}

AF_INLINE Tile take_tile(Arena& a, const BlockSparseFwdParams& params, const Plan& plan) {
  const FlashProblem& p = params.flash.problem;
  const SelectionRef& s = params.selection;
  const int64_t rows = plan.tokens * plan.units.heads;
  Tile t;
  t.q = a.take<float>(rows * p.head_dim + kLanes);
  t.o = a.take<float>(rows * plan.ldo);
  t.m = a.take<float>(rows);
  t.l = a.take<float>(rows);
  t.keys = a.take<Interval>(rows);
  t.inverse =
      take_inverse(a, ceil_div(p.seqlen_k, s.kv_block) + 1, plan.tokens / s.q_block, s.slots);
  t.q_batch = a.take<float>(plan.batch * kLds);
  t.s = a.take<float>(plan.batch * kLds);
  t.pv = a.take<float>(plan.batch * kNR);
  t.alpha = a.take<float>(plan.batch);
  t.rows = a.take<int32_t>(plan.batch);
  return t;
}

// One panel of keys of one head. Rows of a head lie apart and no prefetcher sees through them:
// those of the next panel are asked for here.
template <class T>
AF_INLINE void pack_panel(const BlockSparseFwdParams& params, const Plan& plan, const Sequence& seq,
                          int64_t kv_head, int64_t key, const PackedHead& head) {
  const FlashFwdParams& f = params.flash;
  const FlashProblem& p = f.problem;
  auto k_row = [&](int64_t i) { return row_ptr<const T>(f.k, seq.batch, seq.k_row + i, kv_head); };
  auto v_row = [&](int64_t i) { return row_ptr<const T>(f.v, seq.batch, seq.k_row + i, kv_head); };
  const int64_t end = min64(key + kNR, seq.k_len);
  for (int64_t next = end; next < min64(end + kNR, seq.k_len); ++next) {
    prefetch_row(k_row(next), p.head_dim);
    prefetch_row(v_row(next), p.v_head_dim);
  }
  pack_key_panel(k_row(key), f.k.seq_stride, end - key, p.head_dim, head.k + key * p.head_dim);
  head.finite[key / kNR] = pack_column_panels(v_row(key), f.v.seq_stride, end - key, p.v_head_dim,
                                              1.0f, head.v + key * kNR, plan.keys * kNR);
}

// A tile of tokens [token0, token0 + tokens) of one unit; row r is head r % heads of token r /
// heads.
struct TileRows {
  const BlockSparseFwdParams& params;
  const Plan& plan;
  const Sequence& seq;
  int64_t unit, token0, tokens;

  AF_INLINE_MEMBER int64_t head(int64_t r) const {
    return unit * plan.units.heads + r % plan.units.heads;
  }
  AF_INLINE_MEMBER int64_t query(int64_t r) const { return token0 + r / plan.units.heads; }
  AF_INLINE_MEMBER int64_t rows() const { return tokens * plan.units.heads; }
};

// Keys of one listed block, at most kSpan, and where their panels stand in S.
struct Span {
  Interval keys;
  int64_t key0;    // the first panel's first key
  int64_t column;  // of key0 in S
  int64_t width;   // whole panels
};

AF_INLINE int64_t span_width(Interval keys) {
  return round_up(keys.hi, kNR) - keys.lo / kNR * kNR;
}

// Spans that the same rows attend to: one softmax for all of them.
struct Group {
  Span spans[kMaxSpans];
  int64_t count = 0, width = 0;

  AF_INLINE_MEMBER bool fits(Interval keys) const {
    return count < kMaxSpans && width + span_width(keys) <= kLds - 16;
  }
  AF_INLINE_MEMBER void add(Interval keys) {
    spans[count++] = {keys, keys.lo / kNR * kNR, width, span_width(keys)};
    width += span_width(keys);
  }
};

// What row r sees of a span, in columns from its key0.
AF_INLINE Interval seen_columns(const Tile& tile, const Span& span, int64_t r) {
  const int64_t lo = min64(max64(span.keys.lo, tile.keys[r].lo), span.keys.hi);
  return {lo - span.key0, max64(lo, min64(span.keys.hi, tile.keys[r].hi)) - span.key0};
}

// Scores of gathered row n to probabilities; alpha is what its O is to be multiplied by.
AF_INLINE void weigh_row(const TileRows& t, const Tile& tile, const ScoreMap& map, const Group& g,
                         int64_t n) {
  const FlashProblem& p = t.params.flash.problem;
  const int64_t r = tile.rows[n];
  float* s = tile.s + n * kLds;
  if (map.cap2 > 0.0f) apply_softcap(s, g.width, map.cap2);
  for (int64_t i = 0; i < g.count; ++i) {
    const Span& span = g.spans[i];
    if (p.alibi_slopes) {
      add_alibi(s + span.column, span.width, alibi_slope2(p, t.seq.batch, t.head(r)),
                t.query(r) + t.seq.offset - span.key0);
    }
    const Interval seen = seen_columns(tile, span, r);
    if (seen.lo > 0 || seen.hi < span.width)
      mask_row(s + span.column, span.width, seen.lo, seen.hi, -kInf);
  }
  tile.alpha[n] = softmax_row(s, g.width, tile.m[r], tile.l[r]);
}

// P V of column vectors d, d + kLanes of gathered row n over exactly the keys that it sees, added
// to o0 and o1: where V is not finite everywhere, as 0 * NaN is NaN. The sum is that of the
// product.
AF_INLINE void accumulate_row(const TileRows& t, const Tile& tile, const PackedHead& head,
                              const Group& g, int64_t n, int64_t d, VecF& o0, VecF& o1) {
  VecF sum0{}, sum1{};
  for (int64_t i = 0; i < g.count; ++i) {
    const Span& span = g.spans[i];
    const Interval seen = seen_columns(tile, span, tile.rows[n]);
    for (int64_t c = seen.lo; c < seen.hi; ++c) {
      const VecF weight = splat(tile.s[n * kLds + span.column + c]);
      const float* v = head.v + d * t.plan.keys + (span.key0 + c) * kNR;
      sum0 = fma(weight, load(v), sum0);
      sum1 = fma(weight, load(v + kLanes), sum1);
    }
  }
  o0 += sum0;
  o1 += sum1;
}

// Scores of a span for `count` gathered rows, panel by panel; those that no earlier row sees, as
// below the diagonal, begin with the first row that does.
AF_INLINE void score_span(const TileRows& t, const Tile& tile, const PackedHead& head,
                          const Span& span, int64_t count) {
  const int64_t dim = t.params.flash.problem.head_dim;
  int64_t row = 0;
  for (int64_t c = 0; c < span.width; c += kNR) {
    while (row < count && tile.keys[tile.rows[row]].hi <= span.key0 + c) ++row;
    const int64_t first = row / kMR * kMR;
    if (first < count)
      gemm<kLds, 1>(count - first, 2, dim, tile.q_batch + first * kLds, kLds,
                    head.k + (span.key0 + c) * dim, 0, tile.s + first * kLds + span.column + c,
                    kLds, false);
  }
}

// P V of a span, two column vectors from d on, into pv. `seen` is the least end of what rows see:
// where it lies in the span, each kMR rows take keys up to the last that one of them sees.
AF_INLINE void weigh_span(const TileRows& t, const Tile& tile, const PackedHead& head,
                          const Span& span, int64_t count, int64_t seen, int64_t d,
                          bool accumulate) {
  const float* v = head.v + d * t.plan.keys + span.keys.lo * kNR;
  const float* p = tile.s + span.column + span.keys.lo - span.key0;
  const int64_t step = seen < span.keys.hi ? kMR : count;
  for (int64_t row = 0; row < count; row += step) {
    const int64_t rows = min64(step, count - row);
    int64_t end = seen < span.keys.hi ? span.keys.lo + 1 : span.keys.hi;  // of one key at least
    for (int64_t n = row; n < row + rows && end < span.keys.hi; ++n)
      end = max64(end, min64(span.keys.hi, tile.keys[tile.rows[n]].hi));
    gemm<kLds, 1>(rows, 2, end - span.keys.lo, p + row * kLds, kLds, v, 0, tile.pv + row * kNR, kNR,
                  accumulate);
  }
}

// One group of spans for `count` gathered rows.
AF_INLINE void run_group(const TileRows& t, const Tile& tile, const ScoreMap& map,
                         const PackedHead& head, const Group& g, int64_t count) {
  bool finite = true;
  int64_t seen = tile.keys[tile.rows[0]].hi;
  for (int64_t n = 1; n < count; ++n) seen = min64(seen, tile.keys[tile.rows[n]].hi);
  for (int64_t i = 0; i < g.count; ++i) {
    const Span& span = g.spans[i];
    for (int64_t c = 0; c < span.width; c += kNR) finite &= head.finite[(span.key0 + c) / kNR];
    score_span(t, tile, head, span, count);
  }
  for (int64_t n = 0; n < count; ++n) weigh_row(t, tile, map, g, n);
  for (int64_t d = 0; d < t.plan.ldo; d += kNR) {
    for (int64_t i = 0; i < g.count && finite; ++i)
      weigh_span(t, tile, head, g.spans[i], count, seen, d, i > 0);
    for (int64_t n = 0; n < count; ++n) {
      float* o = tile.o + tile.rows[n] * t.plan.ldo + d;
      const VecF alpha = splat(tile.alpha[n]);
      VecF o0 = load(o) * alpha, o1 = load(o + kLanes) * alpha;
      if (finite) {
        o0 += load(tile.pv + n * kNR);
        o1 += load(tile.pv + n * kNR + kLanes);
      } else {
        accumulate_row(t, tile, head, g, n, d, o0, o1);
      }
      store(o, o0);
      store(o + kLanes, o1);
    }
  }
}

// The rows of list rows `items` that see keys in [keys.lo, keys.hi), gathered; f(count) for each
// batch of them.
template <class F>
AF_INLINE void gather_rows(const TileRows& t, const Tile& tile, const int32_t* items, int64_t n,
                           Interval keys, const F& f) {
  const int64_t dim = t.params.flash.problem.head_dim, heads = t.plan.units.heads;
  const int64_t q_block = t.params.selection.q_block;
  int64_t count = 0;
  for (int64_t item = 0; item < n; ++item) {
    const int64_t first = items[item] * q_block - t.token0;
    const int64_t last = min64(first + q_block, t.tokens);
    for (int64_t r = first * heads; r < last * heads; ++r) {
      if (tile.keys[r].lo >= keys.hi || tile.keys[r].hi <= keys.lo) continue;
      for (int64_t d = 0; d < dim; d += kLanes)
        store(tile.q_batch + count * kLds + d, load(tile.q + r * dim + d));
      tile.rows[count] = static_cast<int32_t>(r);
      if (++count < t.plan.batch) continue;
      f(count);
      count = 0;
    }
  }
  if (count > 0) f(count);
}

// Lists of several rows in the tile: block after block, the rows that name it.
AF_INLINE void run_blocks(const TileRows& t, const Tile& tile, const ScoreMap& map,
                          const PackedHead& head, int64_t blocks) {
  const int64_t kv_block = t.params.selection.kv_block;
  const Inverse& inverse = tile.inverse;
  for (int64_t id = 0; id < blocks; ++id) {
    const Interval block = {id * kv_block, min64((id + 1) * kv_block, t.seq.k_len)};
    gather_rows(t, tile, inverse.items + inverse.start[id],
                inverse.start[id + 1] - inverse.start[id], block, [&](int64_t count) {
                  for (int64_t key = block.lo; key < block.hi; key += kSpan) {
                    Group g;
                    g.add({key, min64(block.hi, key + kSpan)});
                    run_group(t, tile, map, head, g, count);
                  }
                });
  }
}

// One list for the whole tile: its blocks, as many at a time as S has room for.
AF_INLINE void run_list(const TileRows& t, const Tile& tile, const ScoreMap& map,
                        const PackedHead& head, int64_t blocks) {
  const int64_t kv_block = t.params.selection.kv_block;
  const int32_t row = static_cast<int32_t>(t.token0 / t.params.selection.q_block);
  Group g;
  auto flush = [&]() {
    if (g.count == 0) return;
    gather_rows(t, tile, &row, 1, {g.spans[0].keys.lo, g.spans[g.count - 1].keys.hi},
                [&](int64_t count) { run_group(t, tile, map, head, g, count); });
    g = Group{};
  };
  for (int64_t id = 0; id < blocks; ++id) {
    if (tile.inverse.start[id] == tile.inverse.start[id + 1]) continue;
    const int64_t end = min64((id + 1) * kv_block, t.seq.k_len);
    for (int64_t key = id * kv_block; key < end; key += kSpan) {
      const Interval keys = {key, min64(end, key + kSpan)};
      if (!g.fits(keys)) flush();
      g.add(keys);
    }
  }
  flush();
}

template <class T>
AF_INLINE void run_tile(const TileRows& t, const Tile& tile, const PackedHead& head,
                        const Lists& lists) {
  const FlashFwdParams& f = t.params.flash;
  const FlashProblem& p = f.problem;
  const ScoreMap map = score_map(p);
  const SelectionRef& s = t.params.selection;
  auto q_row = [&](int64_t r) __attribute__((always_inline)) {
    return row_ptr<const T>(f.q, t.seq.batch, t.seq.q_row + t.query(r), t.head(r));
  };
  auto out_row = [&](int64_t r) __attribute__((always_inline)) {
    return row_ptr<T>(f.out, t.seq.batch, t.seq.q_row + t.query(r), t.head(r));
  };
  for (int64_t r = 0; r < t.rows(); ++r) {
    if (r + kRowsAhead < t.rows()) prefetch_row(q_row(r + kRowsAhead), p.head_dim);
    const T* q = q_row(r);
    for (int64_t d = 0; d < p.head_dim; d += kLanes) {
      store_partial(tile.q + r * p.head_dim + d,
                    load_partial(q + d, p.head_dim - d) * splat(map.q_scale), p.head_dim - d);
    }
    tile.keys[r] = visible_keys(p, t.seq, t.head(r), t.query(r));
    tile.m[r] = -kInf;
    tile.l[r] = 0.0f;
  }
  fill(tile.o, 0, t.rows() * t.plan.ldo, 0.0f);
  const int64_t row0 = t.token0 / s.q_block;
  invert(lists, t.plan.units.list_head(s, t.unit), row0,
         min64(lists.rows, ceil_div(t.token0 + t.tokens, s.q_block)), tile.inverse);
  if (t.plan.tokens == s.q_block) {
    run_list(t, tile, map, head, lists.blocks);
  } else {
    run_blocks(t, tile, map, head, lists.blocks);
  }
  for (int64_t r = 0; r < t.rows(); ++r) {
    if (r + kRowsAhead < t.rows()) prefetch_row(out_row(r + kRowsAhead), p.v_head_dim);
    const int64_t h = t.head(r), row = t.seq.q_row + t.query(r);
    const RowEnd end = finish_softmax(tile.m[r], tile.l[r], p.sinks ? p.sinks[h] : -kInf);
    *stat_ptr(f.lse, t.seq, h, t.query(r)) = end.lse;
    T* lo = f.out_lo.data ? row_ptr<T>(f.out_lo, t.seq.batch, row, h) : nullptr;
    store_output(tile.o + r * t.plan.ldo, end.scale, p.v_head_dim, out_row(r), lo);
  }
}

template <class T>
AF_INLINE void run(const BlockSparseFwdParams& params, const Workers& workers) {
  const FlashProblem& p = params.flash.problem;
  const Plan plan = make_plan(params, workers.num_threads);
  char* base = static_cast<char*>(params.flash.workspace);
  Arena tile{nullptr}, head{nullptr};
  take_tile(tile, params, plan);
  take_head(head, p, plan);
  char* heads = base + tile.used * workers.num_threads;
  auto head_at = [&](int64_t slot) {
    Arena a{heads + slot * head.used};
    return take_head(a, p, plan);
  };
  const int64_t pairs = p.batch * p.heads_k, packs = ceil_div(plan.keys, kPackKeys);
  const int64_t units = plan.units.count / p.heads_k;  // per KV head
  for (int64_t pair0 = 0; pair0 < pairs; pair0 += plan.slots) {
    const int64_t slots = min64(plan.slots, pairs - pair0);
    parallel_tasks(workers, slots * packs, [&](int64_t task, int64_t) {
      const int64_t slot = task % slots, pair = pair0 + slot;  // heads lie side by side
      const Sequence seq = sequence(p, pair / p.heads_k);
      const int64_t key0 = task / slots * kPackKeys;
      for (int64_t key = key0; key < min64(key0 + kPackKeys, seq.k_len); key += kNR)
        pack_panel<T>(params, plan, seq, pair % p.heads_k, key, head_at(slot));
    });
    parallel_tasks(workers, slots * units * plan.tiles, [&](int64_t task, int64_t worker) {
      // Late tiles see the most keys under a causal mask: they go first.
      const int64_t index = plan.tiles - 1 - task / (slots * units);
      const int64_t slot = task % (slots * units) / units, pair = pair0 + slot;
      const int64_t unit = pair % p.heads_k * units + task % units;
      const Sequence seq = sequence(p, pair / p.heads_k);
      const int64_t token0 = index * plan.tokens;
      if (token0 >= seq.q_len) return;
      Arena a{base + worker * tile.used};
      const TileRows t = {params, plan, seq, unit, token0, min64(plan.tokens, seq.q_len - token0)};
      run_tile<T>(t, take_tile(a, params, plan), head_at(slot), lists_of(p, params.selection, seq));
    });
  }
}

}  // namespace

int64_t block_sparse_fwd_workspace(const BlockSparseFwdParams& params, int64_t num_threads) {
  const Plan plan = make_plan(params, num_threads);
  Arena tile{nullptr}, head{nullptr};
  take_tile(tile, params, plan);
  take_head(head, params.flash.problem, plan);
  return tile.used * num_threads + head.used * plan.slots;
}

void block_sparse_fwd(const BlockSparseFwdParams& params, const Workers& workers) {
  dispatch_dtype(params.flash.problem.dtype,
                 [&](auto element) { run<decltype(element)>(params, workers); });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
