// Parameters of the paged family's kernels; conventions as in params.h.
#pragma once

#include "attnforge/params.h"

namespace attnforge {

// What a page holds. kInt4: two per byte, the even channel in the low nibble.
enum class PageType : int32_t { kFloat32 = 0, kFloat16, kBFloat16, kFp8, kInt8, kInt4 };

// Keys and values in pages. Strides are in stored elements (bytes for kInt4); batch_stride is that
// of pages, seq_stride that of slots.
struct PagePool {
  PageType type = PageType::kFloat32;
  TensorRef k, v;
  int64_t pages = 0;
  int64_t page_size = 1;
  const int32_t* table = nullptr;  // [batch, max_pages], rows table_stride apart
  int64_t table_stride = 0;
  int64_t max_pages = 0;
  // A code means (code - zero) * scale. All of one shape [pages|1, slots|1, heads]; null: 1, and 0
  // (8 for kInt4).
  const float *k_scale = nullptr, *v_scale = nullptr, *k_zero = nullptr, *v_zero = nullptr;
  int64_t code_page = 0, code_slot = 0;  // strides; heads are neighbours
};

// Rows per kv head up to which packed tiles split the keys: partial outputs stay small.
constexpr int64_t kSomeRows = 192;

struct PagedFwdParams {
  FlashFwdParams flash;  // k and v are not used; seqlen_k bounds the lengths
  PagePool pool;
};

// Writes rows k [batch, seqlen, heads, dim] (or packed) behind the lengths.
struct PagedAppendParams {
  PagePool pool;  // v.data null: keys alone
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t seqlen = 0;                   // rows of a sequence; the most of them if packed
  int64_t total = 0;                    // packed rows
  const int32_t* cu_seqlens = nullptr;  // [batch + 1] or null
  const int32_t* lengths = nullptr;     // before; [batch], or [batch, heads] by the strides
  int64_t length_batch = 1, length_head = 0;
  int64_t heads = 0, head_dim = 0, v_head_dim = 0;
  TensorRef k, v;
  // Rotation of k: tables [heads|1, rope_positions, rope_half].
  const float *rope_cos = nullptr, *rope_sin = nullptr;
  int64_t rope_head = 0, rope_positions = 0, rope_half = 0;
  bool rope_interleaved = false;
  const int32_t* positions = nullptr;  // [batch, seqlen] or [total]; null: cache positions
  // [pages, heads, head_dim] of bounds_dtype: the range of the keys in a page, as they are read.
  void *page_min = nullptr, *page_max = nullptr;
  DType bounds_dtype = DType::kFloat32;
  void* workspace = nullptr;
};

}  // namespace attnforge
