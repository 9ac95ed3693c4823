// What is added to a row of scores, and which of its columns are hidden: the mods of one query.
//
// Column c of a row is key key0 + c. Rows are n columns long, a multiple of kLanes; columns at or
// past the keys of the sequence are padding, for which nothing is read.
#pragma once

#include "cpu/micro/softmax.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// The mods of one query of one head, as pointers to the first key of its sequence; null: unused.
struct RowMods {
  int64_t keys;  // of the sequence
  float unit;    // of scores: what biases are multiplied by
  const float* key_bias;
  const void* bias;
  DType bias_dtype;
  const float* rel_bias;  // [2 rel_radius + 1]
  int64_t rel_radius, position;
  const double* decay;
  double decay_here;
  const int32_t* segments;
  int32_t segment;
  const uint8_t* mask;  // of keys from mask_first on, which may be negative
  int64_t mask_first;
};

template <class T>
AF_INLINE void add_bias(const T* bias, float unit, float* s, int64_t n) {
  for (int64_t c = 0; c < n; c += kLanes) {
    store(s + c, fma(splat(unit), load_partial(bias + c, n - c), load(s + c)));
  }
}

// first: the table's index of column 0, before it is clamped.
AF_INLINE void add_rel_bias(const float* table, int64_t radius, int64_t first, float unit, float* s,
                            int64_t n) {
  const int64_t end = 2 * radius;
  for (int64_t c = 0; c < n; c += kLanes, first += kLanes) {
    VecF x;
    if (first + kLanes - 1 <= 0) {
      x = splat(table[0]);
    } else if (first >= end) {
      x = splat(table[end]);
    } else if (first >= 0 && first + kLanes - 1 <= end) {
      x = load(table + first);
    } else {
      float lanes[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) lanes[i] = table[max64(0, min64(end, first + i))];
      x = load(lanes);
    }
    store(s + c, fma(splat(unit), x, load(s + c)));
  }
}

// Differences of far cumulative sums are taken in fp64: their error is relative to the difference.
AF_INLINE void add_decay(double here, const double* decay, float unit, float* s, int64_t n) {
  typedef double Double4 __attribute__((vector_size(32)));
  int64_t c = 0;
  for (; c + 4 <= n; c += 4) {
    Vec4 gap = __builtin_convertvector(here - load_raw<Double4>(decay + c), Vec4);
    store4(s + c, load4(s + c) + gap * unit);
  }
  for (; c < n; ++c) s[c] += static_cast<float>(here - decay[c]) * unit;
}

AF_INLINE void add_biases(const RowMods& row, float* s, int64_t n, int64_t key0) {
  n = min64(n, row.keys - key0);
  if (row.decay) add_decay(row.decay_here, row.decay + key0, row.unit, s, n);
  if (row.key_bias) add_bias(row.key_bias + key0, row.unit, s, n);
  if (row.bias && row.bias_dtype == DType::kFloat32) {
    add_bias(static_cast<const float*>(row.bias) + key0, row.unit, s, n);
  } else if (row.bias && row.bias_dtype == DType::kBFloat16) {
    add_bias(static_cast<const BFloat16*>(row.bias) + key0, row.unit, s, n);
  } else if (row.bias) {
    add_bias(static_cast<const Half*>(row.bias) + key0, row.unit, s, n);
  }
  if (row.rel_bias) {
    add_rel_bias(row.rel_bias, row.rel_radius, key0 - row.position + row.rel_radius, row.unit, s,
                 n);
  }
}

typedef uint8_t VecB __attribute__((vector_size(kLanes)));

// Columns that segments or the mask hide become `value`, as mask_row has it.
AF_INLINE void hide_columns(const RowMods& row, float* s, int64_t n, int64_t key0, float value) {
  n = min64(n, row.keys - key0);
  const VecF outside = splat(value);
  for (int64_t c = 0; c < n && row.segments; c += kLanes) {
    int32_t lanes[kLanes] = {};
    const int32_t* ids = row.segments + key0 + c;
    if (n - c < kLanes) {
      for (int64_t i = 0; i < n - c; ++i) lanes[i] = ids[i];
      ids = lanes;
    }
    store(s + c, load_raw<VecI>(ids) == splat_int(row.segment) ? load(s + c) : outside);
  }
  // Keys before the mask are seen.
  int64_t c = row.mask ? max64(0, row.mask_first - key0) / kLanes * kLanes : n;
  for (; c < n; c += kLanes) {
    uint8_t lanes[kLanes] = {};
    const int64_t first = key0 + c - row.mask_first;
    const uint8_t* seen = row.mask + first;
    if (first < 0 || n - c < kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        lanes[i] = i >= n - c || first + i < 0 || row.mask[first + i];
      }
      seen = lanes;
    }
    VecI keep = __builtin_convertvector(load_raw<VecB>(seen), VecI) != splat_int(0);
    store(s + c, keep ? load(s + c) : outside);
  }
}

AF_INLINE bool hides(const FlashMods& m) {
  return m.mask || m.segments_q;
}

// Whether the row sees one key of its interval.
AF_INLINE bool sees(const RowMods& row, int64_t key) {
  if (row.segments && row.segments[key] != row.segment) return false;
  return !row.mask || key < row.mask_first || row.mask[key - row.mask_first];
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
