// Four tokens of the recurrence at once, where every channel has a decay of its own, for rows of
// the state or for columns: what is common to all columns.
//
// With S before the group, P_u the product of the decays up to token u and R_j that of the decays
// after token j,
//   y_u = sum_r (read_u P_u)_r S_r + sum_{j <= u} A_uj x_j    A_uj = <read_u, write_j decay_{j->u}>
//   S_r <- P_3 S_r + sum_j (write_j R_j)_r x_j
// so a row of S is loaded, read four times, updated once by four products, and stored. Decays are
// products as in scan_chunk.h; those of columns act on x and y instead (scan.h).
//
// Here: read_u P_u and write_j R_j in the order the update wants them, A, and the denominator.
#pragma once

#include "cpu/linear/scan_operands.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int64_t kGroup = 4;   // tokens
constexpr int64_t kPairs = 10;  // of tokens j <= u of a group, A_uj at u (u + 1) / 2 + j
constexpr int64_t kGroups = kBlock / kGroup;

// What a block of tokens needs, [kGroups] of each; `positions` is padded to whole vectors.
struct Coefficients {
  float *read, *write;  // [positions][4]
  float* decay;         // [2][positions]: whole and part of P_3, of rows
  float* pairs;         // [16]: A
  float* inverse;       // [4]: 1 / denominator; the block's
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
  c.positions = n;
  return c;
}

// tokens[u] of the group, the first n of which exist.
template <DecayOn kOn, class T>
AF_INLINE void prepare_group(const Rows<T>& read, const Rows<T>& write, const Decay& decay,
                             const Denominator& norm, const int64_t* tokens, int64_t n,
                             const Coefficients& out) {
  constexpr bool kByRow = kOn == DecayOn::kRows;
  VecI order;
  for (int i = 0; i < kLanes; ++i) order[i] = i % (kLanes / 4) * 4 + i / (kLanes / 4);
  VecF sums[16] = {};  // A, then d of each token
  const int64_t rows = read.rows();
  for (int64_t r0 = 0; r0 < rows; r0 += kLanes) {
    VecF r[4] = {}, w[4] = {}, a[4], log[4] = {};
    for (int u = 0; u < 4; ++u) {
      a[u] = splat(1.0f);
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
        z = kept_of(log[u])(z, w[u]);
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
      w[j] = carried;
    }
    if (kByRow) {
      VecF product = splat(1.0f);
      for (int u = 0; u < 4; ++u) r[u] *= product *= a[u];
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
  for (int i = 0; i < kPairs; ++i) out.pairs[i] = totals[i];
  if (!norm.z) return;
  for (int64_t u = 0; u < n; ++u) {
    if (norm.den) norm.den[tokens[u] * norm.stride] = totals[kPairs + u];
    out.inverse[u] = norm.inverse(totals[kPairs + u]);
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
