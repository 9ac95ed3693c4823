// Parameter structs of the delta rules and of the diagonal scan; conventions as in params.h.
#pragma once

#include "attnforge/params.h"

namespace attnforge {

// S~ = exp(g_t) S_{t-1};  S_t = S~ + k_t (beta_t (v_t - S~^T k_t))^T;  o_t = scale S_t^T q_t.
struct DeltaProblem {
  DType dtype = DType::kFloat32;
  int64_t sequences = 0;
  int64_t rows = 0;                     // tokens of one sequence; varlen: of all
  const int32_t* cu_seqlens = nullptr;  // [sequences + 1] of one packed batch, or null
  int64_t heads = 0;                    // of q and k
  int64_t value_heads = 0;              // of v, gates, beta and states; a multiple of heads
  int64_t key_dim = 0, value_dim = 0;
  float scale = 1.0f;
  TensorRef q, k, v;
  // Natural-log gates, contiguous: [B, T, value_heads], with channel_gates [.., key_dim]; or null.
  const float* g = nullptr;
  bool channel_gates = false;
  const float* beta = nullptr;           // [B, T, value_heads] contiguous
  const float* initial_state = nullptr;  // [sequences, value_heads, K, V] contiguous, or null
};

struct DeltaChunkFwdParams {
  DeltaProblem problem;
  TensorRef out;
  float* final_state = nullptr;  // as initial_state, or null
  void* workspace = nullptr;
};

struct DeltaChunkBwdParams {
  DeltaProblem problem;
  TensorRef dout;
  const float* dfinal_state = nullptr;  // null is zero
  TensorRef dq, dk, dv;
  float *dg = nullptr, *dbeta = nullptr;  // as g and beta; dg null without gates
  float* dinitial_state = nullptr;        // or null
  void* workspace = nullptr;
};

// One token per sequence; problem.rows is 1 and initial_state is not used.
struct DeltaStepParams {
  DeltaProblem problem;
  float* states = nullptr;  // [slots, value_heads, K, V] contiguous, updated in place
  int64_t slots = 0;
  const int32_t* state_indices = nullptr;  // [sequences], outside [0, slots): no state; null: i
  TensorRef out;
};

// h_t = exp(g_t) h_{t-1} + x_t over [B, T, D], all contiguous; states are [sequences, D].
struct DiagScanParams {
  DType dtype = DType::kFloat32;
  int64_t sequences = 0, rows = 0, dim = 0;
  const int32_t* cu_seqlens = nullptr;
  const void* x = nullptr;
  const float* g = nullptr;
  const float* initial_state = nullptr;
  void* out = nullptr;
  float* final_state = nullptr;
  // The backward alone:
  const void* dout = nullptr;
  const float* dfinal_state = nullptr;
  void* dx = nullptr;
  float *dg = nullptr, *dinitial_state = nullptr;
  void* workspace = nullptr;
};

}  // namespace attnforge
