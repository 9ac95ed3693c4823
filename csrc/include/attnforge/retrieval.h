// Parameters of the retrieval family's kernels; conventions as in params.h.
#pragma once

#include "attnforge/paged.h"

namespace attnforge {

// Lists of keys: ids [batch, heads, slots], lens [batch, heads] or null, log_bias like ids or null.
// heads is 1, the KV heads or the query heads. One list lies `stride` entries behind the other.
struct KeyLists {
  const int32_t* ids = nullptr;
  const int32_t* lens = nullptr;
  const float* log_bias = nullptr;
  int64_t heads = 1;
  int64_t slots = 0, stride = 0;
};

struct IndexedFwdParams {
  FlashFwdParams flash;  // seqused_k holds the keys in use
  PagePool pool;         // table null: keys lie in flash.k and flash.v
  KeyLists lists;
};

struct IndexedBwdParams {
  FlashBwdParams flash;
  KeyLists lists;
  float* dlog_bias = nullptr;  // [batch, max(list heads, KV heads), slots], or null
};

// Logits of every key: [batch, heads_q, seqlen_q, columns]; keys not in use are -inf.
struct KeyScoresParams {
  FlashProblem problem;  // seqused_k holds the keys in use
  TensorRef q, k;
  PagePool pool;                    // table null: keys lie in k
  const int32_t* counts = nullptr;  // [batch, heads_k, columns]: divide by sum counts exp(s)
  float* out = nullptr;
  int64_t columns = 0;
};

// Upper bounds of the logits of the keys of a page, from its range per channel.
struct PageScoresParams {
  FlashProblem problem;
  TensorRef q;
  TensorRef low, high;  // [pages or batch, 1 or pages, heads_k, head_dim] of bounds_dtype
  DType bounds_dtype = DType::kFloat32;
  TensorRef scale;  // fp32 like low and high but for head_dim, of bounds in int8; null: none
  const int32_t* table = nullptr;  // [batch, columns]; null: pages lie by sequence
  int64_t table_stride = 0, pages = 0;
  const int32_t* used = nullptr;  // [batch] pages in use, or null
  bool grouped = false;           // the largest of the query heads of a KV head
  float* out = nullptr;           // [batch, heads_q (grouped: heads_k), seqlen_q, columns]
  int64_t columns = 0;
  void* workspace = nullptr;
};

enum class SelectKind : int32_t { kTopK = 0, kThreshold, kTopP };

// Chooses columns of each row, ascending. Forced are the first and the last ones of those in use.
struct SelectParams {
  SelectKind kind = SelectKind::kTopK;
  const float* scores = nullptr;  // [rows, columns]
  int64_t rows = 0, columns = 0;
  const int32_t* used = nullptr;  // [rows] columns in use, or null
  int64_t k = 0;
  const float* threshold = nullptr;  // one, or [rows] by its stride
  int64_t threshold_stride = 0;
  double mass = 1.0;
  int64_t first = 0, last = 0;
  int32_t* ids = nullptr;   // [rows, slots], -1 behind
  int32_t* lens = nullptr;  // [rows]
  int64_t slots = 0;
};

// Columns of select_columns as the runs of ids that they stand for: column c is starts[c] ..
// starts[c + 1] - 1. What stands in `tail` behind the last run is there for every row.
struct ExpandRunsParams {
  const int32_t* columns = nullptr;  // [rows, most], -1 behind
  const int32_t* lens = nullptr;     // [rows] columns of a row, or null: all of them
  int64_t rows = 0, most = 0;
  const int32_t* starts = nullptr;  // [rows / share, runs + 1], rising
  int64_t runs = 0, share = 1;
  int64_t tail_begin = 0, tail_end = 0;
  int32_t* ids = nullptr;    // [rows, slots]; behind a length nothing is written
  int32_t* sizes = nullptr;  // [rows]
  int64_t slots = 0;
};

// The nearest of centroids for rows: the first largest of <x, c> - shift.
struct NearestParams {
  const float* x = nullptr;      // [heads, rows, dim]
  const float* c = nullptr;      // [heads, clusters, dim]
  const float* shift = nullptr;  // [heads, clusters], or null: 0
  int64_t heads = 0, rows = 0, clusters = 0, dim = 0;
  int64_t* labels = nullptr;  // [heads, rows]
  void* workspace = nullptr;
};

// Sums of the rows of each label, in the order of the rows, and how many there are.
struct ClusterSumsParams {
  const float* x = nullptr;         // [heads, rows, dim]
  const int64_t* labels = nullptr;  // [heads, rows]
  int64_t heads = 0, rows = 0, clusters = 0, dim = 0;
  float* sums = nullptr;      // [heads, clusters, dim]
  int32_t* counts = nullptr;  // [heads, clusters]
};

// Signs of projections: bit j of the code of table l is <x - mean, planes[:, l * bits + j]> > 0.
struct LshEncodeParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, seqlen = 0, heads = 0, dim = 0;
  TensorRef x;
  const float* mean = nullptr;    // [batch, heads, dim] or null
  const float* planes = nullptr;  // [dim, bits * tables]
  int64_t bits = 0, tables = 0;
  uint16_t* codes = nullptr;  // [batch, heads, seqlen, tables]
  void* workspace = nullptr;
};

// Keys by code: for each (sequence, KV head), segment of keys, and table, the local ids of a
// bucket, ascending, stand at starts[code] .. starts[code + 1].
struct LshTables {
  int32_t* starts = nullptr;  // [batch * heads, segments, tables, 2^bits + 1]
  uint16_t* ids = nullptr;    // [batch * heads, segments, tables, segment]
  int64_t batch = 0, heads = 0, segments = 0, tables = 0, bits = 0;
  int64_t segment = 0;  // keys of one, at most 65536
};

struct LshInsertParams {
  LshTables tables;
  const uint16_t* codes = nullptr;  // [batch, heads, rows, tables]
  int64_t rows = 0;
  const int32_t* first = nullptr;  // [batch]: the key of row 0
  const int32_t* count = nullptr;  // [batch]: rows that count
};

struct LshTruncateParams {
  LshTables tables;
  const int32_t* length = nullptr;  // [batch]: keys that stay
};

struct LshRetrieveParams {
  LshTables tables;
  FlashProblem problem;  // one query per sequence
  TensorRef q, k;
  const uint16_t* codes = nullptr;  // [batch, heads_q, tables] of the queries
  const float* mean = nullptr;      // [batch, heads_k, head_dim], or null
  const float* norms = nullptr;     // [batch, heads_k, norm_stride] of the centred keys
  int64_t norm_stride = 0;
  const int32_t *begin = nullptr, *end = nullptr;  // [batch]: keys that may be sampled
  int64_t min_hits = 2;
  float clip = 0.0f;          // added to an inclusion probability
  int32_t* ids = nullptr;     // [batch, heads_q, slots]
  int32_t* lens = nullptr;    // [batch, heads_q]
  float* log_bias = nullptr;  // like ids
  int64_t slots = 0;
  void* workspace = nullptr;
};

// One query per sequence over what it retrieves, each key weighed by its log_bias, and over the
// keys before `begin` and from `end` on, up to `length`, as they are.
struct LshAttendParams {
  LshRetrieveParams find;  // its outputs and workspace are not used
  FlashFwdParams flash;
  const int32_t* length = nullptr;  // [batch]
};

}  // namespace attnforge
