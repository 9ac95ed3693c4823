// Forward over K and V in one piece: the tiles of fwd_tiles.h, on tensors with strides.
#include "cpu/flash/fwd_tiles.h"
#include "cpu/kernels.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {

int64_t flash_fwd_workspace(const FlashFwdParams& params, int64_t num_threads) {
  return fwd_workspace(params, num_threads);
}

void flash_fwd(const FlashFwdParams& params, const Workers& workers) {
  dispatch_input(params.problem.dtype, [&](auto element) {
    run_fwd(params, DenseStore<decltype(element)>{params.k, params.v}, workers);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
