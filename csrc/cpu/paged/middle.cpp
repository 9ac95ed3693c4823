// Some query rows over a cache in pages: the tiles of flash/split_tiles.h, through a page table.
#include "cpu/flash/split_tiles.h"
#include "cpu/paged/operands.h"
#include "cpu/tile_kernels.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_HERE
}

namespace attnforge::cpu::ATTNFORGE_ISA {

int64_t paged_middle_workspace(const PagedFwdParams& params, int64_t num_threads) {
  AF_LEAVE_UNLESS(served_by_tiles(params), paged_middle_workspace(params, num_threads));
  return split_tiles_workspace(params.flash, num_threads);
}

void paged_middle(const PagedFwdParams& params, const Workers& workers) {
  AF_LEAVE_UNLESS(served_by_tiles(params), paged_middle(params, workers));
  dispatch_operands(params.pool.type, [&](auto element) {
    run_split_tiles(params.flash, PageStore<decltype(element)>{params.pool}, workers);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
