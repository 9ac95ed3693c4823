// What a KV head gathers: the keys of its list, or the union of the lists of its query heads.
#pragma once

#include "cpu/retrieval/lists.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// What one KV head gathers. bias is in base-2 units: one per key, or in a union one per key and
// head of the group, -inf where a head does not list the key.
struct Gathered {
  int64_t* count;
  int32_t* keys;
  float* bias;
  uint64_t* order;  // scratch of a union: key and entry of each list, ascending
};

// Ascending order of n numbers, in place: a heap, as lists hardly ever come out of order.
AF_INLINE void heap_sort(uint64_t* x, int64_t n) {
  auto sift = [x](int64_t root, int64_t end) __attribute__((always_inline)) {
    const uint64_t value = x[root];
    for (int64_t child = 2 * root + 1; child < end; child = 2 * root + 1) {
      if (child + 1 < end && x[child + 1] > x[child]) ++child;
      if (x[child] <= value) break;
      x[root] = x[child];
      root = child;
    }
    x[root] = value;
  };
  for (int64_t root = n / 2 - 1; root >= 0; --root) sift(root, n);
  for (int64_t end = n - 1; end > 0; --end) {
    const uint64_t top = x[0];
    x[0] = x[end];
    x[end] = top;
    sift(0, end);
  }
}

// Merges the lists of the query heads [head0, head0 + group). A key that a list has twice stands
// twice in the union, for that head alone the second time.
[[gnu::noinline]] static int64_t unite(const KeyLists& lists, int64_t batch, int64_t head0,
                                       int64_t group, int64_t keys, const Gathered& g) {
  constexpr int64_t kMost = 64;  // heads merged by looking at each: the bindings ask for no more
  int64_t next[kMost], end[kMost];
  for (int64_t h = 0; h < group; ++h) {
    uint64_t* own = g.order + h * lists.slots;
    int64_t n = 0;
    bool rising = true;
    for_entries(list_of(lists, batch, head0 + h), keys, [&](int64_t entry, int64_t key, float) {
      own[n] = static_cast<uint64_t>(key) << 32 | static_cast<uint64_t>(entry);
      rising &= n == 0 || own[n] > own[n - 1];
      ++n;
    });
    if (!rising) heap_sort(own, n);
    next[h] = h * lists.slots, end[h] = next[h] + n;
  }
  int64_t count = 0;
  for (;;) {
    constexpr uint64_t kNone = ~uint64_t{0};
    uint64_t least = kNone;
    for (int64_t h = 0; h < group; ++h) {
      if (next[h] < end[h] && g.order[next[h]] >> 32 < least) least = g.order[next[h]] >> 32;
    }
    if (least == kNone) return count;
    float* bias = g.bias + count * group;
    for (int64_t h = 0; h < group; ++h) {
      bias[h] = -kInf;
      if (next[h] == end[h] || g.order[next[h]] >> 32 != least) continue;
      const List list = list_of(lists, batch, head0 + h);
      const int64_t entry = g.order[next[h]++] & 0xffffffffu;
      bias[h] = list.log_bias ? list.log_bias[entry] * kLog2E : 0.0f;
    }
    g.keys[count++] = static_cast<int32_t>(least);
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
