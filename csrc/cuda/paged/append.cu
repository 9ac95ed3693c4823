// New keys and values into pages, behind what a cache holds.
//
//   warp       a run of new slots of one page and one head: eight of them, or, where the bounds of
//              a page are kept, all of the page, so that one owner folds them in order
//   lanes      pairs of channels, which are a rotated pair or a byte of int4; rows that change
//              nothing are copied, 16 bytes at a time where both sides allow it
//   bytes      k and v once, their stored form once; bound by memory
//
// Nothing but the new slots is written. Slots past the table and pages that do not exist are left
// out.
#include "cuda/launch.h"
#include "cuda/paged/encode.h"
#include "cuda/paged/launch.h"
#include "cuda/tile/pages.h"

namespace attnforge::cuda {

namespace {

constexpr int kAppendWarps = 4, kRunSlots = 8;

// How a call is dealt to warps.
struct AppendGrid {
  Divider slots;    // of a page
  int run, runs;    // slots of a run, runs of a page
  int64_t parts;    // runs that the rows of a sequence may touch
  bool chunks;      // copies are of 16 bytes
  bool bounds_f32;  // dtype of the bounds
  int64_t warps;    // all of them
};

// New rows of one sequence and head for slots of one page.
struct Run {
  int batch, head;
  int64_t row;  // the first one in memory; packed rows are one batch
  int key;      // its cache position
  int page, slot, count;
};

AF_DEVICE Run run_of(const PagedAppendParams& p, const AppendGrid& grid, int64_t warp) {
  const int head = static_cast<int>(warp % p.heads);
  const int part = static_cast<int>(warp / p.heads % grid.parts);
  const int batch = static_cast<int>(warp / p.heads / grid.parts);
  Run none = {};
  int64_t row = 0, rows = p.seqlen;
  if (p.cu_seqlens != nullptr) {
    row = at_least<int64_t>(0, at_most<int64_t>(p.cu_seqlens[batch], p.total));
    rows = at_most<int64_t>(p.cu_seqlens[batch + 1], p.total) - row;
  }
  const int size = grid.slots.divisor;
  const int length = p.lengths[batch * p.length_batch + head * p.length_head];
  if (length < 0 || length >= p.pool.max_pages * size) return none;
  const int64_t end = at_most<int64_t>(length + rows, p.pool.max_pages * size);
  const int first_entry = grid.slots.quotient(length);
  const int index = (length - first_entry * size) / grid.run + part;  // of runs from that page on
  const int64_t entry = first_entry + index / grid.runs, start = entry * size;
  const int64_t begin = start + index % grid.runs * grid.run;
  const int64_t lo = at_least<int64_t>(begin, length);
  const int64_t hi = at_most(end, at_most(begin + grid.run, start + size));
  if (lo >= hi) return none;
  const int page = p.pool.table[batch * p.pool.table_stride + entry];
  if (page < 0 || page >= p.pool.pages) return none;
  return {p.cu_seqlens != nullptr ? 0 : batch,
          head,
          row + lo - length,
          static_cast<int>(lo),
          page,
          static_cast<int>(lo - start),
          static_cast<int>(hi - lo)};
}

template <class T>
AF_DEVICE void copy_run(const TensorRef& from, const TensorRef& to, const Run& run, int dim,
                        bool chunks) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(T));
  const int width = chunks ? dim / kPer : dim;
  for (int n = static_cast<int>(ptx::lane_id()); n < run.count * width; n += 32) {
    const int j = n / width, c = n % width;
    const T* source = row_ptr<const T>(from, run.batch, run.row + j, run.head);
    T* target = row_ptr<T>(to, run.page, run.slot + j, run.head);
    if (chunks) {
      ptx::store_global_16(target + c * kPer, ptx::load_global_16_streaming(source + c * kPer));
    } else {
      target[c] = source[c];
    }
  }
}

// Channel d of a key, turned.
template <class T>
AF_DEVICE float rotated(const PagedAppendParams& p, const T* x, int d, int head, int64_t place) {
  const int half = static_cast<int>(p.rope_half);
  const float own = widen(x[d]);
  if (d >= 2 * half) return own;
  const bool second = p.rope_interleaved ? d % 2 == 1 : d >= half;
  const int step = p.rope_interleaved ? 1 : half;
  const int64_t n = head * p.rope_head + place * half + (p.rope_interleaved ? d / 2 : d % half);
  const float other = widen(x[second ? d - step : d + step]);
  return own * p.rope_cos[n] + (second ? other : -other) * p.rope_sin[n];
}

template <class B>
AF_DEVICE void widen_bounds(B* low, B* high, float x, bool fresh) {
  const float least = widen(*low), most = widen(*high);  // a NaN stays
  *low = narrow<B>(fresh || x < least || x != x ? x : least);
  *high = narrow<B>(fresh || x > most || x != x ? x : most);
}

// Rows of one run through fp32: channel pairs of a lane, slot after slot.
template <class T>
AF_DEVICE void write_run(const PagedAppendParams& p, const AppendGrid& grid, const Run& run,
                         bool keys) {
  const PagePool& pool = p.pool;
  const bool codes = pool.type >= PageType::kFp8;
  const TensorRef& from = keys ? p.k : p.v;
  const TensorRef& to = keys ? pool.k : pool.v;
  const float* scales = keys ? pool.k_scale : pool.v_scale;
  const float* zeros = keys ? pool.k_zero : pool.v_zero;
  const int dim = static_cast<int>(keys ? p.head_dim : p.v_head_dim);
  for (int d = 2 * static_cast<int>(ptx::lane_id()); d < dim; d += 64) {
    for (int j = 0; j < run.count; ++j) {
      const T* x = row_ptr<const T>(from, run.batch, run.row + j, run.head);
      const int64_t at = run.page * pool.code_page + (run.slot + j) * pool.code_slot + run.head;
      const float scale = scales != nullptr ? scales[at] : 1.0f;
      const float centre = pool.type == PageType::kInt4 ? kInt4Centre : 0.0f;
      const float zero = zeros != nullptr ? zeros[at] : centre;
      int64_t place = run.key + j;
      if (p.positions != nullptr) place = p.positions[run.batch * p.seqlen + run.row + j];
      place = at_least<int64_t>(0, at_most(place, p.rope_positions - 1));
      uint32_t pair = 0;
      for (int i = 0; i < 2 && d + i < dim; ++i) {
        float value =
            keys && p.rope_cos != nullptr ? rotated(p, x, d + i, run.head, place) : widen(x[d + i]);
        if (codes) {
          const Encoded e = encoded(pool.type, value, scale, zero);
          value = e.value;
          pair |= e.code << (pool.type == PageType::kInt4 ? 4 * i : 8 * i);
          if (pool.type != PageType::kInt4) {
            auto* row = row_ptr<uint8_t>(to, run.page, run.slot + j, run.head);
            row[d + i] = static_cast<uint8_t>(e.code);
          }
        } else {
          const T stored = narrow<T>(value);
          value = widen(stored);
          row_ptr<T>(to, run.page, run.slot + j, run.head)[d + i] = stored;
        }
        if (keys && p.page_min != nullptr) {
          const int64_t n = (run.page * p.heads + run.head) * dim + d + i;
          const bool fresh = run.slot + j == 0;
          if (grid.bounds_f32) {
            widen_bounds(static_cast<float*>(p.page_min) + n, static_cast<float*>(p.page_max) + n,
                         value, fresh);
          } else {
            widen_bounds(static_cast<T*>(p.page_min) + n, static_cast<T*>(p.page_max) + n, value,
                         fresh);
          }
        }
      }
      if (pool.type == PageType::kInt4) {
        auto* row = row_ptr<uint8_t>(to, run.page, run.slot + j, run.head);
        row[d / 2] = static_cast<uint8_t>(pair);
      }
    }
  }
}

}  // namespace

template <class T>
__global__ void __launch_bounds__(32 * kAppendWarps)
    paged_append_kernel(const __grid_constant__ PagedAppendParams p,
                        const __grid_constant__ AppendGrid grid) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kAppendWarps + warp_id();
  if (warp >= grid.warps) return;
  const Run run = run_of(p, grid, warp);
  if (run.count == 0) return;
  const bool same = p.pool.type < PageType::kFp8;
  if (same && p.rope_cos == nullptr && p.page_min == nullptr) {
    copy_run<T>(p.k, p.pool.k, run, static_cast<int>(p.head_dim), grid.chunks);
  } else {
    write_run<T>(p, grid, run, true);
  }
  if (p.pool.v.data == nullptr) return;
  if (same) {
    copy_run<T>(p.v, p.pool.v, run, static_cast<int>(p.v_head_dim), grid.chunks);
  } else {
    write_run<T>(p, grid, run, false);
  }
}

int paged_append(const PagedAppendParams& p, void* stream) {
  const int64_t size = p.pool.page_size;
  AppendGrid grid;
  grid.slots = Divider::by(size);
  grid.run = static_cast<int>(p.page_min != nullptr || size < kRunSlots ? size : kRunSlots);
  grid.runs = static_cast<int>((size + grid.run - 1) / grid.run);
  // Every page and the whole sequence may begin and end inside a run.
  const int64_t entries = p.seqlen / size + 2;
  grid.parts = p.seqlen / grid.run + entries + 1;
  if (grid.parts > entries * grid.runs) grid.parts = entries * grid.runs;
  const int64_t item = p.dtype == DType::kFloat32 ? 4 : 2;
  const auto whole = [&](const TensorRef& t, int64_t dim) {
    return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.batch_stride * item % 16 == 0 &&
           t.seq_stride * item % 16 == 0 && t.head_stride * item % 16 == 0 && dim * item % 16 == 0;
  };
  grid.chunks = whole(p.k, p.head_dim) && whole(p.pool.k, p.head_dim) && whole(p.v, p.v_head_dim) &&
                whole(p.pool.v, p.v_head_dim);
  grid.bounds_f32 = p.bounds_dtype == DType::kFloat32;
  grid.warps = p.batch * grid.parts * p.heads;
  if (grid.warps == 0) return 0;
  return with_dtype(p.dtype, [&]<DType kDType>() {
    using T = typename ElementOf<kDType>::Type;
    const auto blocks = static_cast<unsigned>((grid.warps + kAppendWarps - 1) / kAppendWarps);
    return ATTNFORGE_LAUNCH((paged_append_kernel<T>), dim3(blocks), dim3(32 * kAppendWarps), 0,
                            stream, p, grid);
  });
}

}  // namespace attnforge::cuda
