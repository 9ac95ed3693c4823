// Plain-data parameter structs, one per operator: the whole interface between bindings and kernels.
// No torch, no CUDA, no STL: the same structs serve the CPU tables, the CUDA launchers, C and JAX.
//
// Conventions: strides are in elements and int64; the last dimension has unit stride. A varlen
// batch has batch stride 0 and a row offset per sequence taken from cu_seqlens. Windows: -1 is
// unlimited.
#pragma once

#include <cstdint>

namespace attnforge {

// kFloat8: e4m3 without infinities, of inputs of forward and decode alone.
enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat8 = 3 };

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

// How a logit becomes a weight. kSigmoid and kRelu do not normalise: their LSE is 0 where a row
// sees a key. kSoftplus divides by the sum of its weights; kSignedSoftmax is sign(s) softmax(|s|).
enum class ScoreFn : int32_t { kSoftmax = 0, kSigmoid, kRelu, kSoftplus, kSignedSoftmax };

// Features of single scores; every pointer may be null. Strides are in elements, 0 broadcasts, the
// last dimension has unit stride. Varlen tensors have batch stride 0, and their rows or keys count
// from the start of the packed tensor (q_row, k_row are added). Keys j and key positions are local
// to the sequence. For a query i of head h, with x = softmax_scale * row_scale * q.k:
//   s = softcap(x) - alibi + key_bias[j] + bias[i, j] + rel_bias[R + clamp(j - i - offset, -R, R)]
//       + float(decay[i + offset] - decay[j])
struct FlashMods {
  const int32_t* row_bounds = nullptr;                // pairs (lo, hi): keys outside are not seen
  int64_t row_bounds_batch = 0, row_bounds_head = 0;  // in pairs
  const uint8_t* mask = nullptr;  // [.., Sq, mask_keys] of the last mask_keys of the k_len keys
  int64_t mask_batch = 0, mask_head = 0, mask_row = 0, mask_keys = 0;
  const int32_t *segments_q = nullptr, *segments_k = nullptr;  // seen where equal
  int64_t segments_q_batch = 0, segments_k_batch = 0;
  const float* key_bias = nullptr;
  int64_t key_bias_batch = 0, key_bias_head = 0;
  const void* bias = nullptr;  // [.., Sq, Sk] of bias_dtype
  DType bias_dtype = DType::kFloat32;
  int64_t bias_batch = 0, bias_head = 0, bias_row = 0;
  const float* rel_bias = nullptr;  // [.., 2 rel_radius + 1]
  int64_t rel_bias_head = 0, rel_radius = 0;
  const double* decay = nullptr;
  int64_t decay_batch = 0, decay_head = 0;
  const float* row_scale = nullptr;
  int64_t row_scale_batch = 0, row_scale_head = 0;
  // [batch, heads_k], packed calls too: what products of fp8 Q and K, and fp8 V, are multiplied by.
  const float *qk_descale = nullptr, *v_descale = nullptr;
  // Rotation of q and k as they are loaded: tables [.., rope_positions, rope_half]; positions are
  // clamped to them. Channel pairs (n, n + rope_half), or (2 n, 2 n + 1) if interleaved.
  const float *rope_cos = nullptr, *rope_sin = nullptr;
  int64_t rope_head = 0, rope_positions = 0, rope_half = 0;
  const int32_t *positions_q = nullptr, *positions_k = nullptr;
  int64_t positions_q_batch = 0, positions_k_batch = 0;
  bool rope_interleaved = false;
  // Dropout: a weight whose Philox word is <= dropped_to becomes 0, the others times kept_scale.
  bool dropout = false;
  uint32_t dropped_to = 0;
  float kept_scale = 1.0f;
  uint64_t dropout_seed = 0, dropout_offset = 0;
  ScoreFn score_fn = ScoreFn::kSoftmax;
  // Rows of scores need more than an interval and softmax: anything above but row_bounds,
  // row_scale, the descales and the rotation.
  bool any = false;
};

// What is asked, apart from where the tensors lie. Shared by forward, backward and decode.
struct FlashProblem {
  DType dtype = DType::kFloat32;                                 // of K and V
  DType q_dtype = DType::kFloat32, out_dtype = DType::kFloat32;  // another beside fp8 and pages
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
  const int32_t* seqused_k = nullptr;  // [batch] or null; by its strides [batch, heads_k]
  int64_t seqused_batch = 1, seqused_head = 0;
  const float* alibi_slopes = nullptr;  // [heads_q], or [batch, heads_q] by alibi_batch_stride
  int64_t alibi_batch_stride = 0;
  const float* sinks = nullptr;  // [heads_q] logits of a virtual key with value 0, or null
  float softmax_scale = 1.0f;
  float softcap = 0.0f;  // 0: off
  int64_t window_left = -1;
  int64_t window_right = -1;  // causal is window_right = 0
  FlashMods mods;
};

// Sequences with at most this many (query, head-of-group) rows go to decode: it streams K and V
// once in dot-product form, while the packed form would spend as much on packing as on the product.
constexpr int64_t kFewRows = 8;

// What tuning may change about a kernel. 0 is the kernel's own choice; anything else is clamped to
// what the kernel has room for, so no value is unsafe. Results stay inside the error bound and do
// not depend on the number of threads; their last bits may depend on the tiles.
struct FlashTiles {
  int64_t block_m = 0;     // query rows of a tile
  int64_t block_n = 0;     // keys of a block
  int64_t chunks = 0;      // backward: parts that the key blocks of all heads are dealt to
  int64_t wave_bytes = 0;  // forward: packed K and V held at a time
  int64_t split_keys = 0;  // decode: keys of a split
  int64_t chunk_keys = 0;  // decode: keys of a step
};

// Which sequences a forward kernel serves.
enum class RowRoute : int32_t { kAll = 0, kManyRows = 1, kFewRows = 2 };

// Decode: the keys of sequence b are cut into pieces first[b] .. first[b + 1] - 1, of which piece n
// is keys begin[n] .. end[n] - 1, ascending and without a gap. Host code has checked it.
struct SplitTable {
  const int32_t* first = nullptr;  // [batch + 1]; null: no plan
  const int32_t *begin = nullptr, *end = nullptr;
};

struct FlashFwdParams {
  FlashProblem problem;
  TensorRef q, k, v, out;
  TensorRef out_lo;  // data null: not wanted. Else round16(O - round16(O)), same dtype as out
  RowStatRef lse;
  RowRoute route = RowRoute::kAll;
  int64_t few_rows = kFewRows;  // what the route takes for few; many are at most most_rows
  int64_t most_rows = int64_t{1} << 40;
  int64_t split_keys = 0;  // decode: keys per split, above what the tiles say
  int64_t num_splits = 0;  // decode: above that, equal splits of each sequence
  SplitTable plan;         // decode: above that, pieces as they were planned
  FlashTiles tiles;
  void* workspace = nullptr;
};

struct FlashBwdParams {
  FlashProblem problem;
  TensorRef dout, q, k, v, out, out_lo;
  TensorRef dq, dk, dv;
  RowStatRef lse;
  RowStatRef dlse;   // data null: the loss does not use the LSE
  RowStatRef delta;  // output: rowsum(dO * O) - dLSE
  // Gradients of mods, null where not wanted; fp32, zeroed by the caller, who also sums what
  // several (batch, head) pairs share. dS is the gradient of the logits in natural units.
  float* dcolumns = nullptr;  // [batch, heads_q, seqlen_k] (varlen [heads_q, total_k]): sums of dS
  int64_t dcolumns_batch = 0, dcolumns_head = 0;
  float* drows = nullptr;  // [batch, heads_q, max_chunks, seqlen_q] (varlen without batch, total_q)
  int64_t drows_batch = 0, drows_head = 0, drows_chunk = 0;
  float* dbias = nullptr;  // [.., seqlen_q, seqlen_k], stride 0 where pairs share elements
  int64_t dbias_batch = 0, dbias_head = 0, dbias_row = 0;
  float* drel_bias = nullptr;  // [batch, heads_q, max_chunks, 2 rel_radius + 1]
  RowStatRef drow_scale;
  int64_t max_chunks =
      int64_t{1} << 40;  // parts of the keys that drows and drel_bias have room for
  FlashTiles tiles;
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

// The operands of a reduction over P = exp(S - LSE), whose tiles are never all in memory.
struct ScoreParams {
  FlashProblem problem;  // no varlen, no sinks (the LSE has them); v_head_dim is not used
  TensorRef q, k;
  RowStatRef lse;  // data null: a statistic of the logits
  void* workspace = nullptr;
};

struct ColumnSumsParams {
  ScoreParams scores;
  RowStatRef row_weights;  // data null: every row counts once
  float* out = nullptr;    // [batch, heads_q, seqlen_k]
};

struct SpanMassParams {
  ScoreParams scores;
  const int32_t* boundaries = nullptr;  // [spans + 1], rising
  int64_t spans = 0;
  float* out = nullptr;  // [batch, heads_q, seqlen_q, spans]
};

struct SpanGradParams {
  ScoreParams scores;
  const int32_t* boundaries = nullptr;
  int64_t spans = 0;
  const float* dout = nullptr;  // [batch, heads_q, seqlen_q, spans]
  TensorRef dq, dk;
  float* dlse = nullptr;  // [batch, heads_q, seqlen_q]
};

struct BlockMaxParams {
  ScoreParams scores;
  int64_t q_block = 1;
  int64_t k_block = 1;
  float* out = nullptr;  // [batch, heads_q, ceil(seqlen_q / q_block), ceil(seqlen_k / k_block)]
};

struct RowEntropyParams {
  ScoreParams scores;
  float* out = nullptr;  // [batch, heads_q, seqlen_q], nats
};

struct TopKParams {
  ScoreParams scores;
  int64_t n = 0;
  float* values = nullptr;     // [batch, heads_q, seqlen_q, n]
  int32_t* indices = nullptr;  // the same; -1 where a row has no more keys
};

struct EdgesParams {
  ScoreParams scores;
  float threshold = 0.0f;
  int64_t max_edges = 0;
  int32_t* index = nullptr;  // [max_edges, 4]: batch, head, query, key
  float* prob = nullptr;     // [max_edges]
  int64_t* count = nullptr;  // one number: all edges, also those that found no room
};

struct HeadGradientParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t seqlen = 0;
  int64_t heads = 0;
  int64_t dim = 0;
  TensorRef dout, out;
  float* rows = nullptr;  // [batch, heads, seqlen]
  float* sums = nullptr;  // [batch, heads]
};

// A handle on somebody's thread pool (torch's, or a plain loop in tests).
// run(body, arg) calls body(worker, arg) once for each worker in [0, num_threads), maybe at the
// same time; it returns when all are done.
struct Workers {
  int64_t num_threads = 1;
  void (*run)(int64_t num_threads, void (*body)(int64_t worker, void* arg), void* arg) = nullptr;
};

}  // namespace attnforge
