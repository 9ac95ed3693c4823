// One token of a delta rule per sequence, on a pool of fp32 states updated in place.
//
// With a the decay of the token, S~ = a S is read once for both products,
//   y = S~^T k,  z = S~^T q;    r = beta (v - y);    o = scale (z + <q, k> r);    S = S~ + k r^T
// and again, from L1 or L2, for the update: 8 K V bytes per head to and from memory, which is what
// the step takes. Columns go in strips whose sums stay in registers; the update of a strip, which
// memory does not see, fetches the same rows of the next head's state. A task is a few heads.
#include "cpu/kernels.h"
#include "cpu/linear/tokens.h"
#include "cpu/micro/denormals.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kMaxDim = 1024;  // of keys; checked by the binding

constexpr int64_t kHeads = 8;  // of a task: one in eight states comes without having been fetched
// Vectors of a strip: two sums of each, what is loaded, two factors. Eight cover a row of 128.
constexpr int kWide = kLanes == 16 ? 8 : 4;

struct Token {
  int64_t key_dim, value_dim;
  const float* next;  // the state of the next head, or null
  float q[kMaxDim], k[kMaxDim], whole[kMaxDim], part[kMaxDim];  // decays as in `Kept`
  float qk, beta, scale;
};

// A strip of kVectors vectors of columns from `column`; all of its columns exist, or in strips of
// one vector `width` of them.
template <int kVectors, class T>
AF_INLINE void strip(const Token& t, int64_t column, const T* v, float* state, T* out,
                     int64_t width) {
  v += column, state += column, out += column;
  VecF y[kVectors] = {}, z[kVectors] = {};
  auto in = [&](const float* row, int n) __attribute__((always_inline)) {
    return kVectors == 1 ? load_partial(row, width) : load(row + n * kLanes);
  };
  for (int64_t k = 0; k < t.key_dim; ++k) {
    const float decay = t.whole[k] + t.part[k];
    const VecF to_y = splat(t.k[k] * decay), to_z = splat(t.q[k] * decay);
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
    const VecF key = splat(t.k[k]);
    const Kept kept = {splat(t.whole[k]), splat(t.part[k])};
    float* row = state + k * t.value_dim;
    if (t.next) {
      const float* ahead = t.next + k * t.value_dim + column;
      for (int64_t d = 0; d < kVectors * kLanes; d += 16) __builtin_prefetch(ahead + d, 1, 2);
    }
    for (int n = 0; n < kVectors; ++n) {
      VecF s = kept(in(row, n), key * y[n]);
      if (kVectors == 1) {
        store_partial(row, s, width);
      } else {
        store(row + n * kLanes, s);
      }
    }
  }
}

// The state of a head of the batch, or null for a row that is skipped.
AF_INLINE float* state_of(const DeltaStepParams& params, int64_t index) {
  const DeltaProblem& p = params.problem;
  const int64_t sequence = index / p.value_heads, head = index % p.value_heads;
  const int64_t slot = params.state_indices ? params.state_indices[sequence] : sequence;
  if (slot < 0 || slot >= params.slots) return nullptr;
  return params.states + (slot * p.value_heads + head) * p.key_dim * p.value_dim;
}

template <class T>
void step_head(const DeltaStepParams& params, int64_t index, const float* next) {
  const DeltaProblem& p = params.problem;
  const int64_t sequence = index / p.value_heads, head = index % p.value_heads;
  const TokenSpan span = {sequence, 0, 1};
  float* state = state_of(params, index);
  T* out = token_row<T>(params.out, span, head, 0);
  if (!state) {
    for (int64_t d = 0; d < p.value_dim; d += kLanes) {
      store_partial(out + d, VecF{}, p.value_dim - d);
    }
    return;
  }
  Token t;
  t.key_dim = p.key_dim, t.value_dim = p.value_dim, t.scale = p.scale, t.next = next;
  const int64_t key_head = head / (p.value_heads / p.heads);
  const T *q = token_row<T>(p.q, span, key_head, 0), *k = token_row<T>(p.k, span, key_head, 0);
  const T* v = token_row<T>(p.v, span, head, 0);
  t.beta = p.beta[index];
  VecF qk{};
  for (int64_t d = 0; d < p.key_dim; d += kLanes) {
    const VecF x = load_partial(q + d, p.key_dim - d), y = load_partial(k + d, p.key_dim - d);
    qk = fma(x, y, qk);
    store(t.q + d, x), store(t.k + d, y);
    VecF gate{};
    if (p.g) {
      gate = p.channel_gates ? load_partial(p.g + index * p.key_dim + d, p.key_dim - d)
                             : splat(p.g[index]);
    }
    const Kept kept = kept_of(gate);
    store(t.whole + d, kept.whole), store(t.part + d, kept.part);
  }
  t.qk = reduce_add(qk);
  int64_t c = 0;
  for (; c + kWide * kLanes <= p.value_dim; c += kWide * kLanes) {
    strip<kWide>(t, c, v, state, out, kWide * kLanes);
  }
  constexpr int kHalf = kWide / 2;
  for (; c + kHalf * kLanes <= p.value_dim; c += kHalf * kLanes) {
    strip<kHalf>(t, c, v, state, out, kHalf * kLanes);
  }
  for (; c < p.value_dim; c += kLanes) strip<1>(t, c, v, state, out, p.value_dim - c);
}

}  // namespace

void delta_step(const DeltaStepParams& params, const Workers& workers) {
  const DeltaProblem& p = params.problem;
  const int64_t heads = p.sequences * p.value_heads;
  // Fewer to a task where that leaves threads idle.
  const int64_t step = max64(1, min64(kHeads, heads / (2 * max64(1, workers.num_threads))));
  dispatch_dtype(p.dtype, [&](auto element) {
    parallel_tasks(workers, ceil_div(heads, step), [&](int64_t task, int64_t) {
      FlushDenormals flush;
      const int64_t end = min64(heads, (task + 1) * step);
      for (int64_t index = task * step; index < end; ++index) {
        step_head<decltype(element)>(params, index,
                                     index + 1 < end ? state_of(params, index + 1) : nullptr);
      }
    });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
