// Matrix tiles (AMX): eight registers of 16 rows by 64 bytes, and the two products of them that are
// used here: of bf16 (dot), and of signed bytes into 32 bits (dot_codes), in which B has four rows
// of codes side by side and sums are exact.
//
//   A    16 rows of 32 bf16
//   B    16 pairs of rows of 16 columns: bf16 2 k and 2 k + 1 of a column side by side
//   C    16 by 16 fp32;  C[m][n] += even + odd, the sums of A[m][2 k] B[2 k][n] and of
//        A[m][2 k + 1] B[2 k + 1][n] over ascending k, each a chain of FMAs of its own from 0
//
// An element of C is that one sequence of roundings, whatever its neighbours hold. Where there is
// no AMX (level amx_soft) Tiles is that sequence in software, bit for bit, but that the hardware
// takes subnormal numbers for 0: CPUs without AMX test what those with it run.
#pragma once

#include "cpu/simd/vec.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

constexpr int64_t kTileRows = 16;                      // of A and C; also columns of B and C
constexpr int64_t kTileDepth = 32;                     // bf16 of a row of A
constexpr int64_t kTileSize = kTileRows * kTileDepth;  // bf16 of a tile of A or B

#if defined(__AMX_BF16__)

// Eight whole tiles while it lives. The thread's own configuration comes back: another library may
// take for granted that it is still there. Its tiles' contents are lost.
class TileScope {
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Config before_;

 public:
  AF_INLINE_MEMBER TileScope() {
    Config whole = {};
    whole.palette = 1;
    for (int i = 0; i < 8; ++i) whole.row_bytes[i] = 64, whole.rows[i] = kTileRows;
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" : : "m"(whole));
  }
  AF_INLINE_MEMBER ~TileScope() {
    if (before_.palette) {
      asm volatile("ldtilecfg %0" : : "m"(before_));
    } else {
      asm volatile("tilerelease");
    }
  }
  TileScope(const TileScope&) = delete;
};

// The registers; whoever uses them stands in a TileScope. Instructions are written out: the
// compiler's own do not say that a load reads memory.
struct Tiles {
  template <int T>
  AF_INLINE_MEMBER void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  AF_INLINE_MEMBER void load(const void* rows, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(row_bytes), "i"(T) : "memory");
  }
  template <int T>
  AF_INLINE_MEMBER void store(void* rows, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(row_bytes), "i"(T) : "memory");
  }
  template <int C, int A, int B>
  AF_INLINE_MEMBER void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
  template <int C, int A, int B>
  AF_INLINE_MEMBER void dot_codes() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

#else

struct TileScope {
  AF_INLINE_MEMBER TileScope() {}
  AF_INLINE_MEMBER ~TileScope() {}
};

struct Tiles {
  VecU row[8][kTileRows];

  template <int T>
  AF_INLINE_MEMBER void zero() {
    for (VecU& r : row[T]) r = VecU{};
  }
  template <int T>
  AF_INLINE_MEMBER void load(const void* rows, int64_t row_bytes) {
    for (int64_t m = 0; m < kTileRows; ++m) {
      row[T][m] = load_raw<VecU>(static_cast<const char*>(rows) + m * row_bytes);
    }
  }
  template <int T>
  AF_INLINE_MEMBER void store(void* rows, int64_t row_bytes) {
    for (int64_t m = 0; m < kTileRows; ++m) {
      store_raw(static_cast<char*>(rows) + m * row_bytes, row[T][m]);
    }
  }
  template <int C, int A, int B>
  AF_INLINE_MEMBER void dot() {
    VecF even_b[kTileRows], odd_b[kTileRows];
    for (int64_t k = 0; k < kTileRows; ++k) {
      even_b[k] = bits_to_float(row[B][k] << 16);
      odd_b[k] = bits_to_float(row[B][k] & 0xffff0000u);
    }
    for (int64_t m = 0; m < kTileRows; ++m) {
      float even_a[kTileRows], odd_a[kTileRows];
      store(even_a, bits_to_float(row[A][m] << 16));
      store(odd_a, bits_to_float(row[A][m] & 0xffff0000u));
      VecF even{}, odd{};
      for (int64_t k = 0; k < kTileRows; ++k) {
        even = fma(splat(even_a[k]), even_b[k], even);
        odd = fma(splat(odd_a[k]), odd_b[k], odd);
      }
      row[C][m] = float_to_bits(bits_to_float(row[C][m]) + (even + odd));
    }
  }
  template <int C, int A, int B>
  AF_INLINE_MEMBER void dot_codes() {
    for (int64_t m = 0; m < kTileRows; ++m) {
      VecI sum = __builtin_bit_cast(VecI, row[C][m]);
      for (int64_t k = 0; k < kTileRows; ++k) {
        const VecI b = __builtin_bit_cast(VecI, row[B][k]);
        const int32_t a = static_cast<int32_t>(row[A][m][k]);
        sum += (a << 24 >> 24) * (b << 24 >> 24) + (a << 16 >> 24) * (b << 16 >> 24) +
               (a << 8 >> 24) * (b << 8 >> 24) + (a >> 24) * (b >> 24);
      }
      row[C][m] = __builtin_bit_cast(VecU, sum);
    }
  }

 private:
  AF_INLINE_MEMBER static void store(float* p, VecF x) { store_raw(p, x); }
};

#endif

}  // namespace attnforge::cpu::ATTNFORGE_ISA
