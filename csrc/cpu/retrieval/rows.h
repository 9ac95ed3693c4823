// Query rows of a KV head as the scoring kernels number them.
#pragma once

#include "cpu/flash/problem.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int64_t kMostDim = 576;

struct Row {
  int64_t head, query;
};

// Row r of a KV head, head-major.
AF_INLINE Row row_of(const FlashProblem& p, int64_t kv_head, int64_t r) {
  return {kv_head * group_size(p) + r / p.seqlen_q, r % p.seqlen_q};
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
