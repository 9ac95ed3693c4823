// The levels of matrix tiles (micro/tiles.h): few kernels of their own, the rest of the level
// below.
#pragma once

#include "cpu/kernels.h"

// As CMakeLists.txt compiles them: X(name, params struct).
#define ATTNFORGE_TILE_KERNELS(X)           \
  X(flash_fwd, FlashFwdParams)              \
  X(block_sparse_fwd, BlockSparseFwdParams) \
  X(paged_middle, PagedFwdParams)           \
  X(paged_prefill, PagedFwdParams)          \
  X(indexed_fwd, IndexedFwdParams)          \
  X(page_scores, PageScoresParams)

// Declares what such a level defines; what it lacks is found in the level below.
#define ATTNFORGE_DECLARE_TILES(ISA, BELOW)       \
  namespace ISA {                                 \
  using namespace BELOW;                          \
  ATTNFORGE_TILE_KERNELS(ATTNFORGE_DECLARE_SIZED) \
  }

// What the file of such a kernel sees: its own level, and with tiles the one below. AF_LEAVE_UNLESS
// is the first statement of an entry point: what tiles do not serve is the level below's.
#ifdef ATTNFORGE_BELOW
#define ATTNFORGE_DECLARE_HERE           \
  ATTNFORGE_DECLARE_ISA(ATTNFORGE_BELOW) \
  ATTNFORGE_DECLARE_TILES(ATTNFORGE_ISA, ATTNFORGE_BELOW)
#define AF_LEAVE_UNLESS(SERVED, CALL) \
  if (!(SERVED)) return ATTNFORGE_BELOW::CALL
#else
#define ATTNFORGE_DECLARE_HERE ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
#define AF_LEAVE_UNLESS(SERVED, CALL) static_assert(true)
#endif
