// ldmatrix and stmatrix: 8x8 matrices of 16-bit elements between shared memory and fragments.
//
// Lane l gives the address of row l % 8 of matrix l / 8, 16 bytes, 16-byte aligned; of the x1 and
// x2 forms only the first 8 or 16 addresses count. Register i of lane l then holds, of matrix i,
//
//   plain:       elements (row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1)
//   transposed:  elements (rows 2 (l % 4) and 2 (l % 4) + 1, column l / 4)
//
// the first in the low half: rows of A and C, and with .trans columns of B, as mma.h wants them.
// All 32 lanes execute it together.
#pragma once

#include "cuda/ptx/platform.h"

namespace attnforge::ptx {

// ldmatrix.sync.aligned.m8n8.x1.shared.b16
AF_DEVICE void ldmatrix_x1(uint32_t (&d)[1], uint32_t row_address AF_SITE) {
#if AF_EMULATE
  emulate::ldmatrix(d, 1, false, row_address, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(d[0])
               : "r"(row_address)
               : "memory");
#endif
}

// ldmatrix.sync.aligned.m8n8.x2.shared.b16
AF_DEVICE void ldmatrix_x2(uint32_t (&d)[2], uint32_t row_address AF_SITE) {
#if AF_EMULATE
  emulate::ldmatrix(d, 2, false, row_address, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(row_address)
               : "memory");
#endif
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16
AF_DEVICE void ldmatrix_x4(uint32_t (&d)[4], uint32_t row_address AF_SITE) {
#if AF_EMULATE
  emulate::ldmatrix(d, 4, false, row_address, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row_address)
               : "memory");
#endif
}

// ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16
AF_DEVICE void ldmatrix_x2_trans(uint32_t (&d)[2], uint32_t row_address AF_SITE) {
#if AF_EMULATE
  emulate::ldmatrix(d, 2, true, row_address, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(row_address)
               : "memory");
#endif
}

// ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16
AF_DEVICE void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t row_address AF_SITE) {
#if AF_EMULATE
  emulate::ldmatrix(d, 4, true, row_address, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(row_address)
               : "memory");
#endif
}

// stmatrix.sync.aligned.m8n8.x2.shared.b16 (sm_90)
AF_DEVICE void stmatrix_x2(uint32_t row_address, const uint32_t (&s)[2] AF_SITE) {
#if AF_EMULATE
  emulate::stmatrix(s, 2, false, row_address, site);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row_address),
               "r"(s[0]), "r"(s[1])
               : "memory");
#endif
}

// stmatrix.sync.aligned.m8n8.x4.shared.b16 (sm_90)
AF_DEVICE void stmatrix_x4(uint32_t row_address, const uint32_t (&s)[4] AF_SITE) {
#if AF_EMULATE
  emulate::stmatrix(s, 4, false, row_address, site);
#else
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
      "r"(s[0]), "r"(s[1]), "r"(s[2]), "r"(s[3])
      : "memory");
#endif
}

// stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 (sm_90)
AF_DEVICE void stmatrix_x4_trans(uint32_t row_address, const uint32_t (&s)[4] AF_SITE) {
#if AF_EMULATE
  emulate::stmatrix(s, 4, true, row_address, site);
#else
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address),
      "r"(s[0]), "r"(s[1]), "r"(s[2]), "r"(s[3])
      : "memory");
#endif
}

}  // namespace attnforge::ptx
