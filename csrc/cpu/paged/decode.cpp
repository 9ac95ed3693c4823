// Decode over a cache in pages: the tasks of flash/decode_tasks.h, through a page table.
#include "cpu/flash/decode_tasks.h"
#include "cpu/kernels.h"
#include "cpu/paged/pages.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {

int64_t paged_decode_workspace(const PagedFwdParams& params, int64_t num_threads) {
  int64_t bytes = 0;
  dispatch_pages(params.pool.type, [&](auto element) {
    bytes = decode_workspace(params.flash, PageStore<decltype(element)>{params.pool}, num_threads);
  });
  return bytes;
}

void paged_decode(const PagedFwdParams& params, const Workers& workers) {
  dispatch_pages(params.pool.type, [&](auto element) {
    run_decode(params.flash, PageStore<decltype(element)>{params.pool}, workers);
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
