// TMA (sm_90): bulk copies between global and shared memory, by one thread, through the async
// proxy.
//
// Loads complete on an mbarrier, by their bytes: a whole box counts, also where it hangs over the
// tensor. Stores and reductions complete in bulk groups of the issuing thread. Boxes are 128-byte
// aligned in shared memory, or to the swizzle's period (1024, 512, 256) where they are read by
// wgmma.
//
// The async proxy does not see what st.shared wrote until fence_proxy_async has stood between: by
// the writers before the barrier, or by the issuer after it.
#pragma once

#include "cuda/ptx/platform.h"
#include "cuda/tensor_map.h"

namespace attnforge::ptx {

// fence.proxy.async.shared::cta
AF_DEVICE void fence_proxy_async(AF_ONLY_SITE) {
#if AF_EMULATE
  emulate::fence_proxy_async(site);
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// prefetch.tensormap: a hint.
AF_DEVICE void prefetch_tensor_map(const cuda::TensorMap* map) {
#if AF_EMULATE
  (void)map;
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier: the box at (x, y), x innermost.
AF_DEVICE void tma_load_2d(uint32_t shared, const cuda::TensorMap* map, uint32_t barrier, int32_t x,
                           int32_t y AF_SITE) {
#if AF_EMULATE
  const int32_t at[] = {x, y};
  emulate::tma_load(shared, map->opaque, barrier, at, 2, site);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
#endif
}

// cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier: the box at (x, y, z), x innermost.
AF_DEVICE void tma_load_3d(uint32_t shared, const cuda::TensorMap* map, uint32_t barrier, int32_t x,
                           int32_t y, int32_t z AF_SITE) {
#if AF_EMULATE
  const int32_t at[] = {x, y, z};
  emulate::tma_load(shared, map->opaque, barrier, at, 3, site);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
#endif
}

// cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier: the box at (x, y, z, w), x
// innermost.
AF_DEVICE void tma_load_4d(uint32_t shared, const cuda::TensorMap* map, uint32_t barrier, int32_t x,
                           int32_t y, int32_t z, int32_t w AF_SITE) {
#if AF_EMULATE
  const int32_t at[] = {x, y, z, w};
  emulate::tma_load(shared, map->opaque, barrier, at, 4, site);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
#endif
}

// cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier: the box at (x, y, z, w, v), x
// innermost.
AF_DEVICE void tma_load_5d(uint32_t shared, const cuda::TensorMap* map, uint32_t barrier, int32_t x,
                           int32_t y, int32_t z, int32_t w, int32_t v AF_SITE) {
#if AF_EMULATE
  const int32_t at[] = {x, y, z, w, v};
  emulate::tma_load(shared, map->opaque, barrier, at, 5, site);
#else
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v)
      : "memory");
#endif
}

// cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group
AF_DEVICE void tma_store_2d(const cuda::TensorMap* map, uint32_t shared, int32_t x,
                            int32_t y AF_SITE) {
#if AF_EMULATE
  const int32_t at[] = {x, y};
  emulate::tma_store(map->opaque, shared, at, 2, /*add=*/false, site);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], "
      "[%1];" ::"l"(map),
      "r"(shared), "r"(x), "r"(y)
      : "memory");
#endif
}

// cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group: fp32 tensors; the order of
// additions is not fixed.
AF_DEVICE void tma_add_2d(const cuda::TensorMap* map, uint32_t shared, int32_t x,
                          int32_t y AF_SITE) {
#if AF_EMULATE
  const int32_t at[] = {x, y};
  emulate::tma_store(map->opaque, shared, at, 2, /*add=*/true, site);
#else
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], "
      "[%1];" ::"l"(map),
      "r"(shared), "r"(x), "r"(y)
      : "memory");
#endif
}

// cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group
AF_DEVICE void tma_store_3d(const cuda::TensorMap* map, uint32_t shared, int32_t x, int32_t y,
                            int32_t z AF_SITE) {
#if AF_EMULATE
  const int32_t at[] = {x, y, z};
  emulate::tma_store(map->opaque, shared, at, 3, /*add=*/false, site);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], "
      "[%1];" ::"l"(map),
      "r"(shared), "r"(x), "r"(y), "r"(z)
      : "memory");
#endif
}

// cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group: fp32 tensors; the order of
// additions is not fixed.
AF_DEVICE void tma_add_3d(const cuda::TensorMap* map, uint32_t shared, int32_t x, int32_t y,
                          int32_t z AF_SITE) {
#if AF_EMULATE
  const int32_t at[] = {x, y, z};
  emulate::tma_store(map->opaque, shared, at, 3, /*add=*/true, site);
#else
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], "
      "[%1];" ::"l"(map),
      "r"(shared), "r"(x), "r"(y), "r"(z)
      : "memory");
#endif
}

// cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group
AF_DEVICE void tma_store_4d(const cuda::TensorMap* map, uint32_t shared, int32_t x, int32_t y,
                            int32_t z, int32_t w AF_SITE) {
#if AF_EMULATE
  const int32_t at[] = {x, y, z, w};
  emulate::tma_store(map->opaque, shared, at, 4, /*add=*/false, site);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], "
      "[%1];" ::"l"(map),
      "r"(shared), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
#endif
}

// cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group: fp32 tensors; the order of
// additions is not fixed.
AF_DEVICE void tma_add_4d(const cuda::TensorMap* map, uint32_t shared, int32_t x, int32_t y,
                          int32_t z, int32_t w AF_SITE) {
#if AF_EMULATE
  const int32_t at[] = {x, y, z, w};
  emulate::tma_store(map->opaque, shared, at, 4, /*add=*/true, site);
#else
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, "
      "%5}], "
      "[%1];" ::"l"(map),
      "r"(shared), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
#endif
}

// cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group
AF_DEVICE void tma_store_5d(const cuda::TensorMap* map, uint32_t shared, int32_t x, int32_t y,
                            int32_t z, int32_t w, int32_t v AF_SITE) {
#if AF_EMULATE
  const int32_t at[] = {x, y, z, w, v};
  emulate::tma_store(map->opaque, shared, at, 5, /*add=*/false, site);
#else
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], "
      "[%1];" ::"l"(map),
      "r"(shared), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v)
      : "memory");
#endif
}

// cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group: fp32 tensors; the order of
// additions is not fixed.
AF_DEVICE void tma_add_5d(const cuda::TensorMap* map, uint32_t shared, int32_t x, int32_t y,
                          int32_t z, int32_t w, int32_t v AF_SITE) {
#if AF_EMULATE
  const int32_t at[] = {x, y, z, w, v};
  emulate::tma_store(map->opaque, shared, at, 5, /*add=*/true, site);
#else
  asm volatile(
      "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5, "
      "%6}], "
      "[%1];" ::"l"(map),
      "r"(shared), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v)
      : "memory");
#endif
}

// cp.async.bulk.shared::cluster.global.mbarrier: `bytes` in a row, a multiple of 16 as are the
// addresses.
AF_DEVICE void bulk_load(uint32_t shared, const void* global, uint32_t bytes,
                         uint32_t barrier AF_SITE) {
#if AF_EMULATE
  emulate::bulk_load(shared, global, bytes, barrier, site);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// cp.async.bulk.commit_group: closes this thread's group of stores, which may be empty.
AF_DEVICE void bulk_commit(AF_ONLY_SITE) {
#if AF_EMULATE
  emulate::bulk_commit(site);
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// cp.async.bulk.wait_group.read: all but the newest `kPending` groups have read shared memory.
template <int kPending>
AF_DEVICE void bulk_wait_read(AF_ONLY_SITE) {
#if AF_EMULATE
  emulate::bulk_wait(kPending, site);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

// cp.async.bulk.wait_group: all but the newest `kPending` groups are complete, their writes
// visible.
template <int kPending>
AF_DEVICE void bulk_wait(AF_ONLY_SITE) {
#if AF_EMULATE
  emulate::bulk_wait(kPending, site);
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace attnforge::ptx
