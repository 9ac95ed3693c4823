// Rows of K and V, wherever they lie. Kernels are templates over a store of keys:
//
//   Store::Keys                rows of one KV head from some key on: k_row(j), v_row(j);
//                              next_row(j), row j of what then() named
//   locate(seq, key0, n, at)   looks up where keys [key0, key0 + n) of a sequence lie, for all
//                              heads
//   keys(seq, key0, head, at)  those rows of one head
//   then(keys, ...)            the rows that will be read next, prefetched meanwhile
//   key_scale(head) ..         of codes with one scale and zero per head; else 1, 1 and 0
//
// Here is the store of tensors in one piece; the one of pages is in cpu/paged.
#pragma once

#include "cpu/flash/problem.h"
#include "cpu/simd/codes.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

template <class T>
struct DenseKeys {
  using Element = T;
  static constexpr bool kPages = false, kCodes = false;
  const T *k, *v;
  int64_t k_stride, v_stride;
  const T* next_k;  // null: nothing

  AF_INLINE_MEMBER const T* k_row(int64_t j) const { return k + j * k_stride; }
  AF_INLINE_MEMBER const T* v_row(int64_t j) const { return v + j * v_stride; }
  AF_INLINE_MEMBER const T* next_row(int64_t j) const { return next_k + j * k_stride; }
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
            row_ptr<const T>(v, seq.batch, seq.k_row + key0, head), k.seq_stride, v.seq_stride,
            nullptr};
  }
  AF_INLINE_MEMBER void then(Keys& keys, const Sequence& seq, int64_t key0, int64_t head,
                             const Places&) const {
    keys.next_k = row_ptr<const T>(k, seq.batch, seq.k_row + key0, head);
  }
};

}  // namespace attnforge::cpu::ATTNFORGE_ISA
