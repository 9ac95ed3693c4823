// Rows of K and V, wherever they lie. Kernels are templates over a store of keys:
//
//   Store::Keys                rows of one KV head from some key on: k_row(j), v_row(j)
//   locate(seq, key0, n, at)   looks up where keys [key0, key0 + n) of a sequence lie, for all
//                              heads
//   keys(seq, key0, head, at)  those rows of one head
//   k_rows(keys, heads, dim)   their K in this head and those behind it, as RowsAhead walks them;
//                              v_rows likewise
//   key_scale(head) ..         of codes with one scale and zero per head; else 1, 1 and 0
//
// Here is the store of tensors in one piece; the one of pages is in cpu/paged.
#pragma once

#include "cpu/flash/problem.h"
#include "cpu/micro/pack.h"
#include "cpu/simd/codes.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// Rows that will be read next, brought into L2 meanwhile, in rounds: a line of each of several
// streams, which are the memory pages that the rows lie in, walked in the order of memory. Hardware
// fetches ahead page by page; while the other streams have their turn it does so in this one, and
// what is asked for next is there or on its way: it waits in no miss buffer.
template <class E>
struct RowsAhead {
  const E* rows;      // of the first head
  const int64_t* at;  // of each key from there; null: `stride` apart
  int64_t stride, head_stride, dim, heads;
  int64_t keys = 0, apart = 1;              // apart: keys of a stream
  int64_t key = 0, head = 0, channels = 0;  // where the first stream stands
  int64_t left = 0;                         // rounds to go for now

  static constexpr int64_t kLine = 512 / kBits<E>;  // channels
  static constexpr int64_t kMemoryPage = 4096;

  AF_INLINE_MEMBER void begin(int64_t n) {
    const int64_t key_bytes = max64(1, stride * static_cast<int64_t>(sizeof(E)));
    keys = n, apart = max64(1, min64(n, kMemoryPage / key_bytes));
    key = head = channels = left = 0;
  }
  // The rounds of one of `parts` equal parts of the walk, the earlier ones being done.
  AF_INLINE_MEMBER void allow(int64_t part, int64_t parts) {
    const int64_t all = apart * heads * ceil_div(dim, kLine);
    left += all * (part + 1) / parts - all * part / parts;
  }
};

// Rounds of a walk, as far as it has some left. Not inlined: products keep their registers.
template <class E>
[[gnu::noinline]] static void ask_for(RowsAhead<E>& walk, int64_t rounds) {
  rounds = min64(rounds, walk.left);
  walk.left -= rounds;
  for (; rounds > 0; --rounds) {
    const E* line = channel(walk.rows + walk.head * walk.head_stride, walk.channels);
    for (int64_t j = walk.key; j < walk.keys; j += walk.apart) {
      __builtin_prefetch(line + (walk.at ? walk.at[j] : j * walk.stride), 0, 2);
    }
    walk.channels += walk.kLine;
    if (walk.channels < walk.dim) continue;
    walk.channels = 0;
    if (++walk.head == walk.heads) walk.head = 0, ++walk.key;
  }
}

template <class T>
struct DenseKeys {
  using Element = T;
  static constexpr bool kPages = false, kCodes = false;
  const T *k, *v;
  int64_t k_stride, v_stride;

  AF_INLINE_MEMBER const T* k_row(int64_t j) const { return k + j * k_stride; }
  AF_INLINE_MEMBER const T* v_row(int64_t j) const { return v + j * v_stride; }
  AF_INLINE_MEMBER void skip(int64_t n) {
    k += n * k_stride;
    v += n * v_stride;
  }
};

template <class T>
struct DenseStore {
  using Element = T;
  using Keys = DenseKeys<T>;
  struct Places {};
  const TensorRef &k, &v;

  AF_INLINE_MEMBER float key_scale(int64_t) const { return 1.0f; }
  AF_INLINE_MEMBER float value_scale(int64_t) const { return 1.0f; }
  AF_INLINE_MEMBER float value_zero(int64_t) const { return 0.0f; }

  // Whether heads lie in planes of their own: one after another is then the order of memory.
  AF_INLINE_MEMBER bool planes() const { return k.head_stride > k.seq_stride; }
  AF_INLINE_MEMBER void locate(const Sequence&, int64_t, int64_t, Places&) const {}
  AF_INLINE_MEMBER Keys keys(const Sequence& seq, int64_t key0, int64_t head, const Places&) const {
    return {row_ptr<const T>(k, seq.batch, seq.k_row + key0, head),
            row_ptr<const T>(v, seq.batch, seq.k_row + key0, head), k.seq_stride, v.seq_stride};
  }
  AF_INLINE_MEMBER RowsAhead<T> k_rows(const Keys& keys, int64_t heads, int64_t dim) const {
    return {keys.k, nullptr, k.seq_stride, k.head_stride, dim, heads};
  }
  AF_INLINE_MEMBER RowsAhead<T> v_rows(const Keys& keys, int64_t heads, int64_t dim) const {
    return {keys.v, nullptr, v.seq_stride, v.head_stride, dim, heads};
  }
};

}  // namespace attnforge::cpu::ATTNFORGE_ISA
