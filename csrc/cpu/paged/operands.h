// What tiles of rows over pages are made of: flash/operands.h, by the type of the pages.
#pragma once

#include "cpu/flash/operands.h"
#include "cpu/paged/pages.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

#ifdef ATTNFORGE_BELOW
AF_INLINE bool served_by_tiles(const PagedFwdParams& params) {
  return params.pool.type == PageType::kBFloat16 && served_by_tiles(params.flash);
}
template <class F>
AF_INLINE void dispatch_operands(PageType, const F& f) {
  f(BFloat16{});
}
#else
template <class F>
AF_INLINE void dispatch_operands(PageType type, const F& f) {
  dispatch_pages(type, f);
}
#endif

}  // namespace attnforge::cpu::ATTNFORGE_ISA
