// What the bindings of the delta rules and of the diagonal scan share: tensors to params structs.
#pragma once

#include "attnforge/delta.h"
#include "bindings/tensors.h"

namespace attnforge::cpu {

inline float* delta_floats(const Tensor& t, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == numel,
                  "attnforge_native: gates, states and their gradients must be contiguous float32");
  return static_cast<float*>(const_cast<void*>(t.const_data_ptr()));
}
inline float* delta_floats(const OptionalTensor& t, int64_t numel) {
  return t ? delta_floats(*t, numel) : nullptr;
}

// Outputs that are not wanted come as tensors without elements.
inline float* wanted(const Tensor& t, int64_t numel) {
  return t.numel() == 0 ? nullptr : delta_floats(t, numel);
}

// q, k [B, T, H, K] and v [B, T, HV, V].
inline DeltaProblem delta_problem(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const OptionalTensor& g, const Tensor& beta,
                                  const OptionalTensor& initial_state,
                                  const OptionalTensor& cu_seqlens, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "attnforge_native: delta rules want [B, T, H, D]");
  DeltaProblem p;
  p.dtype = dtype_of(q);
  p.cu_seqlens = data<int32_t>(cu_seqlens, ScalarType::Int);
  p.sequences = cu_seqlens ? cu_seqlens->numel() - 1 : q.size(0);
  p.rows = q.size(1);
  p.heads = q.size(2);
  p.value_heads = v.size(2);
  p.key_dim = q.size(3);
  p.value_dim = v.size(3);
  STD_TORCH_CHECK(p.heads > 0 && p.value_heads % p.heads == 0 && p.key_dim > 0 &&
                      p.key_dim <= 1024 && p.value_dim > 0 && (!cu_seqlens || q.size(0) == 1),
                  "attnforge_native: heads or head dims of a delta rule do not fit");
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(k.size(d) == q.size(d) && (d >= 2 || v.size(d) == q.size(d)),
                    "attnforge_native: shapes of q, k and v do not fit");
  }
  p.scale = static_cast<float>(scale);
  p.q = ref(q, p.dtype), p.k = ref(k, p.dtype), p.v = ref(v, p.dtype);
  const int64_t tokens = q.size(0) * p.rows * p.value_heads;
  p.channel_gates = g && g->dim() == 4;
  p.g = delta_floats(g, tokens * (p.channel_gates ? p.key_dim : 1));
  p.beta = delta_floats(beta, tokens);
  p.initial_state =
      delta_floats(initial_state, p.sequences * p.value_heads * p.key_dim * p.value_dim);
  return p;
}

inline int64_t state_numel(const DeltaProblem& p) {
  return p.sequences * p.value_heads * p.key_dim * p.value_dim;
}

// x, g [B, T, D].
inline DiagScanParams scan_of(const Tensor& x, const Tensor& g, const OptionalTensor& initial_state,
                              const OptionalTensor& cu_seqlens) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous(),
                  "attnforge_native: a scan wants contiguous [B, T, D]");
  DiagScanParams p;
  p.dtype = dtype_of(x);
  p.cu_seqlens = data<int32_t>(cu_seqlens, ScalarType::Int);
  p.sequences = cu_seqlens ? cu_seqlens->numel() - 1 : x.size(0);
  p.rows = x.size(1);
  p.dim = x.size(2);
  STD_TORCH_CHECK(!cu_seqlens || x.size(0) == 1, "attnforge_native: packed sequences want batch 1");
  p.x = x.const_data_ptr();
  p.g = delta_floats(g, x.numel());
  p.initial_state = delta_floats(initial_state, p.sequences * p.dim);
  return p;
}

inline void* scan_like(const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.is_contiguous() && t.numel() == x.numel(),
                  "attnforge_native: tensors of a scan must be contiguous, of one dtype and size");
  return const_cast<void*>(t.const_data_ptr());
}

}  // namespace attnforge::cpu
