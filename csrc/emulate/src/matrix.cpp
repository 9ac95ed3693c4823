// ldmatrix, stmatrix and mma.sync; the layouts stand in csrc/cuda/ptx/ldmatrix.h and mma.h.
#include <cstring>

#include "machine.h"

namespace attnforge::emulate {
namespace {

struct MatrixArgument {
  Thread* thread;
  uint32_t* registers;
  uint32_t row_address;
};

// Element (row, column) of matrix i sits in half `half` of register i of lane `lane`.
struct Place {
  uint32_t lane, half;
};

Place place_of(uint32_t row, uint32_t column, bool transposed) {
  if (transposed) std::swap(row, column);
  return {row * 4 + column / 2, column % 2};
}

template <typename Row>
void for_rows(const std::array<void*, 32>& lanes, int matrices, const Site& site, Row row_done) {
  Machine& m = machine();
  for (uint32_t i = 0; i < static_cast<uint32_t>(matrices) * 8; ++i) {
    auto& owner = *static_cast<MatrixArgument*>(lanes[i]);
    const uint32_t offset = m.shared_offset(owner.row_address, 16, 16, site);
    row_done(i / 8, i % 8, offset, *owner.thread);
  }
}

}  // namespace

void ldmatrix(uint32_t* to, int matrices, bool transposed, uint32_t row_address, Site site) {
  Machine& m = machine();
  MatrixArgument mine{&m.current(), to, row_address};
  meet("ldmatrix", ~0u, Aligned::kYes, &mine, site, [&](const auto& lanes) {
    for_rows(lanes, matrices, site,
             [&](uint32_t matrix, uint32_t row, uint32_t offset, Thread& owner) {
               Block& block = *owner.block;
               block.shadow.read(offset, 16, Access{owner.index, &owner.clock, site});
               for (uint32_t column = 0; column < 8; ++column) {
                 uint16_t element;
                 std::memcpy(&element, block.shared.data() + offset + 2 * column, 2);
                 const auto [lane, half] = place_of(row, column, transposed);
                 uint32_t& word = static_cast<MatrixArgument*>(lanes[lane])->registers[matrix];
                 word = half ? (word & 0xffff) | uint32_t{element} << 16 : element;
               }
             });
  });
}

void stmatrix(const uint32_t* from, int matrices, bool transposed, uint32_t row_address,
              Site site) {
  Machine& m = machine();
  MatrixArgument mine{&m.current(), const_cast<uint32_t*>(from), row_address};
  meet("stmatrix", ~0u, Aligned::kYes, &mine, site, [&](const auto& lanes) {
    for_rows(lanes, matrices, site,
             [&](uint32_t matrix, uint32_t row, uint32_t offset, Thread& owner) {
               Block& block = *owner.block;
               block.shadow.write(offset, 16, Access{owner.index, &owner.clock, site});
               for (uint32_t column = 0; column < 8; ++column) {
                 const auto [lane, half] = place_of(row, column, transposed);
                 const uint32_t word = static_cast<MatrixArgument*>(lanes[lane])->registers[matrix];
                 const auto element = static_cast<uint16_t>(half ? word >> 16 : word);
                 std::memcpy(block.shared.data() + offset + 2 * column, &element, 2);
               }
             });
  });
}

namespace {

// Elements of one 32-bit register, lowest first.
int elements(Operand operand) {
  return operand == Operand::kTf32 ? 1 : operand == Operand::kE4m3 ? 4 : 2;
}

}  // namespace

float element_value(Operand operand, uint32_t word, int i) {
  switch (operand) {
    case Operand::kBf16:
      return __builtin_bit_cast(float, word >> 16 * i << 16);
    case Operand::kF16:
      return f16_value(static_cast<uint16_t>(word >> 16 * i));
    case Operand::kTf32:
      return __builtin_bit_cast(float, word & 0xffffe000u);
    case Operand::kE4m3:
      return e4m3_value(word >> 8 * i & 0xff);
  }
  return 0;
}

// K is 8 registers' worth of elements: 8 for tf32, 16 for 16-bit, 32 for 8-bit.
void mma(Operand operand, float* d, const uint32_t* a, const uint32_t* b, Site site) {
  struct Argument {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
  } mine{d, a, b};
  meet("mma", ~0u, Aligned::kYes, &mine, site, [&](const auto& lanes) {
    const int per = elements(operand);
    float left[16][32], right[8][32];  // [M, K], [N, K]
    for (int lane = 0; lane < 32; ++lane) {
      const auto& argument = *static_cast<Argument*>(lanes[lane]);
      const int group = lane / 4, part = lane % 4;
      for (int i = 0; i < per; ++i) {
        for (int r = 0; r < 4; ++r) {
          left[group + r % 2 * 8][(part + r / 2 * 4) * per + i] =
              element_value(operand, argument.a[r], i);
        }
        for (int r = 0; r < 2; ++r) {
          right[group][(part + r * 4) * per + i] = element_value(operand, argument.b[r], i);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const auto& argument = *static_cast<Argument*>(lanes[lane]);
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
        float sum = argument.d[r];
        for (int k = 0; k < 8 * per; ++k) sum += left[row][k] * right[column][k];
        argument.d[r] = sum;
      }
    }
  });
}

}  // namespace attnforge::emulate
