// Parameter structs of the additive recurrence; conventions as in params.h.
#pragma once

#include "attnforge/params.h"

namespace attnforge {

// What multiplies the state before each token: e^gate, at most 1.
enum class LinearGate : int32_t {
  kNone = 0,
  kHead,    // gate [value_heads]
  kScalar,  // [B, T, value_heads]
  kKey,     // [B, T, value_heads, K]: rows of the state
  kValue    // [B, T, value_heads, V]: columns of the state
};

// n over d = scale q.z: kSum n / (d + eps), kAbs n / max(|d|, eps).
enum class LinearNorm : int32_t { kNone = 0, kSum, kAbs };

// S_t = decay_t S_{t-1} + k_t v_t^T;  o_t = scale q_t^T S_t. Value head h reads q and k of head
// h / (value_heads / heads). Floats (gates, states, statistics) are contiguous.
struct LinearProblem {
  DType dtype = DType::kFloat32;
  int64_t sequences = 0;
  int64_t rows = 0;                     // tokens of one sequence; varlen: of all
  const int32_t* cu_seqlens = nullptr;  // [sequences + 1] of one packed batch, or null
  int64_t heads = 0, value_heads = 0;
  int64_t key_dim = 0, value_dim = 0;
  LinearGate gate_kind = LinearGate::kNone;
  LinearNorm normalize = LinearNorm::kNone;
  bool causal = true;  // false: every row reads the state of its whole sequence; no gate
  float scale = 1.0f, eps = 0.0f;
  const float* gate = nullptr;           // natural log
  const float* initial_state = nullptr;  // [sequences, value_heads, K, V], or null
  const float* initial_z = nullptr;      // [sequences, value_heads, K], or null
  TensorRef q, k, v;
};

struct LinearFwdParams {
  LinearProblem problem;
  TensorRef out, out_lo;         // out_lo may be null
  float* final_state = nullptr;  // may be null, as final_z
  float* final_z = nullptr;
  float* den = nullptr;  // [B, T, value_heads], with normalize
  void* workspace = nullptr;
};

struct LinearBwdParams {
  LinearProblem problem;
  TensorRef dout, out, out_lo;  // out_lo may be null; both are read with normalize alone
  const float* den = nullptr;
  const float *dfinal_state = nullptr, *dfinal_z = nullptr;  // null is zero
  const float *final_state = nullptr, *final_z = nullptr;    // with them, for gradients of gates
  TensorRef dq, dk, dv;
  float* dgate = nullptr;  // may be null, as the following
  float *dinitial_state = nullptr, *dinitial_z = nullptr;
  void* workspace = nullptr;
};

// One token per sequence; problem.rows is 1, the initial states are not used.
struct LinearStepParams {
  LinearProblem problem;
  float* states = nullptr;  // [slots, value_heads, K, V], updated in place
  float* zs = nullptr;      // [slots, value_heads, K], with normalize
  int64_t slots = 0;
  const int32_t* state_indices = nullptr;  // [sequences]; outside [0, slots): skip; null: i
  TensorRef out;
};

}  // namespace attnforge
