// Many query rows over a cache in pages: the tiles of flash/fwd_tiles.h, K and V packed through a
// page table.
#include "cpu/flash/fwd_tiles.h"
#include "cpu/kernels.h"
#include "cpu/paged/pages.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {

int64_t paged_prefill_workspace(const PagedFwdParams& params, int64_t num_threads) {
  return fwd_workspace(params.flash, num_threads);
}

void paged_prefill(const PagedFwdParams& params, const Workers& workers) {
  dispatch_pages(params.pool.type, [&](auto element) {
    run_fwd(params.flash, PageStore<decltype(element)>{params.pool}, workers);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
