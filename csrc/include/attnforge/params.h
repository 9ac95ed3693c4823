// Plain-data parameter structs, one per operator: the whole interface between bindings and kernels.
// No torch, no CUDA, no STL: the same structs serve the CPU tables, the CUDA launchers, C and JAX.
//
// Conventions: strides are in elements and int64; the last dimension has unit stride. A varlen
// batch has batch stride 0 and a row offset per sequence taken from cu_seqlens. Windows: -1 is
// unlimited.
#pragma once

#include <cstdint>

namespace attnforge {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// [batch, seq, heads, dim] (or [total, heads, dim]) with any strides.
struct TensorRef {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t seq_stride = 0;
  int64_t head_stride = 0;
};

// fp32 per-row statistics: [batch, heads, seq] or, varlen, [heads, total].
struct RowStatRef {
  float* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
};

// What is asked, apart from where the tensors lie. Shared by forward, backward and decode.
struct FlashProblem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t seqlen_q = 0;  // padded length, or the largest one when varlen
  int64_t seqlen_k = 0;
  int64_t total_q = 0;  // rows that exist in memory when varlen: bounds for cu_seqlens
  int64_t total_k = 0;
  int64_t heads_q = 0;
  int64_t heads_k = 0;
  int64_t head_dim = 0;
  int64_t v_head_dim = 0;
  const int32_t* cu_seqlens_q = nullptr;  // [batch + 1] or null
  const int32_t* cu_seqlens_k = nullptr;
  const int32_t* seqused_k = nullptr;   // [batch] or null
  const float* alibi_slopes = nullptr;  // [heads_q], or [batch, heads_q] by alibi_batch_stride
  int64_t alibi_batch_stride = 0;
  const float* sinks = nullptr;  // [heads_q] logits of a virtual key with value 0, or null
  float softmax_scale = 1.0f;
  float softcap = 0.0f;  // 0: off
  int64_t window_left = -1;
  int64_t window_right = -1;  // causal is window_right = 0
};

// Sequences with at most this many (query, head-of-group) rows go to decode: it streams K and V
// once in dot-product form, while the packed form would spend as much on packing as on the product.
constexpr int64_t kFewRows = 8;

// Which sequences a forward kernel serves.
enum class RowRoute : int32_t { kAll = 0, kManyRows = 1, kFewRows = 2 };

struct FlashFwdParams {
  FlashProblem problem;
  TensorRef q, k, v, out;
  TensorRef out_lo;  // data null: not wanted. Else round16(O - round16(O)), same dtype as out
  RowStatRef lse;
  RowRoute route = RowRoute::kAll;
  int64_t split_keys = 0;  // decode: keys per split
  void* workspace = nullptr;
};

struct FlashBwdParams {
  FlashProblem problem;
  TensorRef dout, q, k, v, out, out_lo;
  TensorRef dq, dk, dv;
  RowStatRef lse;
  RowStatRef dlse;   // data null: the loss does not use the LSE
  RowStatRef delta;  // output: rowsum(dO * O) - dLSE
  void* workspace = nullptr;
};

// Merges n partial states of the same rows: outs [n, rows, dim] in dtype, lses fp32.
struct MergeParams {
  DType dtype = DType::kFloat32;
  int64_t states = 0;
  int64_t batch = 0;
  int64_t seqlen = 0;
  int64_t heads = 0;
  int64_t dim = 0;
  const void* outs = nullptr;   // [states, batch, seqlen, heads, dim] contiguous
  const float* lses = nullptr;  // [states, batch, heads, seqlen] contiguous
  void* out = nullptr;          // [batch, seqlen, heads, dim] contiguous
  float* lse = nullptr;         // [batch, heads, seqlen] contiguous
};

// A handle on somebody's thread pool (torch's, or a plain loop in tests).
// run(body, arg) calls body(worker, arg) once for each worker in [0, num_threads), maybe at the
// same time; it returns when all are done.
struct Workers {
  int64_t num_threads = 1;
  void (*run)(int64_t num_threads, void (*body)(int64_t worker, void* arg), void* arg) = nullptr;
};

}  // namespace attnforge
