// wgmma (sm_90a): D = A B + D by a warpgroup, 128 threads, m64nNk16 (16 bit) or m64nNk32 (e4m3).
//
// D is in registers: thread i of the group, with warp w = i / 32 and lane l = i % 32, holds
//
//   d[4 j + 0..1]: row 16 w + l / 4,      columns 8 j + 2 (l % 4) + 0..1
//   d[4 j + 2..3]: row 16 w + l / 4 + 8,  the same columns                       for j in 0..N/8-1.
//
// A is in shared memory, or in registers: four of them, as A of mma.h in each warp's 16 rows. B is
// in shared memory. What is in shared memory is named by a descriptor (wgmma_descriptor):
//
//   K-major (B as [N, K], k contiguous)   rows in groups of 8, `stride` bytes from group to group;
//   a row of a
//       group is 16, 32, 64 or 128 bytes from the next, as wide as the swizzle. Without swizzle the
//       second 16 bytes of a row's 32 are `leading` bytes from the first.
//   MN-major (B as [K, N], n contiguous; 16 bit only)   n runs over 32, 64 or 128 bytes, as wide as
//   the
//       swizzle, and goes on `leading` bytes further; the next k is one such width further, and
//       k = 8..15 are `stride` bytes from k = 0..7. Without swizzle n runs over 16 bytes, goes on
//       `stride` bytes further, and k = 8..15 are `leading` bytes from k = 0..7.
//
// The swizzle xors address bits as in tensor_map.h, so a tile that TMA loaded with the same swizzle
// is read as it lies. A tile starts at a multiple of the swizzle's period; advancing inside a
// swizzled row, to the next k of a K-major tile, adds the plain byte offset.
//
// It is asynchronous. wgmma_fence comes first, once per batch and after every access to registers
// that are operands; then products, wgmma_commit, wgmma_wait. Between issue and wait nobody may
// touch the registers of D and A, nor write the shared memory. Arrays of registers must be the same
// objects from issue to wait: pass them by reference, not through a returned struct.
#pragma once

#include "cuda/ptx/platform.h"
#include "cuda/ptx/wgmma_operands.h"

namespace attnforge::ptx {

enum class MatrixSwizzle : uint32_t { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

// Offsets are bytes, multiples of 16 below 2^18.
AF_DEVICE constexpr uint64_t wgmma_descriptor(uint32_t shared, uint32_t leading, uint32_t stride,
                                              MatrixSwizzle swizzle) {
  return uint64_t{(shared & 0x3ffff) >> 4} | uint64_t{(leading & 0x3ffff) >> 4} << 16 |
         uint64_t{(stride & 0x3ffff) >> 4} << 32 | uint64_t{static_cast<uint32_t>(swizzle)} << 62;
}

// wgmma.fence.sync.aligned
AF_DEVICE void wgmma_fence(AF_ONLY_SITE) {
#if AF_EMULATE
  emulate::wgmma_fence(site);
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// wgmma.commit_group.sync.aligned
AF_DEVICE void wgmma_commit(AF_ONLY_SITE) {
#if AF_EMULATE
  emulate::wgmma_commit(site);
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// wgmma.wait_group.sync.aligned: all but the newest `kPending` groups are complete.
template <int kPending>
AF_DEVICE void wgmma_wait(AF_ONLY_SITE) {
#if AF_EMULATE
  emulate::wgmma_wait(kPending, site);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// No instruction: the compiler moves no access to these registers across it, and gives them to
// nobody else before it. It stands after wgmma_wait, which does not name the registers, of D and A,
// that it waits for.
template <int kCount>
AF_DEVICE void wgmma_pin(float (&d)[kCount]) {
#if AF_EMULATE
  (void)d;
#else
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}
template <int kCount>
AF_DEVICE void wgmma_pin(uint32_t (&a)[kCount][4]) {
#if AF_EMULATE
  (void)a;
#else
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
#endif
}

#if !AF_EMULATE
// Both operands in shared memory. `tail` holds the transpositions, which e4m3 has not.
#define AF_WGMMA_SS(n, D, S, a, b, accumulate, trans_a, trans_b, ...)                       \
  if constexpr (kN == n) {                                                                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate                             \
                 ", 0;\n"                                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #n AF_WGMMA_KIND " {" S "}, " a ", " b \
                 ", p, 1, 1" AF_WGMMA_TRANSPOSE_AB(trans_a, trans_b) ";\n}\n"               \
                 : D                                                                        \
                 : "l"(a_descriptor), "l"(b_descriptor),                                    \
                   "r"(static_cast<uint32_t>(add))AF_WGMMA_CONSTANTS_AB                     \
                 : "memory");                                                               \
  }

// A in registers.
#define AF_WGMMA_RS(n, D, S, a0, a1, a2, a3, b, accumulate, trans_b)                           \
  if constexpr (kN == n) {                                                                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate                                \
                 ", 0;\n"                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #n AF_WGMMA_KIND " {" S "}, {" a0 ", " a1 \
                 ", " a2 ", " a3 "}, " b ", p, 1, 1" AF_WGMMA_TRANSPOSE_B(trans_b) ";\n}\n"    \
                 : D                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor),              \
                   "r"(static_cast<uint32_t>(add))AF_WGMMA_CONSTANTS_B                         \
                 : "memory");                                                                  \
  }
#define AF_WGMMA_TRANSPOSE_AB(trans_a, trans_b) ", " trans_a ", " trans_b
#define AF_WGMMA_TRANSPOSE_B(trans_b) ", " trans_b
#define AF_WGMMA_CONSTANTS_AB , "n"(kMnMajorA ? 1 : 0), "n"(kMnMajorB ? 1 : 0)
#define AF_WGMMA_CONSTANTS_B , "n"(kMnMajorB ? 1 : 0)
#endif

// Is there an instruction of this N? 8, 16, and the multiples of 16 to 256 (those of 8 between
// exist too, and nothing here wants them).
template <int kN>
constexpr bool wgmma_has_n = kN == 8 || (kN % 16 == 0 && 16 <= kN && kN <= 256);

#define AF_WGMMA_KIND "k16.f32.bf16.bf16"
// wgmma.mma_async.sync.aligned.m64nNk16.f32.bf16.bf16: D is A B, plus D where `add`.
template <int kN, bool kMnMajorA = false, bool kMnMajorB = false>
AF_DEVICE void wgmma_bf16(float (&d)[kN / 2], uint64_t a_descriptor, uint64_t b_descriptor,
                          bool add AF_SITE) {
  static_assert(wgmma_has_n<kN>);
#if AF_EMULATE
  emulate::wgmma({emulate::Operand::kBf16, kN, kMnMajorA, kMnMajorB}, d, nullptr, a_descriptor,
                 b_descriptor, add, site);
#else
  AF_WGMMA_EACH_N(AF_WGMMA_SS)
#endif
}
template <int kN, bool kMnMajorB = false>
AF_DEVICE void wgmma_bf16(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b_descriptor,
                          bool add AF_SITE) {
  static_assert(wgmma_has_n<kN>);
#if AF_EMULATE
  emulate::wgmma({emulate::Operand::kBf16, kN, false, kMnMajorB}, d, a, 0, b_descriptor, add, site);
#else
  AF_WGMMA_EACH_N(AF_WGMMA_RS)
#endif
}
#undef AF_WGMMA_KIND

#define AF_WGMMA_KIND "k16.f32.f16.f16"
// wgmma.mma_async.sync.aligned.m64nNk16.f32.f16.f16: D is A B, plus D where `add`.
template <int kN, bool kMnMajorA = false, bool kMnMajorB = false>
AF_DEVICE void wgmma_f16(float (&d)[kN / 2], uint64_t a_descriptor, uint64_t b_descriptor,
                         bool add AF_SITE) {
  static_assert(wgmma_has_n<kN>);
#if AF_EMULATE
  emulate::wgmma({emulate::Operand::kF16, kN, kMnMajorA, kMnMajorB}, d, nullptr, a_descriptor,
                 b_descriptor, add, site);
#else
  AF_WGMMA_EACH_N(AF_WGMMA_SS)
#endif
}
template <int kN, bool kMnMajorB = false>
AF_DEVICE void wgmma_f16(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b_descriptor,
                         bool add AF_SITE) {
  static_assert(wgmma_has_n<kN>);
#if AF_EMULATE
  emulate::wgmma({emulate::Operand::kF16, kN, false, kMnMajorB}, d, a, 0, b_descriptor, add, site);
#else
  AF_WGMMA_EACH_N(AF_WGMMA_RS)
#endif
}
#undef AF_WGMMA_KIND

#if !AF_EMULATE
#undef AF_WGMMA_TRANSPOSE_AB
#undef AF_WGMMA_TRANSPOSE_B
#undef AF_WGMMA_CONSTANTS_AB
#undef AF_WGMMA_CONSTANTS_B
#define AF_WGMMA_TRANSPOSE_AB(trans_a, trans_b)
#define AF_WGMMA_TRANSPOSE_B(trans_b)
#define AF_WGMMA_CONSTANTS_AB
#define AF_WGMMA_CONSTANTS_B
#endif

#define AF_WGMMA_KIND "k32.f32.e4m3.e4m3"
// wgmma.mma_async.sync.aligned.m64nNk32.f32.e4m3.e4m3: D is A B, plus D where `add`.
template <int kN>
AF_DEVICE void wgmma_e4m3(float (&d)[kN / 2], uint64_t a_descriptor, uint64_t b_descriptor,
                          bool add AF_SITE) {
  static_assert(wgmma_has_n<kN>);
#if AF_EMULATE
  emulate::wgmma({emulate::Operand::kE4m3, kN, false, false}, d, nullptr, a_descriptor,
                 b_descriptor, add, site);
#else
  AF_WGMMA_EACH_N(AF_WGMMA_SS)
#endif
}
template <int kN>
AF_DEVICE void wgmma_e4m3(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b_descriptor,
                          bool add AF_SITE) {
  static_assert(wgmma_has_n<kN>);
#if AF_EMULATE
  emulate::wgmma({emulate::Operand::kE4m3, kN, false, false}, d, a, 0, b_descriptor, add, site);
#else
  AF_WGMMA_EACH_N(AF_WGMMA_RS)
#endif
}
#undef AF_WGMMA_KIND

#if !AF_EMULATE
#undef AF_WGMMA_TRANSPOSE_AB
#undef AF_WGMMA_TRANSPOSE_B
#undef AF_WGMMA_CONSTANTS_AB
#undef AF_WGMMA_CONSTANTS_B
#undef AF_WGMMA_SS
#undef AF_WGMMA_RS
#endif

}  // namespace attnforge::ptx
