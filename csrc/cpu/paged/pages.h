// The store of keys in pages: the loader that flash's forward and decode read a page table through.
//
// A table entry is data: it is clamped to the pages that exist. Places of keys are looked up once
// per run of them, for all heads; a row is then one addition away. Codes of one scale and zero per
// head are left to Q and to the finished row; others change scores and weights, key by key. The
// unit of a code is left to Q and the row in any case.
#pragma once

#include "attnforge/paged.h"
#include "cpu/flash/keys.h"
#include "cpu/micro/pack.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int64_t kMaxPlaces = 64;

template <class E>
constexpr float kCodeCentre = 0.0f;  // what a loaded value lacks to the stored code
template <>
constexpr float kCodeCentre<Int4> = 8.0f;

template <class E>
struct PageKeys {
  using Element = E;
  static constexpr bool kPages = true, kCodes = kIsCode<E>;
  const E *k, *v;              // of the head
  const int64_t *k_at, *v_at;  // rows from there
  // Of the head, at code_at of each key; null: 1 and 0. each: they differ from key to key.
  const float *k_scale, *v_scale, *k_zero, *v_zero;
  const int64_t* code_at;
  bool each;

  AF_INLINE_MEMBER const E* k_row(int64_t j) const { return k + k_at[j]; }
  AF_INLINE_MEMBER const E* v_row(int64_t j) const { return v + v_at[j]; }
  AF_INLINE_MEMBER void skip(int64_t n) { k_at += n, v_at += n, code_at += n; }

  AF_INLINE_MEMBER float scale_of(const float* scales, int64_t j) const {
    return scales ? scales[code_at[j]] : 1.0f;
  }
  AF_INLINE_MEMBER float zero_of(const float* zeros, int64_t j) const {
    return zeros ? zeros[code_at[j]] - kCodeCentre<E> : 0.0f;
  }

  // Scores [key][kRows] of codes to those of keys; one scale per head is in Q already.
  AF_INLINE_MEMBER void decode_scores(int64_t n, const float* q_sum, float* s) const {
    if (!each && !k_zero) return;
    const Vec4 sums = load4(q_sum);
    for (int64_t c = 0; c < n; ++c, s += 4) {
      Vec4 x = load4(s);
      if (k_zero) x -= zero_of(k_zero, c) * sums;
      store4(s, each ? x * scale_of(k_scale, c) : x);
    }
  }
  // Weights [key][kRows] of values to those of codes; z gathers what zeros add to a row. One scale
  // and zero per head are left to the finished row. A weight of 0 is one of a hidden key, perhaps.
  AF_INLINE_MEMBER void decode_weights(int64_t n, const float* alpha, float* z, float* s) const {
    if (!each) return;
    Vec4 sum = load4(z) * load4(alpha);
    for (int64_t c = 0; c < n; ++c, s += 4) {
      const Vec4 p = load4(s), hidden{};
      const Vec4 weight = p == 0.0f ? hidden : p * scale_of(v_scale, c);
      if (v_zero) sum += p == 0.0f ? hidden : weight * zero_of(v_zero, c);
      store4(s, weight);
    }
    store4(z, sum);
  }

  // A packed panel [dim][kNR] of codes, and a vector of row j.
  AF_INLINE_MEMBER void decode_panel(int64_t rows, int64_t dim, float* panel) const {
    if constexpr (kCodes) {
      float scale[kNR] = {}, zero[kNR] = {};
      for (int64_t j = 0; j < rows; ++j) {
        scale[j] = scale_of(k_scale, j) * kCodeUnit<E>, zero[j] = zero_of(k_zero, j);
      }
      for (int64_t c = 0; c < kNR; c += kLanes) {
        const VecF factor = load(scale + c), shift = load(zero + c);
        for (int64_t d = 0; d < dim; ++d) {
          float* x = panel + d * kNR + c;
          store(x, (load(x) - shift) * factor);
        }
      }
    }
  }
  AF_INLINE_MEMBER VecF decode_value(int64_t j, VecF x) const {
    if constexpr (!kCodes) return x;
    return (x - splat(zero_of(v_zero, j))) * splat(scale_of(v_scale, j) * kCodeUnit<E>);
  }
};

template <class E>
struct PageStore {
  using Element = E;
  using Keys = PageKeys<E>;
  struct Places {
    int64_t k[kMaxPlaces], v[kMaxPlaces], code[kMaxPlaces];
  };
  const PagePool& pool;

  AF_INLINE_MEMBER bool planes() const { return pool.k.head_stride > pool.k.seq_stride; }
  AF_INLINE_MEMBER bool each() const { return pool.code_page != 0 || pool.code_slot != 0; }
  AF_INLINE_MEMBER float key_scale(int64_t head) const {
    return (pool.k_scale && !each() ? pool.k_scale[head] : 1.0f) * kCodeUnit<E>;
  }
  AF_INLINE_MEMBER float value_scale(int64_t head) const {
    return (pool.v_scale && !each() ? pool.v_scale[head] : 1.0f) * kCodeUnit<E>;
  }
  AF_INLINE_MEMBER float value_zero(int64_t head) const {
    return pool.v_zero && !each() ? pool.v_zero[head] - kCodeCentre<E> : 0.0f;
  }

  // n <= kMaxPlaces keys within the table.
  AF_INLINE_MEMBER void locate(const Sequence& seq, int64_t key0, int64_t n, Places& at) const {
    const int32_t* table = pool.table + seq.batch * pool.table_stride;
    int64_t entry = key0 / pool.page_size, slot = key0 % pool.page_size;
    for (int64_t j = 0; j < n; ++entry, slot = 0) {
      const int64_t page = max64(0, min64(table[entry], pool.pages - 1));
      const int64_t k0 = page * pool.k.batch_stride, v0 = page * pool.v.batch_stride;
      const int64_t end = min64(n, j + pool.page_size - slot);
      for (; j < end; ++j, ++slot) {
        at.k[j] = k0 + slot * pool.k.seq_stride;
        at.v[j] = v0 + slot * pool.v.seq_stride;
        if constexpr (kIsCode<E>) at.code[j] = page * pool.code_page + slot * pool.code_slot;
      }
    }
  }
  AF_INLINE_MEMBER Keys keys(const Sequence&, int64_t, int64_t head, const Places& at) const {
    auto of = [head](const float* x) { return x ? x + head : nullptr; };
    return {static_cast<const E*>(pool.k.data) + head * pool.k.head_stride,
            static_cast<const E*>(pool.v.data) + head * pool.v.head_stride,
            at.k,
            at.v,
            of(pool.k_scale),
            of(pool.v_scale),
            of(pool.k_zero),
            of(pool.v_zero),
            at.code,
            each()};
  }
  AF_INLINE_MEMBER RowsAhead<E> k_rows(const Keys& keys, int64_t heads, int64_t dim) const {
    return {keys.k, keys.k_at, pool.k.seq_stride, pool.k.head_stride, dim, heads};
  }
  AF_INLINE_MEMBER RowsAhead<E> v_rows(const Keys& keys, int64_t heads, int64_t dim) const {
    return {keys.v, keys.v_at, pool.v.seq_stride, pool.v.head_stride, dim, heads};
  }
};

// Calls f with a value of the page's element type.
template <class F>
AF_INLINE void dispatch_pages(PageType type, const F& f) {
  switch (type) {
    case PageType::kFloat32:
      return f(float{});
    case PageType::kFloat16:
      return f(Half{});
    case PageType::kBFloat16:
      return f(BFloat16{});
    case PageType::kFp8:
      return f(E4M3{});
    case PageType::kInt8:
      return f(Int8{});
    case PageType::kInt4:
      return f(Int4{});
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
