// Keys that share at least min_hits buckets with a query, and how likely that was: lsh_hits.h. A
// task is one query head.
#include "cpu/kernels.h"
#include "cpu/retrieval/lsh_hits.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {

int64_t lsh_retrieve_workspace(const LshRetrieveParams& params, int64_t num_threads) {
  return round_up(params.tables.segment, 64) * num_threads;
}

void lsh_retrieve(const LshRetrieveParams& params, const Workers& workers) {
  const FlashProblem& p = params.problem;
  const int64_t bytes = round_up(params.tables.segment, 64);
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_tasks(workers, p.batch * p.heads_q, [&](int64_t task, int64_t worker) {
      const int64_t batch = task / p.heads_q, head = task % p.heads_q;
      auto* counts = static_cast<uint8_t*>(params.workspace) + worker * bytes;
      int32_t* ids = params.ids + task * params.slots;
      float* log_bias = params.log_bias + task * params.slots;
      const int64_t n = find_hits(params, batch, head, counts, ids, params.slots);
      HashedQuery query;
      take_query<T>(params, batch, head, query);
      for_products<T>(params, batch, head / group_size(p), query, ids, n,
                      [&](int64_t i, int64_t m, VecF dots) {
                        float bias[kLanes];
                        store(bias, weigh_hits(params, query, ids + i, m, dots));
                        for (int64_t j = 0; j < m; ++j) log_bias[i + j] = bias[j];
                      });
      params.lens[task] = static_cast<int32_t>(n);
    });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
