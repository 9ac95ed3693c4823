// Chosen columns as the runs of ids that they stand for: the keys of clusters, or of pages.
//
// A row is one task and writes its ids once, in vectors: 4 bytes per id.
#include "cpu/kernels.h"
#include "cpu/micro/gemm.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

// begin .. end - 1 to ids[at ..]; returns the place behind them. What finds no room is left out.
AF_INLINE int64_t write_run(int32_t* ids, int64_t at, int64_t slots, int64_t begin, int64_t end) {
  end = min64(end, begin + slots - at);
  if (begin >= end) return at;
  VecI next;
  for (int i = 0; i < kLanes; ++i) next[i] = static_cast<int32_t>(begin) + i;
  int64_t id = begin;
  for (; id + kLanes <= end; id += kLanes, at += kLanes, next += kLanes) store_raw(ids + at, next);
  for (; id < end; ++id) ids[at++] = static_cast<int32_t>(id);
  return at;
}

}  // namespace

void expand_runs(const ExpandRunsParams& params, const Workers& workers) {
  parallel_tasks(workers, params.rows, [&](int64_t row, int64_t) {
    const int32_t* columns = params.columns + row * params.most;
    const int32_t* starts = params.starts + row / params.share * (params.runs + 1);
    const int64_t count =
        params.lens ? max64(0, min64(params.lens[row], params.most)) : params.most;
    int32_t* ids = params.ids + row * params.slots;
    int64_t at = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = columns[i];
      if (c < 0 || c >= params.runs) continue;
      at = write_run(ids, at, params.slots, starts[c], starts[c + 1]);
    }
    at = write_run(ids, at, params.slots, params.tail_begin, params.tail_end);
    params.sizes[row] = static_cast<int32_t>(at);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
