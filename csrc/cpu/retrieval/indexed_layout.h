// How the forward over listed keys is cut into tasks, what they leave, and where listed keys lie.
#pragma once

#include "cpu/flash/decode_tasks.h"
#include "cpu/paged/pages.h"
#include "cpu/retrieval/gather.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kSplitEntries = 1024;
constexpr int64_t kRowBlock = 16;
// Of K in a chunk: rows that lie a power of two apart share few sets of L1.
constexpr int64_t kGatherBytes = 4 << 10;

struct Layout {
  int64_t units, group, rows, blocks;  // units: (batch, KV head); rows: padded to kRows
  bool united;
  int64_t capacity;  // entries of a unit
  int64_t split, splits, chunk;
  int64_t ldq, ldo;
};

AF_INLINE Layout make_layout(const IndexedFwdParams& params, int64_t element_bytes) {
  const FlashProblem& p = params.flash.problem;
  Layout y;
  y.units = p.batch * p.heads_k;
  y.group = group_size(p);
  const int64_t rows = p.seqlen_q * y.group;
  y.rows = round_up(rows, kRows);
  y.blocks = ceil_div(rows, kRowBlock);
  y.united = wants_union(p, params.lists);
  y.capacity = params.lists.slots * (y.united ? y.group : 1);
  y.split = y.blocks == 1 ? kSplitEntries : max64(1, y.capacity);
  y.splits = max64(1, ceil_div(y.capacity, y.split));
  const int64_t row_bytes = p.head_dim * element_bytes;
  y.chunk = max64(8, min64(kMaxChunk, kGatherBytes / row_bytes / 8 * 8));
  y.ldq = round_up(p.head_dim, kLanes);
  y.ldo = round_up(p.v_head_dim, kLanes);
  return y;
}

struct Room {
  char* gathered;
  int64_t gathered_bytes;  // of one unit
  Partials partials;
  char* scratch;
  int64_t scratch_bytes;  // per worker: a block of scaled q
};

AF_INLINE Gathered take_gathered(Arena& a, const Layout& y) {
  Gathered g;
  g.count = a.take<int64_t>(1);
  g.keys = a.take<int32_t>(y.capacity);
  g.bias = a.take<float>(y.capacity * (y.united ? y.group : 1));
  g.order = a.take<uint64_t>(y.united ? y.capacity : 0);
  return g;
}

AF_INLINE Gathered gathered_of(const Room& room, const Layout& y, int64_t unit) {
  Arena a{room.gathered + unit * room.gathered_bytes};
  return take_gathered(a, y);
}

// ---- where listed keys lie ----

template <class T>
struct Rows {
  const IndexedFwdParams& params;

  AF_INLINE_MEMBER bool paged() const { return params.pool.table != nullptr; }
  AF_INLINE_MEMBER PageKeys<T> keys(int64_t batch, int64_t head) const {
    PageKeys<T> keys{};
    const TensorRef &k = paged() ? params.pool.k : params.flash.k,
                    &v = paged() ? params.pool.v : params.flash.v;
    const int64_t own = paged() ? 0 : batch;
    keys.k = row_ptr<const T>(k, own, 0, head), keys.v = row_ptr<const T>(v, own, 0, head);
    return keys;
  }
  AF_INLINE_MEMBER int64_t k_stride() const {
    return paged() ? params.pool.k.seq_stride : params.flash.k.seq_stride;
  }
  AF_INLINE_MEMBER int64_t v_stride() const {
    return paged() ? params.pool.v.seq_stride : params.flash.v.seq_stride;
  }
  AF_INLINE_MEMBER void locate(int64_t batch, const int32_t* list, int64_t n, int64_t* k,
                               int64_t* v) const {
    const PagePool& pool = params.pool;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t key = list[j];
      if (!paged()) {
        k[j] = key * params.flash.k.seq_stride, v[j] = key * params.flash.v.seq_stride;
        continue;
      }
      const int32_t entry = pool.table[batch * pool.table_stride + key / pool.page_size];
      const int64_t page = max64(0, min64(entry, pool.pages - 1)), slot = key % pool.page_size;
      k[j] = page * pool.k.batch_stride + slot * pool.k.seq_stride;
      v[j] = page * pool.v.batch_stride + slot * pool.v.seq_stride;
    }
  }
};

}  // namespace
}  // namespace attnforge::cpu::ATTNFORGE_ISA
