// What csrc/cuda/ptx/ has since sm_89: e4m3.
#include "cuda/launch.h"
#include "cuda/ptx/math.h"
#include "cuda/ptx/mma.h"

namespace ptx = attnforge::ptx;

__global__ void e4m3(const uint32_t* in, float* out, uint32_t* bits) {
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]}, b[2] = {in[4], in[5]};
  float d[4] = {};
  ptx::mma_m16n8k32_e4m3(d, a, b);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
  const uint32_t pair = ptx::f16x2_from_e4m3x2(ptx::pack_e4m3x2(d[0], d[1]));
  bits[threadIdx.x] = pair + ptx::e4m3x2_from_f16x2(ptx::fma_f16x2(pair, in[6], in[7]));
}
