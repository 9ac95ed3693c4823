// Decode over a cache in one piece: the tasks of decode_tasks.h, on tensors with strides.
#include "cpu/flash/decode_tasks.h"
#include "cpu/kernels.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {

int64_t flash_decode_workspace(const FlashFwdParams& params, int64_t num_threads) {
  int64_t bytes = 0;
  dispatch_input(params.problem.dtype, [&](auto element) {
    bytes =
        decode_workspace(params, DenseStore<decltype(element)>{params.k, params.v}, num_threads);
  });
  return bytes;
}

void flash_decode(const FlashFwdParams& params, const Workers& workers) {
  dispatch_input(params.problem.dtype, [&](auto element) {
    run_decode(params, DenseStore<decltype(element)>{params.k, params.v}, workers);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
