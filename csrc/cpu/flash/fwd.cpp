// Forward over K and V in one piece: the tiles of fwd_tiles.h, on tensors with strides.
#include "cpu/flash/fwd_tiles.h"
#include "cpu/tile_kernels.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_HERE
}

namespace attnforge::cpu::ATTNFORGE_ISA {

int64_t flash_fwd_workspace(const FlashFwdParams& params, int64_t num_threads) {
  AF_LEAVE_UNLESS(served_by_tiles(params), flash_fwd_workspace(params, num_threads));
  return fwd_workspace(params, num_threads);
}

void flash_fwd(const FlashFwdParams& params, const Workers& workers) {
  AF_LEAVE_UNLESS(served_by_tiles(params), flash_fwd(params, workers));
  dispatch_operands(params.problem.dtype, [&](auto element) {
    run_fwd(params, DenseStore<decltype(element)>{params.k, params.v}, workers);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
