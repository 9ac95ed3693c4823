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

// Rows that will be read next, brought into L2 meanwhile: those of `heads` heads, key after key,
// which is the order in which they lie. It is that order which counts: a head's rows alone lie a
// token apart, and what the hardware fetches beside them is then of no use to anybody.
template <class E>
struct RowsAhead {
  const E* rows;      // of the first head
  const int64_t* at;  // of each key from there; null: `stride` apart
  int64_t stride, head_stride, dim, heads;
  int64_t key, head, left;  // the next one, and how many there are

  AF_INLINE_MEMBER void step(int64_t n) {
    n = min64(n, left);
    left -= n;
    while (n > 0) {
      const E* row = rows + (at ? at[key] : key * stride) + head * head_stride;
      const int64_t run = min64(n, heads - head);
      for (int64_t i = 0; i < run; ++i, row += head_stride) prefetch_row(row, dim);
      n -= run, head += run;
      if (head == heads) head = 0, ++key;
    }
  }
};

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
    return {keys.k, nullptr, k.seq_stride, k.head_stride, dim, heads, 0, 0, 0};
  }
  AF_INLINE_MEMBER RowsAhead<T> v_rows(const Keys& keys, int64_t heads, int64_t dim) const {
    return {keys.v, nullptr, v.seq_stride, v.head_stride, dim, heads, 0, 0, 0};
  }
};

}  // namespace attnforge::cpu::ATTNFORGE_ISA
