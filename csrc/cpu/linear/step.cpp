// One token of the additive recurrence per sequence, on a pool of states in fp32, in place.
//
// Per value head one pass over the state: S <- decay S + k v^T and o += q S while a row is in
// registers, so 4 K V bytes are read and 4 K V written: the kernel runs at memory speed.
//   tasks   a few heads in a row, whose states follow one another; o stays in L1
#include "cpu/kernels.h"
#include "cpu/linear/scan.h"
#include "cpu/micro/denormals.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kMaxDim = 1024;  // of K and V, as the registry says
constexpr int64_t kHeads = 8;      // of a task
// Floats: memory is asked for this far ahead, beyond the 4 KiB at which the hardware stops.
constexpr int64_t kAhead = 2048;

template <class T>
AF_INLINE void widen_row(const T* src, int64_t dim, float scale, float* dst) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    store_partial(dst + d, load_partial(src + d, dim - d) * splat(scale), dim - d);
  }
}

template <class T>
AF_INLINE void step_head(const LinearStepParams& params, int64_t sequence, int64_t head) {
  const LinearProblem& p = params.problem;
  const int64_t n = p.value_dim, shared = head / (p.value_heads / p.heads);
  T* out = row_ptr<T>(params.out, sequence, 0, head);
  const int64_t slot = params.state_indices ? params.state_indices[sequence] : sequence;
  if (slot < 0 || slot >= params.slots) {
    for (int64_t d = 0; d < n; d += kLanes) store_partial(out + d, VecF{}, n - d);
    return;
  }
  alignas(64) float q[kMaxDim], k[kMaxDim], v[kMaxDim], o[kMaxDim];
  alignas(64) float whole[kMaxDim], part[kMaxDim];
  widen_row(row_ptr<const T>(p.q, sequence, 0, shared), p.key_dim, p.scale, q);
  widen_row(row_ptr<const T>(p.k, sequence, 0, shared), p.key_dim, 1.0f, k);
  widen_row(row_ptr<const T>(p.v, sequence, 0, head), n, 1.0f, v);
  const Decay gate = decay_of_head(p, {sequence, 0, 1}, head, false);
  const bool columns = p.gate_kind == LinearGate::kValue;
  const bool vector = columns || p.gate_kind == LinearGate::kKey;
  const int64_t gates = columns ? n : p.key_dim;
  for (int64_t d = 0; d < gates; d += kLanes) {
    VecF log{};
    if (p.gate_kind != LinearGate::kNone) {
      log = vector ? gate.log_vector(0, d) : splat(gate.log_number(0));
    }
    const Kept kept = kept_of(log);
    store_partial(whole + d, kept.whole, gates - d);
    store_partial(part + d, kept.part, gates - d);
  }
  for (int64_t d = 0; d < n; d += kLanes) store_partial(o + d, VecF{}, n - d);

  const int64_t base = slot * p.value_heads + head;
  float* state = params.states + base * p.key_dim * n;
  float den = 0.0f;
  for (int64_t i = 0; i < p.key_dim; ++i, state += n) {
    const VecF key = splat(k[i]), query = splat(q[i]);
    Kept kept = {splat(columns ? 1.0f : whole[i]), splat(columns ? 0.0f : part[i])};
    for (int64_t d = 0; d < n; d += kLanes) {
      __builtin_prefetch(state + d + kAhead, 1, 2);
      if (columns) kept = {load_partial(whole + d, n - d), load_partial(part + d, n - d)};
      const VecF s = kept(load_partial(state + d, n - d), key * load_partial(v + d, n - d));
      store_partial(state + d, s, n - d);
      store_partial(o + d, fma(query, s, load_partial(o + d, n - d)), n - d);
    }
    if (!params.zs) continue;
    float& z = params.zs[base * p.key_dim + i];
    z = part[i] * z + (whole[i] * z + k[i]);
    den += q[i] * z;
  }
  const Denominator norm = {nullptr, nullptr, 0, p.normalize, p.eps};
  const float factor = params.zs ? norm.inverse(den) : 1.0f;
  for (int64_t d = 0; d < n; d += kLanes) {
    store_partial(out + d, load_partial(o + d, n - d) * splat(factor), n - d);
  }
}

}  // namespace

void linear_step(const LinearStepParams& params, const Workers& workers) {
  const LinearProblem& p = params.problem;
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t heads = p.sequences * p.value_heads;
    parallel_tasks(workers, ceil_div(heads, kHeads), [&](int64_t task, int64_t) {
      const FlushDenormals guard;
      for (int64_t i = task * kHeads; i < min64(heads, (task + 1) * kHeads); ++i) {
        step_head<T>(params, i / p.value_heads, i % p.value_heads);
      }
    });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
