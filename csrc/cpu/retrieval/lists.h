// Lists of keys as kernels walk them: entries that name a key in use. Lists are data: every id is
// checked.
#pragma once

#include "attnforge/retrieval.h"
#include "cpu/flash/problem.h"
#include "cpu/micro/softmax.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// The list of one head of ids: which depends on how many heads there are.
struct List {
  const int32_t* ids;
  const float* log_bias;  // null: 0
  int64_t entries;
};

AF_INLINE List list_of(const KeyLists& lists, int64_t batch, int64_t head) {
  const int64_t at = batch * lists.heads + head;
  const int64_t entries = lists.lens ? max64(0, min64(lists.lens[at], lists.slots)) : lists.slots;
  return {lists.ids + at * lists.stride,
          lists.log_bias ? lists.log_bias + at * lists.stride : nullptr, entries};
}

// Calls f(entry, key, log_bias) for each entry that is seen, in the order of the list.
template <class F>
AF_INLINE void for_entries(const List& list, int64_t keys, const F& f) {
  for (int64_t n = 0; n < list.entries; ++n) {
    const int64_t key = list.ids[n];
    const float bias = list.log_bias ? list.log_bias[n] : 0.0f;
    if (key >= 0 && key < keys && bias != -kInf) f(n, key, bias);
  }
}

// Whether query heads of a group have lists of their own, which are gathered as one.
AF_INLINE bool wants_union(const FlashProblem& p, const KeyLists& lists) {
  return lists.heads == p.heads_q && p.heads_q > p.heads_k;
}

// The list head of KV head `kv_head`, whose query heads share it.
AF_INLINE int64_t shared_list(const FlashProblem& p, const KeyLists& lists, int64_t kv_head) {
  return lists.heads == 1 ? 0 : kv_head * lists.heads / p.heads_k;
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
