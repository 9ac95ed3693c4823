// One token of the additive recurrence per sequence, on a pool of fp32 states, in place:
// S <- decay S + k v^T, o = scale q S.
//
//   block    one state's slice of 64 columns: 8 warps share out the rows, a lane has two columns
//   bytes    8 K V per value head: bound by memory; q, k, v and gates are read once per slice
//
// A row is loaded, decayed, added to and stored once, its part of o stays in registers; the warps'
// parts are added in their order.
#include "cuda/linear/walk.h"

namespace attnforge::cuda {

namespace {

constexpr int kWarps = 8, kColumns = 64;

struct alignas(8) Two {
  float x, y;
};

template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    linear_step_kernel(const __grid_constant__ LinearStepParams params, int tiles) {
  const LinearProblem& p = params.problem;
  const int lane = static_cast<int>(ptx::lane_id()), warp = warp_id();
  const int keys = static_cast<int>(p.key_dim), values = static_cast<int>(p.value_dim);
  const int heads = static_cast<int>(p.value_heads), group = heads / static_cast<int>(p.heads);
  const int column = static_cast<int>(blockIdx.x) % tiles * kColumns + 2 * lane;
  const int pair = static_cast<int>(blockIdx.x) / tiles;
  const int head = pair % heads, sequence = pair / heads;
  const int64_t slot = params.state_indices != nullptr ? params.state_indices[sequence] : sequence;
  const bool real = column < values;
  T* out = row_ptr<T>(params.out, sequence, 0, head) + column;
  if (slot < 0 || slot >= params.slots) {
    if (warp == 0 && real) out[0] = out[1] = narrow<T>(0.0f);
    return;
  }
  const T* q = row_ptr<const T>(p.q, sequence, 0, head / group);
  const T* k = row_ptr<const T>(p.k, sequence, 0, head / group);
  const T* v = row_ptr<const T>(p.v, sequence, 0, head) + column;
  const auto gate = [&](int64_t at) { return decay_of(clamped_gate(p.gate[at])); };
  const int64_t row = int64_t{sequence} * heads + head;
  Two whole = {1.0f, 1.0f}, value = {0.0f, 0.0f}, sum = {0.0f, 0.0f};
  if (real) value = {widen(v[0]), widen(v[1])};
  switch (p.gate_kind) {
    case LinearGate::kHead:
      whole.x = whole.y = gate(head);
      break;
    case LinearGate::kScalar:
      whole.x = whole.y = gate(row);
      break;
    case LinearGate::kValue:
      if (real) whole = {gate(row * values + column), gate(row * values + column + 1)};
      break;
    default:
      break;
  }
  const bool of_keys = p.gate_kind == LinearGate::kKey;
  float* state = params.states + (slot * heads + head) * int64_t{keys} * values + column;
  // Rows in batches: all of a batch are on their way before the first is used.
  constexpr int kBatch = 4;
  for (int first = warp; real && first < keys; first += kBatch * kWarps) {
    Two s[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int n = first + i * kWarps;
      if (n < keys) s[i] = *reinterpret_cast<const Two*>(state + int64_t{n} * values);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int n = first + i * kWarps;
      if (n >= keys) continue;
      const float key = widen(k[n]), query = widen(q[n]);
      const float decay = of_keys ? gate(row * keys + n) : 1.0f;
      s[i].x = ptx::fma(s[i].x, whole.x * decay, key * value.x);
      s[i].y = ptx::fma(s[i].y, whole.y * decay, key * value.y);
      *reinterpret_cast<Two*>(state + int64_t{n} * values) = s[i];
      sum.x = ptx::fma(query, s[i].x, sum.x);
      sum.y = ptx::fma(query, s[i].y, sum.y);
    }
  }
  const uint32_t parts = ptx::dynamic_shared_memory();  // [kWarps, kColumns]
  ptx::store_shared(parts + 8 * (32 * warp + lane), sum);
  ptx::sync_threads();
  if (warp != 0 || !real) return;
  sum = {0.0f, 0.0f};
  for (int w = 0; w < kWarps; ++w) {
    const Two part = ptx::load_shared<Two>(parts + 8 * (32 * w + lane));
    sum.x += part.x, sum.y += part.y;
  }
  out[0] = narrow<T>(p.scale * sum.x), out[1] = narrow<T>(p.scale * sum.y);
}

}  // namespace

int linear_step(const LinearStepParams& params, void* stream) {
  const LinearProblem& p = params.problem;
  if (p.normalize != LinearNorm::kNone || p.value_dim % 2 != 0) return kNoKernel;
  const int64_t tiles = (p.value_dim + kColumns - 1) / kColumns;
  const int64_t blocks = tiles * p.value_heads * p.sequences;
  if (blocks == 0) return 0;
  return with_dtype(p.dtype, [&]<DType kDType>() {
    using T = typename ElementOf<kDType>::Type;
    return ATTNFORGE_LAUNCH((linear_step_kernel<T>), dim3(static_cast<unsigned>(blocks)),
                            dim3(32 * kWarps), 8 * 32 * kWarps, stream, params,
                            static_cast<int>(tiles));
  });
}

}  // namespace attnforge::cuda
