// Loads, stores and atomics on shared and global memory.
//
// Shared addresses are bytes in the block's window and must be a multiple of the access's size.
// Global memory may also be read through plain pointers; these functions add cache hints and order.
#pragma once

#include "cuda/ptx/platform.h"

namespace attnforge::ptx {

// First byte of the launch's dynamic shared memory, 1024-byte aligned (what a 128-byte swizzle
// needs).
AF_DEVICE uint32_t dynamic_shared_memory() {
#if AF_EMULATE
  return emulate::dynamic_shared_memory();
#else
  extern __shared__ __align__(1024) unsigned char attnforge_dynamic_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(attnforge_dynamic_shared));
#endif
}

// ld.shared: T is trivially copyable and has 2, 4, 8 or 16 bytes.
template <typename T>
AF_DEVICE T load_shared(uint32_t address AF_SITE) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
#if AF_EMULATE
  emulate::load_shared(&value, address, sizeof(T), site);
#else
  if constexpr (sizeof(T) == 2) {
    uint16_t raw;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(raw) : "r"(address) : "memory");
    memcpy(&value, &raw, sizeof(T));
  } else if constexpr (sizeof(T) == 4) {
    uint32_t raw;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(raw) : "r"(address) : "memory");
    memcpy(&value, &raw, sizeof(T));
  } else if constexpr (sizeof(T) == 8) {
    U32x2 raw;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(raw.v[0]), "=r"(raw.v[1])
                 : "r"(address)
                 : "memory");
    memcpy(&value, &raw, sizeof(T));
  } else {
    U32x4 raw;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.v[0]), "=r"(raw.v[1]), "=r"(raw.v[2]), "=r"(raw.v[3])
                 : "r"(address)
                 : "memory");
    memcpy(&value, &raw, sizeof(T));
  }
#endif
  return value;
}

// st.shared: T as for load_shared.
template <typename T>
AF_DEVICE void store_shared(uint32_t address, const T& value AF_SITE) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
#if AF_EMULATE
  emulate::store_shared(address, &value, sizeof(T), site);
#else
  if constexpr (sizeof(T) == 2) {
    uint16_t raw;
    memcpy(&raw, &value, sizeof(T));
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(raw) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    uint32_t raw;
    memcpy(&raw, &value, sizeof(T));
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(raw) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    U32x2 raw;
    memcpy(&raw, &value, sizeof(T));
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(raw.v[0]), "r"(raw.v[1])
                 : "memory");
  } else {
    U32x4 raw;
    memcpy(&raw, &value, sizeof(T));
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(raw.v[0]),
                 "r"(raw.v[1]), "r"(raw.v[2]), "r"(raw.v[3])
                 : "memory");
  }
#endif
}

// red.shared.add.f32
AF_DEVICE void add_shared(uint32_t address, float value AF_SITE) {
#if AF_EMULATE
  emulate::add_shared(address, value, site);
#else
  asm volatile("red.shared.add.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
#endif
}

// atom.shared.add.u32: the value before the addition.
AF_DEVICE uint32_t fetch_add_shared(uint32_t address, uint32_t value AF_SITE) {
#if AF_EMULATE
  return emulate::fetch_add_shared(address, value, site);
#else
  uint32_t old;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "r"(address), "r"(value)
               : "memory");
  return old;
#endif
}

// atom.shared.or.b32: the bits before.
AF_DEVICE uint32_t fetch_or_shared(uint32_t address, uint32_t bits AF_SITE) {
#if AF_EMULATE
  return emulate::fetch_or_shared(address, bits, site);
#else
  uint32_t old;
  asm volatile("atom.shared.or.b32 %0, [%1], %2;" : "=r"(old) : "r"(address), "r"(bits) : "memory");
  return old;
#endif
}

// ld.global.v4, read once: does not stay in L1.
AF_DEVICE U32x4 load_global_16_streaming(const void* address) {
  U32x4 raw;
#if AF_EMULATE
  raw = *static_cast<const U32x4*>(address);
#else
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.v[0]), "=r"(raw.v[1]), "=r"(raw.v[2]), "=r"(raw.v[3])
               : "l"(address)
               : "memory");
#endif
  return raw;
}

// ld.global.nc.v4: memory that no thread writes while the kernel runs.
AF_DEVICE U32x4 load_global_16_constant(const void* address) {
  U32x4 raw;
#if AF_EMULATE
  raw = *static_cast<const U32x4*>(address);
#else
  asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(raw.v[0]), "=r"(raw.v[1]), "=r"(raw.v[2]), "=r"(raw.v[3])
      : "l"(address));
#endif
  return raw;
}

// st.global.v4
AF_DEVICE void store_global_16(void* address, const U32x4& value) {
#if AF_EMULATE
  *static_cast<U32x4*>(address) = value;
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.v[0]),
               "r"(value.v[1]), "r"(value.v[2]), "r"(value.v[3])
               : "memory");
#endif
}

// st.global.cs.v4: written once, evicted first.
AF_DEVICE void store_global_16_streaming(void* address, const U32x4& value) {
#if AF_EMULATE
  *static_cast<U32x4*>(address) = value;
#else
  asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.v[0]),
               "r"(value.v[1]), "r"(value.v[2]), "r"(value.v[3])
               : "memory");
#endif
}

// prefetch.global.L2: a hint, without effect on values.
AF_DEVICE void prefetch_l2(const void* address) {
#if AF_EMULATE
  (void)address;
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// red.relaxed.gpu.global.add.f32: the order of additions, and so the last bits, is not fixed.
AF_DEVICE void add_global(float* address, float value AF_SITE) {
#if AF_EMULATE
  emulate::add_global(address, value, site);
#else
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
#endif
}

// atom.acq_rel.gpu.global.add.u32: the value before the addition.
AF_DEVICE uint32_t fetch_add_global(uint32_t* address, uint32_t value AF_SITE) {
#if AF_EMULATE
  return emulate::fetch_add_global(address, value, site);
#else
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(address), "r"(value)
               : "memory");
  return old;
#endif
}

// ld.acquire.gpu.global.b32: pairs with store_release_global and fetch_add_global of other blocks.
AF_DEVICE uint32_t load_acquire_global(const uint32_t* address AF_SITE) {
#if AF_EMULATE
  return emulate::load_acquire_global(address, site);
#else
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
#endif
}

// st.release.gpu.global.b32
AF_DEVICE void store_release_global(uint32_t* address, uint32_t value AF_SITE) {
#if AF_EMULATE
  emulate::store_release_global(address, value, site);
#else
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
#endif
}

}  // namespace attnforge::ptx
