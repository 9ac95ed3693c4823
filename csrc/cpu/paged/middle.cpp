// Some query rows over a cache in pages: the tiles of flash/split_tiles.h, through a page table.
#include "cpu/flash/split_tiles.h"
#include "cpu/kernels.h"
#include "cpu/paged/pages.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {

int64_t paged_middle_workspace(const PagedFwdParams& params, int64_t num_threads) {
  return split_tiles_workspace(params.flash, num_threads);
}

void paged_middle(const PagedFwdParams& params, const Workers& workers) {
  dispatch_pages(params.pool.type, [&](auto element) {
    run_split_tiles(params.flash, PageStore<decltype(element)>{params.pool}, workers);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
