// One token of a delta rule per sequence, on a pool of fp32 states updated in place.
//
// With a the decay of the token, S~ = a S is read once for both products,
//   y = S~^T k,  z = S~^T q;    r = beta (v - y);    o = scale (z + <q, k> r);    S = S~ + k r^T
// and again, from L1 or L2, for the update: 8 K V bytes per head to and from memory, which is what
// the step takes. A task is a head; columns go in strips whose sums stay in registers.
#include "cpu/kernels.h"
#include "cpu/linear/tokens.h"
#include "cpu/micro/denormals.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kMaxDim = 1024;  // of keys; checked by the binding

struct Token {
  int64_t key_dim, value_dim;
  float q[kMaxDim], k[kMaxDim], decay[kMaxDim];
  float qk, beta, scale;
};

// A strip of kVectors vectors of columns; `width` columns of it exist, all but in the last one.
template <int kVectors, class T>
AF_INLINE void strip(const Token& t, const T* v, float* state, T* out, int64_t width) {
  VecF y[kVectors] = {}, z[kVectors] = {};
  auto in = [&](const float* row, int n) __attribute__((always_inline)) {
    return kVectors == 1 ? load_partial(row, width) : load(row + n * kLanes);
  };
  for (int64_t k = 0; k < t.key_dim; ++k) {
    const VecF to_y = splat(t.k[k] * t.decay[k]), to_z = splat(t.q[k] * t.decay[k]);
    for (int n = 0; n < kVectors; ++n) {
      VecF s = in(state + k * t.value_dim, n);
      y[n] = fma(s, to_y, y[n]);
      z[n] = fma(s, to_z, z[n]);
    }
  }
  for (int n = 0; n < kVectors; ++n) {
    VecF value = kVectors == 1 ? load_partial(v, width) : load(v + n * kLanes);
    y[n] = (value - y[n]) * splat(t.beta);  // r from here on
    VecF o = fma(splat(t.qk), y[n], z[n]) * splat(t.scale);
    if (kVectors == 1) {
      store_partial(out, o, width);
    } else {
      store(out + n * kLanes, o);
    }
  }
  for (int64_t k = 0; k < t.key_dim; ++k) {
    const VecF key = splat(t.k[k]), decay = splat(t.decay[k]);
    float* row = state + k * t.value_dim;
    for (int n = 0; n < kVectors; ++n) {
      VecF s = fma(key, y[n], in(row, n) * decay);
      if (kVectors == 1) {
        store_partial(row, s, width);
      } else {
        store(row + n * kLanes, s);
      }
    }
  }
}

template <class T>
void step_head(const DeltaStepParams& params, int64_t sequence, int64_t head) {
  const DeltaProblem& p = params.problem;
  const TokenSpan span = {sequence, 0, 1};
  const int64_t slot = params.state_indices ? params.state_indices[sequence] : sequence;
  T* out = token_row<T>(params.out, span, head, 0);
  if (slot < 0 || slot >= params.slots) {
    for (int64_t d = 0; d < p.value_dim; d += kLanes) {
      store_partial(out + d, VecF{}, p.value_dim - d);
    }
    return;
  }
  Token t;
  t.key_dim = p.key_dim, t.value_dim = p.value_dim, t.scale = p.scale;
  const int64_t key_head = head / (p.value_heads / p.heads), at = sequence * p.value_heads + head;
  const T *q = token_row<T>(p.q, span, key_head, 0), *k = token_row<T>(p.k, span, key_head, 0);
  const T* v = token_row<T>(p.v, span, head, 0);
  t.beta = p.beta[at];
  VecF qk{};
  for (int64_t d = 0; d < p.key_dim; d += kLanes) {
    const VecF x = load_partial(q + d, p.key_dim - d), y = load_partial(k + d, p.key_dim - d);
    qk = fma(x, y, qk);
    store(t.q + d, x), store(t.k + d, y);
    VecF gate{};
    if (p.g) {
      gate =
          p.channel_gates ? load_partial(p.g + at * p.key_dim + d, p.key_dim - d) : splat(p.g[at]);
    }
    store(t.decay + d, exp2(gate_log2(gate)));
  }
  t.qk = reduce_add(qk);
  float* state = params.states + (slot * p.value_heads + head) * p.key_dim * p.value_dim;
  constexpr int kWide = 4;  // two sums of four vectors, a load and two factors: 11 registers
  int64_t c = 0;
  for (; c + kWide * kLanes <= p.value_dim; c += kWide * kLanes) {
    strip<kWide>(t, v + c, state + c, out + c, kWide * kLanes);
  }
  for (; c < p.value_dim; c += kLanes) {
    strip<1>(t, v + c, state + c, out + c, p.value_dim - c);
  }
}

}  // namespace

void delta_step(const DeltaStepParams& params, const Workers& workers) {
  const DeltaProblem& p = params.problem;
  dispatch_dtype(p.dtype, [&](auto element) {
    parallel_tasks(workers, p.sequences * p.value_heads, [&](int64_t task, int64_t) {
      FlushDenormals flush;
      step_head<decltype(element)>(params, task / p.value_heads, task % p.value_heads);
    });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
