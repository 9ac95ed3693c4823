// Block-sparse attention, forward.
//
// Algorithm (the key-block-major order of FlashMoBA, on CPU tiles): a task is a tile of queries of
// all heads that share lists and a KV head; their O, m, l and Q stay in L2. The lists of the tile
// are inverted, and for each key block, ascending, the rows that name it are gathered, 48 to 96 at
// a time: S = Q K^T, online softmax in base 2, O += P V. So per-token lists (NSA, MoBA) and lists
// of query blocks (SeerAttention) are one kernel, and a key block is read once per tile. A list
// with rows enough for a product is a tile of its own: its rows stay where they are, P V is added
// to their O in place, and several blocks go through one softmax. What is multiplied is the level's
// Operands (flash/operands.h): fp32 throughout, or bf16 on matrix tiles.
//
//   tile       rows whose Q and O take kTileBytes: 512 at D 64 in fp32, 682 in bf16
//   gather     copies D channels of Q per row and block, adds Dv floats of O: 2 to 4% of the fp32
//              products over a block of 64 keys
//   flops      2 (D + Dv) per row and listed key
//   bytes      Q, O once; K, V packed once per KV head, then from cache once per tile and block:
//              FMAs ask for the panel that the next product reads, and a large O is not read first
//   order      (batch, KV head) in waves whose packed K and V stay inside kWaveBytes; heavy tiles
//              first, those of all heads in turn, or with matrix tiles head after head
//
// A row's result depends on its own Q, list and keys only. NaN or infinity in a key that a row does
// not see never reaches the row.
#include "cpu/block_sparse/lists.h"
#include "cpu/flash/operands.h"
#include "cpu/micro/stream.h"
#include "cpu/tile_kernels.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_HERE
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

using Element = Operands::Element;

// Rows of one product: in fp32 more of them where blocks are small, so that lists of 64 queries go
// whole. With matrix tiles 64 take 0.95 of the time of 32, which read K and V twice.
constexpr int64_t kBatchRows = 48;
constexpr int64_t kMaxBatchRows = 96;
constexpr int64_t kTileBatchRows = 64;
constexpr int64_t kSmallBlock = 128;
constexpr int64_t kSpan = 256;  // keys of one product
// Columns of one softmax: of several blocks, or of a span that begins and ends inside panels.
constexpr int64_t kMaxWidth = kSpan + 2 * kNR;
constexpr int64_t kMaxSpans = 8;
constexpr int64_t kTileBytes = 256 << 10;
// In bf16 a head of 8192 keys and D 64: 0.92 of the time of two, for less new memory. In fp32 two
// heads of them: rows of both lie side by side, and panels come from L3 as they are asked for.
constexpr int64_t kWaveBytes = Operands::kTiles ? 2 << 20 : 8 << 20;
constexpr int64_t kPackKeys = 256;
static_assert(kMaxWidth <= kLds, "S has room for it");

struct PackedHead {
  Element* k;       // [panels][depth][kNR]
  Element* v;       // [Dv / kNR][keys][kNR]
  uint8_t* finite;  // [panels]: every V element of those keys is finite
};

struct Tile {
  Element* q;  // [rows][depth]; in fp32 scaled
  float* o;    // [rows][ldo]
  float* m;
  float* l;
  Interval* keys;
  Inverse inverse;
  // One batch of rows.
  Element* q_batch;  // [batch][ldq]
  float* s;          // [batch][kLds]
  float* pv;         // [batch][kNR]
  float* alpha;      // [batch]
  int32_t* rows;     // [batch]
};

struct Plan {
  int64_t keys;    // of the longest sequence, rounded up to whole panels
  int64_t tokens;  // of a tile, a multiple of q_block
  bool alone;      // every list is a tile of its own
  int64_t tiles;   // of the longest sequence and one unit
  int64_t slots;   // (batch, KV head) pairs per wave
  int64_t batch;   // rows of one product
  int64_t depth;   // channels of Q and K
  int64_t ldo;
  Units units;
};

AF_INLINE Plan make_plan(const BlockSparseFwdParams& params, int64_t threads) {
  const FlashProblem& p = params.flash.problem;
  const SelectionRef& s = params.selection;
  constexpr int64_t kSize = sizeof(Element);
  Plan plan;
  plan.units = units_of(p, s);
  plan.batch = Operands::kTiles            ? kTileBatchRows
               : s.kv_block <= kSmallBlock ? kMaxBatchRows
                                           : kBatchRows;
  plan.keys = max64(kNR, round_up(p.seqlen_k, kNR));
  plan.depth = Operands::depth(p.head_dim);
  plan.ldo = padded_columns(p.v_head_dim);
  // A list that has rows enough for a product is a tile of its own.
  plan.alone = s.q_block * plan.units.heads >= kBatchRows;
  const int64_t rows = plan.alone ? 0 : kTileBytes / (plan.depth * kSize + plan.ldo * 4);
  plan.tokens = max64(1, rows / plan.units.heads / s.q_block) * s.q_block;
  plan.tokens = min64(plan.tokens, round_up(max64(1, p.seqlen_q), s.q_block));
  plan.tiles = max64(1, ceil_div(p.seqlen_q, plan.tokens));
  const int64_t pairs = p.batch * p.heads_k;
  const int64_t bytes = plan.keys * (plan.depth + plan.ldo) * kSize;
  const int64_t enough = ceil_div(4 * threads, plan.tiles);
  plan.slots = max64(1, min64(pairs, max64(enough, kWaveBytes / bytes)));
  return plan;
}

AF_INLINE PackedHead take_head(Arena& a, const Plan& plan) {
  PackedHead head;
  head.k = a.take<Element>(plan.keys * plan.depth);
  head.v = a.take<Element>(plan.keys * plan.ldo);
  head.finite = a.take<uint8_t>(plan.keys / kNR);
  return head;
}

AF_INLINE Tile take_tile(Arena& a, const BlockSparseFwdParams& params, const Plan& plan) {
  const FlashProblem& p = params.flash.problem;
  const SelectionRef& s = params.selection;
  // Products compute whole row steps.
  const int64_t rows = round_up(plan.tokens * plan.units.heads, Operands::kRowStep);
  Tile t;
  t.q = a.take<Element>(rows * plan.depth + kLanes);
  t.o = a.take<float>(rows * plan.ldo);
  t.m = a.take<float>(rows);
  t.l = a.take<float>(rows);
  t.keys = a.take<Interval>(rows);
  t.inverse =
      take_inverse(a, ceil_div(p.seqlen_k, s.kv_block) + 1, plan.tokens / s.q_block, s.slots);
  t.q_batch = a.take<Element>(plan.batch * Operands::row_stride(plan.depth));
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
  auto k_row = [&](int64_t j) __attribute__((always_inline)) {
    return row_ptr<const T>(f.k, seq.batch, seq.k_row + key + j, kv_head);
  };
  auto v_row = [&](int64_t j) __attribute__((always_inline)) {
    return row_ptr<const T>(f.v, seq.batch, seq.k_row + key + j, kv_head);
  };
  const int64_t keys = min64(kNR, seq.k_len - key);
  for (int64_t next = keys; next < min64(keys + kNR, seq.k_len - key); ++next) {
    prefetch_row(k_row(next), p.head_dim);
    prefetch_row(v_row(next), p.v_head_dim);
  }
  Operands::pack_keys(k_row, keys, p.head_dim, head.k + key * plan.depth);
  head.finite[key / kNR] = Operands::pack_values(
      v_row, [](int64_t, VecF x) { return x; }, keys, p.v_head_dim, head.v + key * kNR,
      plan.keys * kNR);
}

// A tile of tokens [token0, token0 + tokens) of one unit; row r is head r % heads of token r /
// heads.
struct TileRows {
  const BlockSparseFwdParams& params;
  const Plan& plan;
  Sequence seq;
  int64_t unit, token0, tokens;

  AF_INLINE_MEMBER int64_t head(int64_t r) const {
    return unit * plan.units.heads + r % plan.units.heads;
  }
  AF_INLINE_MEMBER int64_t query(int64_t r) const { return token0 + r / plan.units.heads; }
  AF_INLINE_MEMBER int64_t rows() const { return tokens * plan.units.heads; }
};

// Rows that will be needed, asked for one by one while others are computed: they lie a token apart,
// on pages of their own, and take longer to come than a few rows ahead.
struct RowsSoon {
  const char* row;
  int64_t token_bytes, head_bytes, row_bytes;
  int64_t heads, head, left;

  template <class T>
  AF_INLINE_MEMBER static RowsSoon of(const TileRows& t, const TensorRef& x, int64_t dim) {
    constexpr int64_t kSize = sizeof(T);
    const T* first = row_ptr<const T>(x, t.seq.batch, t.seq.q_row + t.query(0), t.head(0));
    return {reinterpret_cast<const char*>(first),
            x.seq_stride * kSize,
            x.head_stride * kSize,
            dim * kSize,
            t.plan.units.heads,
            0,
            t.rows()};
  }
  AF_INLINE_MEMBER void step() {
    if (left == 0) return;
    --left;
    for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
    row += head_bytes;
    if (++head == heads) head = 0, row += token_bytes - heads * head_bytes;
  }
};

struct Soon {
  RowsSoon out, next_q;  // this tile's, and of the tile that comes after it
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
  int64_t next = -1;  // the first key of what comes after this group, if that is known

  AF_INLINE_MEMBER bool fits(Interval keys) const {
    return count < kMaxSpans && width + span_width(keys) <= kMaxWidth;
  }
  AF_INLINE_MEMBER void add(Interval keys) {
    spans[count++] = {keys, keys.lo / kNR * kNR, width, span_width(keys)};
    width += span_width(keys);
  }
};

// Rows of one product: a run of the tile's own from `first` on, whose O is summed where it lies; or
// rows gathered from all over the tile (first < 0), tile.rows, whose P V is added to theirs.
struct Batch {
  const Element* q;
  int64_t first, count;

  AF_INLINE_MEMBER bool gathered() const { return first < 0; }
  AF_INLINE_MEMBER int64_t row(const Tile& tile, int64_t n) const {
    return gathered() ? tile.rows[n] : first + n;
  }
};

// What row r sees of a span, in columns from its key0.
AF_INLINE Interval seen_columns(const Tile& tile, const Span& span, int64_t r) {
  const int64_t lo = min64(max64(span.keys.lo, tile.keys[r].lo), span.keys.hi);
  return {lo - span.key0, max64(lo, min64(span.keys.hi, tile.keys[r].hi)) - span.key0};
}

// Scores of row n of a batch to probabilities; alpha is what its O is to be multiplied by. Columns
// from `width` on nobody in its row group sees.
AF_INLINE void weigh_row(const TileRows& t, const Tile& tile, const ScoreMap& map, const Group& g,
                         const Batch& b, int64_t n, int64_t width) {
  const FlashProblem& p = t.params.flash.problem;
  const int64_t r = b.row(tile, n);
  float* s = tile.s + n * kLds;
  float scale = 1.0f;
  if constexpr (Operands::kTiles) {
    // A positive scale is part of softmax; where there is more to do, it is done first.
    scale = map.q_scale;
    if (map.cap2 > 0.0f || p.alibi_slopes || !(scale > 0.0f)) {
      scale_row(s, width, scale);
      scale = 1.0f;
    }
  }
  if (map.cap2 > 0.0f) apply_softcap(s, width, map.cap2);
  for (int64_t i = 0; i < g.count && g.spans[i].column < width; ++i) {
    const Span& span = g.spans[i];
    const int64_t columns = min64(span.width, width - span.column);
    if (p.alibi_slopes) {
      add_alibi(s + span.column, columns, alibi_slope2(p, t.seq.batch, t.head(r)),
                t.query(r) + t.seq.offset - span.key0);
    }
    const Interval seen = seen_columns(tile, span, r);
    if (seen.lo > 0 || seen.hi < columns)
      mask_row(s + span.column, columns, seen.lo, seen.hi, -kInf);
  }
  tile.alpha[n] = Operands::softmax(s, 0, width, scale, tile.m[r], tile.l[r]);
}

// Columns of a group's scores that some of the rows [n, n + kRowGroup) of a batch see, up to the
// last one, as whole panels: one at least.
AF_INLINE int64_t group_width(const Tile& tile, const Group& g, const Batch& b, int64_t n) {
  int64_t end = 0;
  for (const int64_t last = min64(n + Operands::kRowGroup, b.count); n < last; ++n)
    end = max64(end, tile.keys[b.row(tile, n)].hi);
  for (int64_t i = g.count - 1; i >= 0; --i) {
    const Span& span = g.spans[i];
    if (end > span.key0)
      return span.column + min64(span.width, round_up(end - span.key0, int64_t{kNR}));
  }
  return kNR;
}

// Panels of a head, as what the next product reads.
AF_INLINE LinesSoon keys_soon(const Plan& plan, const PackedHead& head, int64_t key) {
  constexpr int64_t kSize = sizeof(Element);
  return {reinterpret_cast<const char*>(head.k + key / kNR * kNR * plan.depth),
          plan.depth * kNR * kSize / LinesSoon::kLine};
}
AF_INLINE LinesSoon values_soon(const Plan& plan, const PackedHead& head, int64_t d,
                                const Span& span) {
  constexpr int64_t kSize = sizeof(Element);
  return {reinterpret_cast<const char*>(head.v + d * plan.keys + span.key0 * kNR),
          span.width * kNR * kSize / LinesSoon::kLine};
}

// What is read after the scores of span i from column c on: its next panel, the next span, or V.
AF_INLINE LinesSoon after_scores(const Plan& plan, const PackedHead& head, const Group& g,
                                 int64_t i, int64_t c) {
  if (c + kNR < g.spans[i].width) return keys_soon(plan, head, g.spans[i].key0 + c + kNR);
  if (i + 1 < g.count) return keys_soon(plan, head, g.spans[i + 1].key0);
  return values_soon(plan, head, 0, g.spans[0]);
}
// What is read after columns d .. of P V of span i.
AF_INLINE LinesSoon after_values(const Plan& plan, const PackedHead& head, const Group& g,
                                 int64_t i, int64_t d, int64_t v_dim) {
  if (i + 1 < g.count) return values_soon(plan, head, d, g.spans[i + 1]);
  if (d + kNR < v_dim) return values_soon(plan, head, d + kNR, g.spans[0]);
  return g.next < 0 ? LinesSoon{} : keys_soon(plan, head, g.next);
}

// Scores of a span, panel by panel; those that no earlier row group sees, as below the diagonal,
// begin with the first one that does.
AF_INLINE void score_span(const TileRows& t, const Tile& tile, const PackedHead& head,
                          const Group& g, int64_t i, const Batch& b) {
  const Span& span = g.spans[i];
  const int64_t depth = t.plan.depth;
  int64_t row = 0;
  for (int64_t c = 0; c < span.width; c += kNR) {
    while (row < b.count && tile.keys[b.row(tile, row)].hi <= span.key0 + c) ++row;
    const int64_t first = row / Operands::kRowGroup * Operands::kRowGroup;
    if (first < b.count) {
      LinesSoon soon = after_scores(t.plan, head, g, i, c);
      Operands::row_scores(b.count - first, 2, depth, b.q + first * Operands::row_stride(depth),
                           head.k + (span.key0 + c) * depth,
                           tile.s + first * kLds + span.column + c, soon);
    }
  }
}

// Where P V of column vectors d .. goes: into O where it lies, or into pv.
struct Sums {
  float* at;  // [rows][ld]
  int64_t ld, d, vectors;
};

// P V of a span. `seen` is the least end of what rows see: where it lies in the span, each row
// group takes keys up to the last that one of its rows sees.
AF_INLINE void weigh_span(const TileRows& t, const Tile& tile, const PackedHead& head,
                          const Group& g, int64_t i, const Batch& b, int64_t seen, const Sums& sums,
                          bool accumulate) {
  const Span& span = g.spans[i];
  LinesSoon soon = after_values(t.plan, head, g, i, sums.d, t.params.flash.problem.v_head_dim);
  // Tiles take whole panels, in which hidden keys weigh nothing.
  const int64_t lo = Operands::kTiles ? span.key0 : span.keys.lo;
  const Element* v = head.v + sums.d * t.plan.keys + lo * kNR;
  const bool whole = seen >= span.keys.hi;
  const int64_t step = whole ? b.count : Operands::kRowGroup;
  for (int64_t row = 0; row < b.count; row += step) {
    const int64_t rows = min64(step, b.count - row);
    int64_t end = whole ? span.keys.hi : accumulate ? lo : lo + 1;
    for (int64_t n = row; n < row + rows && end < span.keys.hi; ++n)
      end = max64(end, min64(span.keys.hi, tile.keys[b.row(tile, n)].hi));
    if (end == lo) continue;
    Operands::row_values(rows, sums.vectors, tile.s + row * kLds, span.column + lo - span.key0,
                         end - lo, v, sums.at + row * sums.ld, sums.ld, accumulate, soon);
  }
}

// P V of row n of a batch over exactly the keys that it sees: where V is not finite everywhere, as
// 0 * NaN is NaN. The sum is that of the product.
AF_INLINE void weigh_seen(const TileRows& t, const Tile& tile, const PackedHead& head,
                          const Group& g, const Batch& b, int64_t n, const Sums& sums) {
  for (int64_t i = 0; i < g.count; ++i) {
    const Span& span = g.spans[i];
    const Interval own = seen_columns(tile, span, b.row(tile, n));
    auto sees = [&](int64_t c) { return c >= span.column + own.lo && c < span.column + own.hi; };
    if (own.lo < own.hi)
      Operands::add_seen_values(sees, tile.s + n * kLds, span.column, own.hi,
                                head.v + sums.d * t.plan.keys + span.key0 * kNR, 0, sums.vectors,
                                sums.at + n * sums.ld);
  }
}

// P V of a group, column panel by column panel.
AF_INLINE void weigh_group(const TileRows& t, const Tile& tile, const PackedHead& head,
                           const Group& g, const Batch& b, int64_t seen, bool finite) {
  const int64_t ldo = t.plan.ldo, v_dim = t.params.flash.problem.v_head_dim;
  for (int64_t n = 0; n < b.count && !b.gathered(); ++n)
    if (tile.alpha[n] != 1.0f) scale_row(tile.o + b.row(tile, n) * ldo, ldo, tile.alpha[n]);
  for (int64_t d = 0; d < v_dim; d += kNR) {
    Sums sums = {tile.pv, kNR, d, min64(2, vectors_of(v_dim - d))};
    if (!b.gathered()) sums.at = tile.o + b.first * ldo + d, sums.ld = ldo;
    for (int64_t i = 0; i < g.count && finite; ++i)
      weigh_span(t, tile, head, g, i, b, seen, sums, !b.gathered() || i > 0);
    for (int64_t n = 0; n < b.count && !finite; ++n) {
      if (b.gathered()) fill(tile.pv + n * kNR, 0, kNR, 0.0f);
      weigh_seen(t, tile, head, g, b, n, sums);
    }
    for (int64_t n = 0; n < b.count && b.gathered(); ++n) {
      float* o = tile.o + tile.rows[n] * ldo + d;
      const float* pv = tile.pv + n * kNR;
      const VecF alpha = splat(tile.alpha[n]);
      store(o, load(o) * alpha + load(pv));
      store(o + kLanes, load(o + kLanes) * alpha + load(pv + kLanes));
    }
  }
}

// One group of spans for a batch of rows.
AF_INLINE void run_group(const TileRows& t, const Tile& tile, const ScoreMap& map,
                         const PackedHead& head, const Group& g, const Batch& b, Soon& soon) {
  bool finite = true;
  int64_t seen = tile.keys[b.row(tile, 0)].hi;
  for (int64_t n = 1; n < b.count; ++n) seen = min64(seen, tile.keys[b.row(tile, n)].hi);
  for (int64_t i = 0; i < g.count; ++i) {
    const Span& span = g.spans[i];
    for (int64_t c = 0; c < span.width; c += kNR) finite &= head.finite[(span.key0 + c) / kNR];
    score_span(t, tile, head, g, i, b);
  }
  int64_t width = g.width;
  for (int64_t n = 0; n < b.count; ++n) {
    if (n % Operands::kRowGroup == 0) width = group_width(tile, g, b, n);
    weigh_row(t, tile, map, g, b, n, width);
    if constexpr (Operands::kTiles) {  // beside fp32 products they gain nothing
      soon.out.step();
      soon.next_q.step();
    }
  }
  weigh_group(t, tile, head, g, b, seen, finite);
}

AF_INLINE void copy_query(const TileRows& t, const Tile& tile, int64_t r, int64_t n) {
  constexpr int64_t kVector = sizeof(VecU) / sizeof(Element);
  const int64_t depth = t.plan.depth;
  for (int64_t d = 0; d < depth; d += kVector) {
    store_raw(tile.q_batch + n * Operands::row_stride(depth) + d,
              load_raw<VecU>(tile.q + r * depth + d));
  }
}

// The rows of list rows `items` that see keys in [keys.lo, keys.hi), gathered; f(batch) for each
// batch of them.
template <class F>
AF_INLINE void gather_rows(const TileRows& t, const Tile& tile, const int32_t* items, int64_t n,
                           Interval keys, const F& f) {
  const int64_t heads = t.plan.units.heads, q_block = t.params.selection.q_block;
  int64_t count = 0;
  for (int64_t item = 0; item < n; ++item) {
    const int64_t first = items[item] * q_block - t.token0;
    const int64_t last = min64(first + q_block, t.tokens);
    for (int64_t r = first * heads; r < last * heads; ++r) {
      if (tile.keys[r].lo >= keys.hi || tile.keys[r].hi <= keys.lo) continue;
      copy_query(t, tile, r, count);
      tile.rows[count] = static_cast<int32_t>(r);
      if (++count < t.plan.batch) continue;
      f(Batch{tile.q_batch, -1, count});
      count = 0;
    }
  }
  if (count > 0) f(Batch{tile.q_batch, -1, count});
}

// All rows of the tile as they stand; f(batch) for each batch that sees keys in [keys.lo, keys.hi).
template <class F>
AF_INLINE void all_rows(const TileRows& t, const Tile& tile, Interval keys, const F& f) {
  for (int64_t first = 0; first < t.rows(); first += t.plan.batch) {
    const int64_t count = min64(t.plan.batch, t.rows() - first);
    bool sees = false;
    for (int64_t r = first; r < first + count && !sees; ++r)
      sees = tile.keys[r].lo < keys.hi && tile.keys[r].hi > keys.lo;
    if (!sees) continue;
    if constexpr (Operands::kTiles) {
      f(Batch{tile.q + first * t.plan.depth, first, count});
    } else {
      for (int64_t n = 0; n < count; ++n) copy_query(t, tile, first + n, n);
      f(Batch{tile.q_batch, first, count});
    }
  }
}

// Lists of several rows in the tile: block after block, the rows that name it.
AF_INLINE void run_blocks(const TileRows& t, const Tile& tile, const ScoreMap& map,
                          const PackedHead& head, int64_t blocks, Soon& soon) {
  const int64_t kv_block = t.params.selection.kv_block;
  const Inverse& inverse = tile.inverse;
  for (int64_t id = 0; id < blocks; ++id) {
    const Interval block = {id * kv_block, min64((id + 1) * kv_block, t.seq.k_len)};
    gather_rows(t, tile, inverse.items + inverse.start[id],
                inverse.start[id + 1] - inverse.start[id], block, [&](const Batch& b) {
                  for (int64_t key = block.lo; key < block.hi; key += kSpan) {
                    Group g;
                    g.add({key, min64(block.hi, key + kSpan)});
                    run_group(t, tile, map, head, g, b, soon);
                  }
                });
  }
}

// One list for the whole tile: its blocks, as many at a time as S has room for.
AF_INLINE void run_list(const TileRows& t, const Tile& tile, const ScoreMap& map,
                        const PackedHead& head, int64_t blocks, Soon& soon) {
  const int64_t kv_block = t.params.selection.kv_block;
  Group g;
  auto flush = [&]() {
    if (g.count == 0) return;
    all_rows(t, tile, {g.spans[0].keys.lo, g.spans[g.count - 1].keys.hi},
             [&](const Batch& b) { run_group(t, tile, map, head, g, b, soon); });
    g = Group{};
  };
  for (int64_t id = 0; id < blocks; ++id) {
    if (tile.inverse.start[id] == tile.inverse.start[id + 1]) continue;
    const int64_t end = min64((id + 1) * kv_block, t.seq.k_len);
    for (int64_t key = id * kv_block; key < end; key += kSpan) {
      const Interval keys = {key, min64(end, key + kSpan)};
      if (!g.fits(keys)) {
        g.next = key;
        flush();
      }
      g.add(keys);
    }
  }
  flush();
}

template <class T>
AF_INLINE void run_tile(const TileRows& t, const TileRows& next, const Tile& tile,
                        const PackedHead& head, const Lists& lists) {
  const Operands::Scope scope;
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
    Operands::load_query(q_row(r), p.head_dim, map.q_scale, tile.q + r * t.plan.depth);
    tile.keys[r] = visible_keys(p, t.seq, t.head(r), t.query(r));
    tile.m[r] = -kInf;
    tile.l[r] = 0.0f;
  }
  fill(tile.o, 0, t.rows() * t.plan.ldo, 0.0f);
  const int64_t row0 = t.token0 / s.q_block;
  invert(lists, t.plan.units.list_head(s, t.unit), row0,
         min64(lists.rows, ceil_div(t.token0 + t.tokens, s.q_block)), tile.inverse);
  Soon soon = {RowsSoon::of<T>(t, f.out, p.v_head_dim), RowsSoon::of<T>(next, f.q, p.head_dim)};
  if (t.plan.alone) {
    run_list(t, tile, map, head, lists.blocks, soon);
  } else {
    run_blocks(t, tile, map, head, lists.blocks, soon);
  }
  const bool large = !Operands::kTiles && !f.out_lo.data &&
                     streamed<T>(f.out, p.batch * p.seqlen_q, p.heads_q, p.v_head_dim);
  for (int64_t r = 0; r < t.rows(); ++r) {
    if (!large && !Operands::kTiles && r + kRowsAhead < t.rows())
      prefetch_row(out_row(r + kRowsAhead), p.v_head_dim);
    const int64_t h = t.head(r), row = t.seq.q_row + t.query(r);
    const RowEnd end = finish_softmax(tile.m[r], tile.l[r], p.sinks ? p.sinks[h] : -kInf);
    *stat_ptr(f.lse, t.seq, h, t.query(r)) = end.lse;
    const float* o = tile.o + r * t.plan.ldo;
    if (large) {
      stream_row(o, end.scale, p.v_head_dim, out_row(r));
      continue;
    }
    T* lo = f.out_lo.data ? row_ptr<T>(f.out_lo, t.seq.batch, row, h) : nullptr;
    store_output(o, end.scale, p.v_head_dim, out_row(r), lo);
  }
  if (large) end_stream();
}

template <class T>
AF_INLINE void run(const BlockSparseFwdParams& params, const Workers& workers) {
  const FlashProblem& p = params.flash.problem;
  const Plan plan = make_plan(params, workers.num_threads);
  char* base = static_cast<char*>(params.flash.workspace);
  Arena tile{nullptr}, head{nullptr};
  take_tile(tile, params, plan);
  take_head(head, plan);
  char* heads = base + tile.used * workers.num_threads;
  auto head_at = [&](int64_t slot) {
    Arena a{heads + slot * head.used};
    return take_head(a, plan);
  };
  const int64_t pairs = p.batch * p.heads_k, packs = ceil_div(plan.keys, kPackKeys);
  const int64_t units = plan.units.count / p.heads_k;  // per KV head
  for (int64_t pair0 = 0; pair0 < pairs; pair0 += plan.slots) {
    const int64_t slots = min64(plan.slots, pairs - pair0);
    const int64_t batch0 = pair0 / p.heads_k;
    const int64_t batches = (pair0 + slots - 1) / p.heads_k + 1 - batch0;
    parallel_tasks(workers, batches * packs, [&](int64_t task, int64_t) {
      const int64_t batch = batch0 + task / packs, key0 = task % packs * kPackKeys;
      const Sequence seq = sequence(p, batch);
      const int64_t first = max64(pair0, batch * p.heads_k);
      const int64_t last = min64(pair0 + slots, (batch + 1) * p.heads_k);
      for (int64_t key = key0; key < min64(key0 + kPackKeys, seq.k_len); key += kNR) {
        for (int64_t pair = first; pair < last; ++pair)  // heads lie side by side
          pack_panel<T>(params, plan, seq, pair % p.heads_k, key, head_at(pair - pair0));
      }
    });
    const int64_t tasks = slots * units * plan.tiles;
    auto slot_of = [&](int64_t task) {
      return Operands::kTiles ? task / (units * plan.tiles) : task % (slots * units) / units;
    };
    auto rows_of = [&](int64_t task) -> TileRows {
      // Late tiles see the most keys under a causal mask: they go first, those of all heads in
      // turn, or with matrix tiles head after head: its K and V stay in L2.
      const int64_t index =
          plan.tiles - 1 - (Operands::kTiles ? task / units % plan.tiles : task / (slots * units));
      const int64_t pair = pair0 + slot_of(task);
      const int64_t unit = pair % p.heads_k * units + task % units;
      const Sequence seq = sequence(p, pair / p.heads_k);
      const int64_t token0 = index * plan.tokens;
      return {params, plan, seq, unit, token0, max64(0, min64(plan.tokens, seq.q_len - token0))};
    };
    parallel_tasks(workers, tasks, [&](int64_t task, int64_t worker) {
      const TileRows t = rows_of(task);
      if (t.tokens == 0) return;
      Arena a{base + worker * tile.used};
      // What this worker will do next is a guess: that all take turns.
      const TileRows next = rows_of(min64(tasks - 1, task + workers.num_threads));
      run_tile<T>(t, next, take_tile(a, params, plan), head_at(slot_of(task)),
                  lists_of(p, params.selection, t.seq));
    });
  }
}

}  // namespace

int64_t block_sparse_fwd_workspace(const BlockSparseFwdParams& params, int64_t num_threads) {
  AF_LEAVE_UNLESS(served_by_tiles(params.flash), block_sparse_fwd_workspace(params, num_threads));
  const Plan plan = make_plan(params, num_threads);
  Arena tile{nullptr}, head{nullptr};
  take_tile(tile, params, plan);
  take_head(head, plan);
  return tile.used * num_threads + head.used * plan.slots;
}

void block_sparse_fwd(const BlockSparseFwdParams& params, const Workers& workers) {
  AF_LEAVE_UNLESS(served_by_tiles(params.flash), block_sparse_fwd(params, workers));
  dispatch_plain_operands(params.flash.problem.dtype,
                          [&](auto element) { run<decltype(element)>(params, workers); });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
