// Four tokens of the recurrence at once, with a decay per channel: one tile of the state,
// [positions][kTile], for the columns it holds. See scan_group.h for the algebra.
//
// Registers: 4 outputs and 4 operands of kScanVecs vectors, a row of S, its decay, temporaries.
// Per row and vector 1 load, 1 store and 10 multiply-adds, of which 8 count.
#pragma once

#include "cpu/linear/scan_group.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

#if ATTNFORGE_LANES == 16
constexpr int kScanVecs = 2;  // 8 + 8 + 2 + 4 + 2 of 32 registers
#else
constexpr int kScanVecs = 1;  // 4 + 4 + 1 + 2 + 2 of 16
#endif

// x and y are [4][kTile] (y comes in with what it starts from), lanes [2][kTile] the
// decay of columns, whole and part.
template <int NV, DecayOn kOn>
[[gnu::noinline]] static void scan_tile(int64_t positions, const Coefficients& c,
                                        const float* lanes, const float* x, float* y,
                                        float* state) {
#define AF_EACH(X) X(0) X(1) X(2) X(3)
#define AF_LOAD(u)                                                              \
  VecF xa##u = load(x + u * kTile), ya##u = load(y + u * kTile);                \
  [[maybe_unused]] VecF xb##u{}, yb##u{};                                       \
  if constexpr (NV == 2) {                                                      \
    xb##u = load(x + u * kTile + kLanes), yb##u = load(y + u * kTile + kLanes); \
  }
  AF_EACH(AF_LOAD)
#undef AF_LOAD
  Kept kept_a{}, kept_b{};
  if constexpr (kOn == DecayOn::kLanesOf) {
    kept_a = {load(lanes), load(lanes + kTile)};
    if constexpr (NV == 2) kept_b = {load(lanes + kLanes), load(lanes + kTile + kLanes)};
  }
  const float *read = c.read, *write = c.write, *whole = c.decay, *part = c.decay + c.positions;
  for (int64_t p = 0; p < positions; ++p, read += kGroup, write += kGroup, state += kTile) {
    VecF sa = load(state), sb{};
    if constexpr (NV == 2) sb = load(state + kLanes);
#define AF_READ(u)                                    \
  {                                                   \
    const VecF r = splat(read[u]);                    \
    ya##u = fma(r, sa, ya##u);                        \
    if constexpr (NV == 2) yb##u = fma(r, sb, yb##u); \
  }
    AF_EACH(AF_READ)
#undef AF_READ
    VecF da{}, db{};
#define AF_WRITE(u)                                                     \
  {                                                                     \
    const VecF w = splat(write[u]);                                     \
    da = u == 0 ? w * xa##u : fma(w, xa##u, da);                        \
    if constexpr (NV == 2) db = u == 0 ? w * xb##u : fma(w, xb##u, db); \
  }
    AF_EACH(AF_WRITE)
#undef AF_WRITE
    if constexpr (kOn == DecayOn::kRows) kept_a = kept_b = {splat(whole[p]), splat(part[p])};
    store(state, kept_a(sa, da));
    if constexpr (NV == 2) store(state + kLanes, kept_b(sb, db));
  }
#define AF_STORE(u)            \
  store(y + u * kTile, ya##u); \
  if constexpr (NV == 2) store(y + u * kTile + kLanes, yb##u);
  AF_EACH(AF_STORE)
#undef AF_STORE
#undef AF_EACH
}

template <DecayOn kOn>
AF_INLINE void run_tile(int64_t vectors, int64_t positions, const Coefficients& c,
                        const float* lanes, const float* x, float* y, float* state) {
  for (int64_t v = 0; v < vectors; v += kScanVecs) {
    const int64_t at = v * kLanes;
    if (vectors - v < kScanVecs) {
      scan_tile<1, kOn>(positions, c, lanes + at, x + at, y + at, state + at);
    } else {
      scan_tile<kScanVecs, kOn>(positions, c, lanes + at, x + at, y + at, state + at);
    }
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
