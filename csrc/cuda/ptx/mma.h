// mma.sync: D = A B + D on the tensor cores, fp32 accumulators. All 32 lanes execute it together.
//
// Fragments of lane l, with g = l / 4 (row group) and t = l % 4. A is [M, K] row-major, B is [K, N]
// column-major, D is [M, N]. Two 16-bit (four 8-bit) elements lie in a register, the first lowest.
//
//   m16n8k16, 16-bit   a[0]: (g, 2t..2t+1)      a[1]: (g + 8, 2t..)
//                      a[2]: (g, 2t + 8..)      a[3]: (g + 8, 2t + 8..)
//                      b[0]: rows 2t..2t+1 of column g      b[1]: rows 2t + 8..
//   m16n8k8, tf32      a[0]: (g, t)   a[1]: (g + 8, t)   a[2]: (g, t + 4)   a[3]: (g + 8, t + 4)
//                      b[0]: (t, g)   b[1]: (t + 4, g)
//   m16n8k32, 8-bit    a[0]: (g, 4t..4t+3)   a[1]: (g + 8, 4t..)
//                      a[2]: (g, 4t + 16..)  a[3]: (g + 8, 4t + 16..)
//                      b[0]: rows 4t..4t+3 of column g      b[1]: rows 4t + 16..
//   all                d[0], d[1]: (g, 2t..2t+1)   d[2], d[3]: (g + 8, 2t..2t+1)
//
// So D of one product, packed in pairs, is A of the next m16n8k16: d of columns 0..7 gives a[0],
// a[1], and d of columns 8..15 gives a[2], a[3].
#pragma once

#include "cuda/ptx/platform.h"

namespace attnforge::ptx {

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
AF_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                 const uint32_t (&b)[2] AF_SITE) {
#if AF_EMULATE
  emulate::mma(emulate::Operand::kBf16, d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
AF_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4],
                                const uint32_t (&b)[2] AF_SITE) {
#if AF_EMULATE
  emulate::mma(emulate::Operand::kF16, d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32: the low 13 bits of a and b are ignored
// (math.h rounds to tf32).
AF_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                const uint32_t (&b)[2] AF_SITE) {
#if AF_EMULATE
  emulate::mma(emulate::Operand::kTf32, d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 (sm_89)
AF_DEVICE void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4],
                                 const uint32_t (&b)[2] AF_SITE) {
#if AF_EMULATE
  emulate::mma(emulate::Operand::kE4m3, d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace attnforge::ptx
