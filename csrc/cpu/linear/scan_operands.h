// What a walk of the recurrence is given: rows of operands, decays, a denominator, and their order.
#pragma once

#include "attnforge/linear.h"
#include "cpu/flash/problem.h"
#include "cpu/linear/decay.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// Rows of a product's tile: states have 64 or 128 rows, which 8 divides and 12 does not, and a
// block of four times 12 tokens spends a tenth more on products inside itself.
constexpr int kTall = kLanes == 16 ? 8 : kMR;
constexpr int64_t kTile = kNR;         // columns of the state
constexpr int64_t kBlock = 4 * kTall;  // tokens, a multiple of kLanes and of 4

// Rows of the state keep the order in which transpose4_parts leaves those of a vector.
// Where a row of the state stands, and how many positions hold `rows` rows.
AF_INLINE int64_t position_of(int64_t row) {
  return row / kLanes * kLanes + row % 4 * (kLanes / 4) + row % kLanes / 4;
}
AF_INLINE int64_t positions_of(int64_t rows) {
  int64_t last = 0;
  for (int64_t row = max64(0, rows - kLanes); row < rows; ++row) {
    last = max64(last, position_of(row) + 1);
  }
  return last;
}

// One operand of a head: [time, dim] with unit last stride. `factor` is per token; an extra row
// behind the last is 1 in every token, or given per token.
template <class T>
struct Rows {
  const T* data;
  int64_t stride, dim;
  float scale = 1.0f;
  const float* factor = nullptr;
  const float* extra = nullptr;
  int64_t stat_stride = 0;  // of factor and extra
  bool ones = false;

  AF_INLINE_MEMBER bool extended() const { return extra || ones; }
  AF_INLINE_MEMBER int64_t rows() const { return dim + extended(); }
  AF_INLINE_MEMBER float scale_at(int64_t t) const {
    return factor ? scale * factor[t * stat_stride] : scale;
  }
  // Rows r0 .. r0 + kLanes of token t, zeros behind the last.
  AF_INLINE_MEMBER VecF block(int64_t t, int64_t r0) const {
    VecF x{};
    if (r0 < dim) x = load_partial(data + t * stride + r0, dim - r0) * splat(scale_at(t));
    if (extended() && dim - r0 < kLanes) {
      float lanes[kLanes];
      store(lanes, x);
      lanes[dim - r0] = ones ? scale : scale * extra[t * stat_stride];
      x = load(lanes);
    }
    return x;
  }
};

// The decays of one head. Backwards in time a state decays by the gate of the token it has just
// left, one later than the token it comes to.
struct Decay {
  LinearGate kind = LinearGate::kNone;
  const float* log = nullptr;  // of the head: token t at t * stride (kHead: one number)
  int64_t stride = 0, dim = 0;
  int64_t end = 0;
  bool backward = false;

  // The token whose gate acts before token t, or -1: the state that comes in does not decay.
  AF_INLINE_MEMBER int64_t token(int64_t t) const {
    return !backward ? t : t + 1 < end ? t + 1 : -1;
  }
  AF_INLINE_MEMBER float log_number(int64_t t) const {
    return t < 0 ? 0.0f : kind == LinearGate::kHead ? *log : log[t * stride];
  }
  AF_INLINE_MEMBER VecF log_vector(int64_t t, int64_t d) const {
    return t < 0 || d >= dim ? VecF{} : load_partial(log + t * stride + d, dim - d);
  }
  AF_INLINE_MEMBER float number(int64_t t) const { return decay_of(splat(log_number(t)))[0]; }
  AF_INLINE_MEMBER VecF vector(int64_t t, int64_t d) const { return decay_of(log_vector(t, d)); }
};

// What a decay multiplies. One number for the whole state is served by scan_chunk.h, with kNothing;
// one per channel of its rows or of its columns by scan_group.h.
enum class DecayOn { kNothing, kNumber, kRows, kLanesOf };

constexpr bool by_channel(DecayOn on) {
  return on == DecayOn::kRows || on == DecayOn::kLanesOf;
}

// The denominator of a forward: z [rows] and where d goes; null without one.
struct Denominator {
  float* z = nullptr;
  float* den = nullptr;  // token t at t * stride; null where another task writes it
  int64_t stride = 0;
  LinearNorm normalize = LinearNorm::kNone;
  float eps = 0.0f;

  AF_INLINE_MEMBER float inverse(float d) const {
    if (normalize == LinearNorm::kSum) return 1.0f / (d + eps);
    const float size = d < 0.0f ? -d : d;
    return 1.0f / (size < eps ? eps : size);
  }
};

// How a walk moves the state: both is the causal recurrence; the two halves follow one another
// where every token reads the state of the whole sequence.
enum class Walk { kBoth, kWrite, kRead };

template <class T>
struct Scan {
  Rows<T> read, write, lane;  // lane: x, [time, columns]
  Decay decay;
  Denominator norm = {};
  Walk walk = Walk::kBoth;
  int64_t begin = 0, end = 0;  // tokens
  bool backward = false;

  AF_INLINE_MEMBER int64_t length() const { return end - begin; }
  AF_INLINE_MEMBER int64_t token(int64_t step) const {
    return backward ? end - 1 - step : begin + step;
  }
};

// Rows of a head lie a whole token apart, where the hardware foresees nothing: those of the next
// block are fetched while this one is computed, a row at a time between its products, as a core
// would wait for more fetches at once than it keeps in flight.
template <class T>
class Ahead {
  const Scan<T>& scan_;
  const T* out_;  // where y goes, or null
  int64_t out_stride_, step_, end_, per_;
  int row_ = 0;

 public:
  // The block behind that of step0, in `turns` turns.
  AF_INLINE_MEMBER Ahead(const Scan<T>& scan, int64_t step0, int64_t turns, const T* out,
                         int64_t out_stride)
      : scan_(scan),
        out_(out),
        out_stride_(out_stride),
        step_(step0 + kBlock),
        end_(min64(step0 + 2 * kBlock, scan.length())),
        per_(ceil_div(4 * kBlock, turns)) {}

  AF_INLINE_MEMBER void turn() {
    for (int64_t i = 0; i < per_ && step_ < end_; ++i) {
      const int64_t t = scan_.token(step_);
      switch (row_++) {
        case 0:
          prefetch_row(scan_.read.data + t * scan_.read.stride, scan_.read.dim);
          break;
        case 1:
          prefetch_row(scan_.write.data + t * scan_.write.stride, scan_.write.dim);
          break;
        case 2:
          prefetch_row(scan_.lane.data + t * scan_.lane.stride, scan_.lane.dim);
          break;
        default:
          if (out_) prefetch_row(out_ + t * out_stride_, scan_.lane.dim);
          fetch_gate(scan_.decay.token(t));
          row_ = 0, ++step_;
      }
    }
  }

 private:
  AF_INLINE_MEMBER void fetch_gate(int64_t t) const {
    const Decay& d = scan_.decay;
    if (d.log && d.kind != LinearGate::kHead && t >= 0) prefetch_row(d.log + t * d.stride, d.dim);
  }
};

}  // namespace attnforge::cpu::ATTNFORGE_ISA
