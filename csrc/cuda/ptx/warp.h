// Exchange between the 32 lanes of a warp. Lane = threadIdx.x % 32 in one-dimensional blocks.
//
// None of these orders memory: where lanes pass data through shared memory, sync_warp stands
// between.
#pragma once

#include "cuda/ptx/platform.h"

namespace attnforge::ptx {

AF_DEVICE uint32_t lane_id() {
#if AF_EMULATE
  return emulate::lane_id();
#else
  uint32_t lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
#endif
}

// shfl.sync.bfly.b32: the value of lane `lane ^ flip`. T has 4 bytes.
template <typename T>
AF_DEVICE T shuffle_xor(T value, uint32_t flip, uint32_t mask = kFullWarp AF_SITE) {
  static_assert(sizeof(T) == 4);
#if AF_EMULATE
  emulate::shuffle(emulate::Shuffle::kXor, &value, flip, mask, site);
  return value;
#else
  return __shfl_xor_sync(mask, value, static_cast<int>(flip));
#endif
}

// shfl.sync.idx.b32: the value of lane `source` (modulo 32).
template <typename T>
AF_DEVICE T shuffle_from(T value, uint32_t source, uint32_t mask = kFullWarp AF_SITE) {
  static_assert(sizeof(T) == 4);
#if AF_EMULATE
  emulate::shuffle(emulate::Shuffle::kFrom, &value, source, mask, site);
  return value;
#else
  return __shfl_sync(mask, value, static_cast<int>(source));
#endif
}

// shfl.sync.up.b32: the value of lane `lane - delta`; the first `delta` lanes keep their own.
template <typename T>
AF_DEVICE T shuffle_up(T value, uint32_t delta, uint32_t mask = kFullWarp AF_SITE) {
  static_assert(sizeof(T) == 4);
#if AF_EMULATE
  emulate::shuffle(emulate::Shuffle::kUp, &value, delta, mask, site);
  return value;
#else
  return __shfl_up_sync(mask, value, delta);
#endif
}

// shfl.sync.down.b32: the value of lane `lane + delta`; the last `delta` lanes keep their own.
template <typename T>
AF_DEVICE T shuffle_down(T value, uint32_t delta, uint32_t mask = kFullWarp AF_SITE) {
  static_assert(sizeof(T) == 4);
#if AF_EMULATE
  emulate::shuffle(emulate::Shuffle::kDown, &value, delta, mask, site);
  return value;
#else
  return __shfl_down_sync(mask, value, delta);
#endif
}

// vote.sync.ballot.b32: bit i is lane i's predicate.
AF_DEVICE uint32_t ballot(bool predicate, uint32_t mask = kFullWarp AF_SITE) {
#if AF_EMULATE
  return emulate::ballot(predicate, mask, site);
#else
  return __ballot_sync(mask, predicate);
#endif
}

// vote.sync.any.pred
AF_DEVICE bool any(bool predicate, uint32_t mask = kFullWarp AF_SITE) {
#if AF_EMULATE
  return emulate::ballot(predicate, mask, site) != 0;
#else
  return __any_sync(mask, predicate);
#endif
}

// vote.sync.all.pred
AF_DEVICE bool all(bool predicate, uint32_t mask = kFullWarp AF_SITE) {
#if AF_EMULATE
  return emulate::ballot(predicate, mask, site) == mask;
#else
  return __all_sync(mask, predicate);
#endif
}

// elect.sync (sm_90): true in exactly one lane of a full warp. Which one is not specified.
AF_DEVICE bool elect_one(AF_ONLY_SITE) {
#if AF_EMULATE
  return emulate::elect_one(site);
#else
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
#endif
}

}  // namespace attnforge::ptx
