// Four tokens of the recurrence at once: what is common to all columns of the state.
//
// With S before the group, P_u the product of the decays up to token u and R_j that of the decays
// after token j,
//   y_u = sum_r (read_u P_u)_r S_r + sum_{j <= u} A_uj x_j    A_uj = <read_u, write_j decay_{j->u}>
//   S_r <- P_3 S_r + sum_j (write_j R_j)_r x_j
// so a row of S is loaded, read four times, updated once by four products, and stored. All decays
// are products of numbers at most 1, never differences of sums of logs: nothing overflows, a reset
// (decay 0) is exact, and the last bit does not depend on how far back a gate lies. P_3 S, which
// rounds once per group for as long as the sequence is, is taken as in `Kept`.
//
// Here: read_u P_u and write_j R_j in the order the update wants them, A, and the denominator.
// The state keeps its rows in positions: those of a block of kLanes in the order in which
// transpose4_parts leaves them.
#pragma once

#include "attnforge/linear.h"
#include "cpu/flash/problem.h"
#include "cpu/linear/decay.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int64_t kGroup = 4;   // tokens
constexpr int64_t kPairs = 10;  // of tokens j <= u of a group, A_uj at u (u + 1) / 2 + j
constexpr int64_t kGroups = 8;  // of a block: its coefficients stay in L1 or L2
constexpr int64_t kBlock = kGroup * kGroups;

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

enum class DecayOn { kNothing, kNumber, kRows, kLanesOf };

// What a block of tokens needs, [kGroups] of each; `positions` is padded to whole vectors.
struct Coefficients {
  float *read, *write;  // [positions][4]
  float* decay;         // [2][positions]: whole and part of P_3; the first of each if it is one
  float* pairs;         // [16]: A
  float* inverse;       // [4]: 1 / denominator
  int64_t positions;

  AF_INLINE_MEMBER Coefficients at(int64_t group) const {
    return {read + group * positions * kGroup, write + group * positions * kGroup,
            decay + group * 2 * positions,     pairs + group * 16,
            inverse + group * kGroup,          positions};
  }
};

AF_INLINE Coefficients take_coefficients(Arena& arena, int64_t rows) {
  const int64_t n = round_up(rows, kLanes);
  Coefficients c;
  c.read = arena.take<float>(kGroups * n * kGroup);
  c.write = arena.take<float>(kGroups * n * kGroup);
  c.decay = arena.take<float>(kGroups * 2 * n);
  c.pairs = arena.take<float>(kGroups * 16);
  c.inverse = arena.take<float>(kBlock);
  c.positions = n;
  return c;
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

// tokens[u] of the group, the first n of which exist.
template <DecayOn kOn, class T>
AF_INLINE void prepare_group(const Rows<T>& read, const Rows<T>& write, const Decay& decay,
                             const Denominator& norm, Walk walk, const int64_t* tokens, int64_t n,
                             const Coefficients& out) {
  constexpr bool kByRow = kOn == DecayOn::kRows;
  alignas(64) float number[kLanes], logs[kLanes] = {};
  for (int64_t u = 0; kOn == DecayOn::kNumber && u < n; ++u) {
    logs[u] = decay.log_number(decay.token(tokens[u]));
  }
  store(number, kOn == DecayOn::kNumber ? decay_of(load(logs)) : splat(1.0f));
  float before[kGroup], after[kGroup];
  before[0] = number[0], after[3] = 1.0f;
  for (int u = 1; u < 4; ++u) before[u] = before[u - 1] * number[u];
  for (int u = 2; u >= 0; --u) after[u] = after[u + 1] * number[u + 1];
  if (kOn == DecayOn::kNumber) {
    const Kept kept = kept_of(splat((logs[0] + logs[1]) + (logs[2] + logs[3])));
    out.decay[0] = kept.whole[0], out.decay[out.positions] = kept.part[0];
  }

  VecI order;
  for (int i = 0; i < kLanes; ++i) order[i] = i % (kLanes / 4) * 4 + i / (kLanes / 4);
  VecF sums[16] = {};  // A, then d of each token
  const int64_t rows = read.rows();
  for (int64_t r0 = 0; r0 < rows; r0 += kLanes) {
    VecF r[4] = {}, w[4] = {}, a[4], log[4] = {};
    for (int u = 0; u < 4; ++u) {
      a[u] = splat(1.0f);
      if (kOn == DecayOn::kNumber) log[u] = splat(logs[u]);
      if (u >= n) continue;
      r[u] = read.block(tokens[u], r0);
      w[u] = write.block(tokens[u], r0);
      if (!kByRow) continue;
      log[u] = decay.log_vector(decay.token(tokens[u]), r0);
      a[u] = decay_of(log[u]);
    }
    if (norm.z) {
      VecF z = load(norm.z + r0);
      for (int u = 0; u < 4; ++u) {
        if (walk != Walk::kRead) z = kept_of(log[u])(z, w[u]);
        sums[kPairs + u] = fma(r[u], z, sums[kPairs + u]);
      }
      store(norm.z + r0, z);
    }
    for (int j = 0; j < 4; ++j) {
      VecF carried = w[j];
      for (int u = j; u < 4; ++u) {
        if (kByRow && u > j) carried *= a[u];
        sums[u * (u + 1) / 2 + j] = fma(r[u], carried, sums[u * (u + 1) / 2 + j]);
      }
      w[j] = kByRow ? carried : carried * splat(after[j]);
    }
    VecF product = kByRow ? a[0] : splat(before[0]);
    for (int u = 0; u < 4; ++u) {
      if (u > 0) product = kByRow ? product * a[u] : splat(before[u]);
      r[u] *= product;
    }
    if (kByRow) {
      const Kept kept = kept_of((log[0] + log[1]) + (log[2] + log[3]));
      store(out.decay + r0, __builtin_shuffle(kept.whole, order));
      store(out.decay + out.positions + r0, __builtin_shuffle(kept.part, order));
    }
    transpose4_parts(r[0], r[1], r[2], r[3]);
    transpose4_parts(w[0], w[1], w[2], w[3]);
    for (int i = 0; i < 4; ++i) {
      store(out.read + r0 * kGroup + i * kLanes, r[i]);
      store(out.write + r0 * kGroup + i * kLanes, w[i]);
    }
  }
  float totals[16 + kLanes];
  for (int i = 0; i < 16; i += kLanes) store(totals + i, sum_each(sums + i));
  for (int u = 0; u < 4; ++u) {
    float carried = 1.0f;
    for (int j = u; j >= 0; --j) {
      out.pairs[u * (u + 1) / 2 + j] = totals[u * (u + 1) / 2 + j] * carried;
      carried *= number[j];
    }
  }
  if (!norm.z || walk == Walk::kWrite) return;
  for (int64_t u = 0; u < n; ++u) {
    if (norm.den) norm.den[tokens[u] * norm.stride] = totals[kPairs + u];
    out.inverse[u] = norm.inverse(totals[kPairs + u]);
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
