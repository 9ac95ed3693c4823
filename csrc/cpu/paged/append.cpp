// New keys and values into pages, behind what a cache holds.
//
// A task is some pages of one sequence, so that one thread owns the bounds of a page. Within a
// page: rows are copied as they are where nothing changes (all heads of a token, or all tokens, in
// one piece where both sides lie so); else a row goes through fp32: rotation, rounding or codes,
// and the bounds of what will be read. bytes: k and v once, their stored form once.
#include "cpu/kernels.h"
#include "cpu/micro/parallel.h"
#include "cpu/micro/rope.h"
#include "cpu/paged/encode.h"
#include "cpu/paged/pages.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kTaskSlots = 64;          // slots of a task: some microseconds
constexpr int64_t kMaxDim = 1024;           // of a row in fp32 on the stack
constexpr int64_t kInlineBytes = 64 << 10;  // less is done before a thread wakes up

// New rows of one sequence that go to slots of one page.
struct Run {
  int64_t batch, row0;  // first new row, in memory; packed rows are one batch
  int64_t key0;         // its cache position
  int64_t page, slot, count;
};

template <class T>
AF_INLINE T* at(const TensorRef& x, int64_t major, int64_t row, int64_t head) {
  return static_cast<T*>(x.data) + major * x.batch_stride + row * x.seq_stride +
         head * x.head_stride;
}

AF_INLINE const float* code_at(const PagePool& pool, const float* x, const Run& run, int64_t j,
                               int64_t head) {
  return x ? x + run.page * pool.code_page + (run.slot + j) * pool.code_slot + head : nullptr;
}

AF_INLINE void rotate_key(const PagedAppendParams& p, const Run& run, int64_t j, int64_t head,
                          float* x) {
  int64_t place = run.key0 + j;
  if (p.positions) place = p.positions[run.batch * p.seqlen + run.row0 + j];
  place = max64(0, min64(place, p.rope_positions - 1));
  const int64_t row = head * p.rope_head + place * p.rope_half;
  rotate({p.rope_cos + row, p.rope_sin + row, p.rope_half, p.rope_interleaved}, 1.0f, x);
}

template <class B>
AF_INLINE void widen_bounds(const float* x, int64_t dim, bool fresh, B* low, B* high) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int64_t n = dim - d;
    VecF v = load(x + d), least = v, most = v;
    if (!fresh) {
      least = load_partial(low + d, n), most = load_partial(high + d, n);
      least = v < least || v != v ? v : least;  // a NaN stays
      most = v > most || v != v ? v : most;
    }
    store_partial(low + d, least, n);
    store_partial(high + d, most, n);
  }
}

// Rows of one head through fp32. T: of the new rows; E: of the pages.
template <class T, class E>
[[gnu::noinline]] static void write_rows(const PagedAppendParams& p, const Run& run, int64_t head,
                                         bool keys) {
  const PagePool& pool = p.pool;
  const TensorRef& from = keys ? p.k : p.v;
  const TensorRef& to = keys ? pool.k : pool.v;
  const int64_t dim = keys ? p.head_dim : p.v_head_dim;
  float x[kMaxDim + kLanes];
  for (int64_t j = 0; j < run.count; ++j) {
    const T* src = at<const T>(from, run.batch, run.row0 + j, head);
    for (int64_t d = 0; d < dim; d += kLanes) store(x + d, load_partial(src + d, dim - d));
    if (keys && p.rope_cos) rotate_key(p, run, j, head, x);
    const float* scale = code_at(pool, keys ? pool.k_scale : pool.v_scale, run, j, head);
    const float* zero = code_at(pool, keys ? pool.k_zero : pool.v_zero, run, j, head);
    const float factor = scale ? *scale : 1.0f, centre = zero ? *zero : kCodeCentre<E>;
    E* dst = at<E>(to, run.page, run.slot + j, head);
    encode_row(x, dim, factor, centre, dst);
    if (!keys || !p.page_min) continue;
    decode_row(static_cast<const E*>(dst), dim, factor, centre - kCodeCentre<E>, x);
    const int64_t place = (run.page * p.heads + head) * dim;
    dispatch_dtype(p.bounds_dtype, [&](auto element) {
      using B = decltype(element);
      widen_bounds(x, dim, run.slot + j == 0, static_cast<B*>(p.page_min) + place,
                   static_cast<B*>(p.page_max) + place);
    });
  }
}

// Rows of heads [head0, head0 + heads) as they are.
AF_INLINE void copy_rows(const TensorRef& from, const TensorRef& to, const Run& run, int64_t head0,
                         int64_t heads, int64_t dim, int64_t item) {
  const char* src =
      static_cast<const char*>(from.data) +
      (run.batch * from.batch_stride + run.row0 * from.seq_stride + head0 * from.head_stride) *
          item;
  char* dst =
      static_cast<char*>(to.data) +
      (run.page * to.batch_stride + run.slot * to.seq_stride + head0 * to.head_stride) * item;
  const bool tokens = heads == 1 || (from.head_stride == dim && to.head_stride == dim);
  const int64_t width = heads * dim;
  if (tokens && from.seq_stride == width && to.seq_stride == width) {
    __builtin_memcpy(dst, src, run.count * width * item);
    return;
  }
  for (int64_t j = 0; j < run.count; ++j) {
    const char* token = src + j * from.seq_stride * item;
    char* place = dst + j * to.seq_stride * item;
    if (tokens) {
      __builtin_memcpy(place, token, width * item);
      continue;
    }
    for (int64_t h = 0; h < heads; ++h) {
      __builtin_memcpy(place + h * to.head_stride * item, token + h * from.head_stride * item,
                       dim * item);
    }
  }
}

AF_INLINE void write_run(const PagedAppendParams& p, const Run& run, int64_t head0, int64_t heads) {
  const int type = static_cast<int>(p.pool.type), dtype = static_cast<int>(p.dtype);
  const bool same = type == dtype;  // the floating types have the same numbers
  const int64_t item = p.dtype == DType::kFloat32 ? 4 : 2;
  for (int side = 0; side < 2; ++side) {
    const bool keys = side == 0;
    if (!keys && !p.pool.v.data) continue;
    if (same && !(keys && (p.rope_cos || p.page_min))) {
      copy_rows(keys ? p.k : p.v, keys ? p.pool.k : p.pool.v, run, head0, heads,
                keys ? p.head_dim : p.v_head_dim, item);
      continue;
    }
    for (int64_t head = head0; head < head0 + heads; ++head) {
      dispatch_dtype(p.dtype, [&](auto element) {
        dispatch_pages(p.pool.type, [&](auto stored) {
          write_rows<decltype(element), decltype(stored)>(p, run, head, keys);
        });
      });
    }
  }
}

// Pages [part * pages, (part + 1) * pages) of those that the new rows of some heads reach.
AF_INLINE void append_part(const PagedAppendParams& p, int64_t batch, int64_t part, int64_t pages,
                           int64_t head0, int64_t heads) {
  const PagePool& pool = p.pool;
  int64_t row0 = 0, rows = p.seqlen;
  if (p.cu_seqlens) {
    row0 = max64(0, min64(p.cu_seqlens[batch], p.total));
    rows = max64(0, min64(p.cu_seqlens[batch + 1], p.total) - row0);
  }
  const int64_t length = p.lengths[batch * p.length_batch + head0 * p.length_head];
  const int64_t capacity = pool.max_pages * pool.page_size;
  const int64_t end = min64(length + rows, capacity);
  if (length < 0) return;
  const int64_t entry0 = length / pool.page_size + part * pages;
  for (int64_t entry = entry0; entry < entry0 + pages; ++entry) {
    const int64_t lo = max64(length, entry * pool.page_size);
    const int64_t hi = min64(end, (entry + 1) * pool.page_size);
    if (lo >= hi) return;
    const int64_t page = pool.table[batch * pool.table_stride + entry];
    if (page < 0 || page >= pool.pages) continue;
    write_run(p,
              {p.cu_seqlens ? 0 : batch, row0 + lo - length, lo, page, lo - entry * pool.page_size,
               hi - lo},
              head0, heads);
  }
}

}  // namespace

void paged_append(const PagedAppendParams& p, const Workers& all_workers) {
  const int64_t pages = max64(1, kTaskSlots / p.pool.page_size);
  const int64_t parts = ceil_div(p.seqlen + p.pool.page_size, pages * p.pool.page_size);
  const int64_t rows = p.cu_seqlens ? p.total : p.batch * p.seqlen;
  Workers workers = all_workers;
  if (rows * p.heads * (p.head_dim + p.v_head_dim) * 4 < kInlineBytes) workers.num_threads = 1;
  parallel_tasks(workers, p.batch * parts, [&](int64_t task, int64_t) {
    const int64_t batch = task / parts, part = task % parts;
    if (!p.length_head) return append_part(p, batch, part, pages, 0, p.heads);
    for (int64_t h = 0; h < p.heads; ++h) append_part(p, batch, part, pages, h, 1);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
