// Many query rows over a cache in pages: the tiles of flash/fwd_tiles.h, K and V packed through a
// page table.
#include "cpu/flash/fwd_tiles.h"
#include "cpu/paged/operands.h"
#include "cpu/tile_kernels.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_HERE
}

namespace attnforge::cpu::ATTNFORGE_ISA {

int64_t paged_prefill_workspace(const PagedFwdParams& params, int64_t num_threads) {
  AF_LEAVE_UNLESS(served_by_tiles(params), paged_prefill_workspace(params, num_threads));
  return fwd_workspace(params.flash, num_threads);
}

void paged_prefill(const PagedFwdParams& params, const Workers& workers) {
  AF_LEAVE_UNLESS(served_by_tiles(params), paged_prefill(params, workers));
  dispatch_operands(params.pool.type, [&](auto element) {
    run_fwd(params.flash, PageStore<decltype(element)>{params.pool}, workers);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
