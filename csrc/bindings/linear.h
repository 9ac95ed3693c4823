// What the bindings of the linear family's additive part share: tensors to params structs.
#pragma once

#include "attnforge/linear.h"
#include "bindings/tensors.h"

namespace attnforge::cpu {

constexpr int64_t kMaxLinearDim = 1024;

// A contiguous fp32 tensor of `numel` elements, or null where there is none (or an empty one).
inline float* floats(const OptionalTensor& t, int64_t numel) {
  if (!t || (t->numel() == 0 && numel != 0)) return nullptr;
  STD_TORCH_CHECK(
      t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->numel() == numel,
      "attnforge_native: a state, gate or statistic has the wrong dtype or size");
  return static_cast<float*>(const_cast<void*>(t->const_data_ptr()));
}

inline LinearGate gate_of(int64_t kind) {
  STD_TORCH_CHECK(kind >= 0 && kind <= 4, "attnforge_native: no such gate");
  return static_cast<LinearGate>(kind);
}

inline int64_t gate_size(const LinearProblem& p, int64_t batch, int64_t rows) {
  const int64_t heads = batch * rows * p.value_heads;
  switch (p.gate_kind) {
    case LinearGate::kNone:
      return 0;
    case LinearGate::kHead:
      return p.value_heads;
    case LinearGate::kScalar:
      return heads;
    case LinearGate::kKey:
      return heads * p.key_dim;
    case LinearGate::kValue:
      return heads * p.value_dim;
  }
  return 0;
}

// q, k [B, T, H, K], v [B, T, HV, V]; what is not a tensor of the call comes as numbers.
struct LinearNumbers {
  int64_t gate_kind, normalize;
  double scale, eps;
  bool causal;
};

inline LinearProblem linear_problem(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const OptionalTensor& gate, const OptionalTensor& cu_seqlens,
                                    const LinearNumbers& numbers) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "attnforge_native: linear attention wants [B, T, H, D]");
  LinearProblem p;
  p.dtype = dtype_of(q);
  p.rows = q.size(1);
  p.sequences = cu_seqlens ? cu_seqlens->numel() - 1 : q.size(0);
  p.cu_seqlens = data<int32_t>(cu_seqlens, ScalarType::Int);
  p.heads = q.size(2), p.value_heads = v.size(2);
  p.key_dim = q.size(3), p.value_dim = v.size(3);
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(k.size(d) == q.size(d) && (d > 1 || v.size(d) == q.size(d)),
                    "attnforge_native: shapes of q, k and v do not fit");
  }
  STD_TORCH_CHECK(p.sequences >= 0 && (!cu_seqlens || q.size(0) == 1) && p.heads > 0 &&
                      p.value_heads % p.heads == 0 && p.key_dim > 0 && p.key_dim <= kMaxLinearDim &&
                      p.value_dim > 0 && p.value_dim <= kMaxLinearDim,
                  "attnforge_native: sizes of a linear attention are out of range");
  p.gate_kind = gate_of(numbers.gate_kind);
  p.normalize = static_cast<LinearNorm>(numbers.normalize);
  p.scale = static_cast<float>(numbers.scale), p.eps = static_cast<float>(numbers.eps);
  p.causal = numbers.causal;
  p.gate = floats(gate, gate_size(p, q.size(0), q.size(1)));
  STD_TORCH_CHECK(p.causal || p.gate_kind == LinearGate::kNone,
                  "attnforge_native: a bidirectional call has no gate");
  STD_TORCH_CHECK(p.gate || p.gate_kind == LinearGate::kNone || q.numel() == 0,
                  "attnforge_native: the gate is missing");
  p.q = ref(q, p.dtype), p.k = ref(k, p.dtype), p.v = ref(v, p.dtype);
  return p;
}

inline int64_t state_size(const LinearProblem& p) {
  return p.sequences * p.value_heads * p.key_dim * p.value_dim;
}
inline int64_t z_size(const LinearProblem& p) {
  return p.sequences * p.value_heads * p.key_dim;
}

}  // namespace attnforge::cpu
