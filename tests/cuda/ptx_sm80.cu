// Every function of csrc/cuda/ptx/ that an sm_80 has, for ptxas to judge.
#include "cuda/launch.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/math.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/sync.h"
#include "cuda/ptx/warp.h"

namespace ptx = attnforge::ptx;

__global__ void memory(const float* in, float* out, uint32_t* counter) {
  const uint32_t shared = ptx::dynamic_shared_memory() + 16 * threadIdx.x;
  ptx::store_shared(shared, uint16_t{1});
  ptx::store_shared(shared, 1.0f);
  ptx::store_shared(shared, ptx::U32x2{{1, 2}});
  ptx::store_shared(shared, ptx::load_global_16_constant(in));
  ptx::store_shared(shared, ptx::load_global_16_streaming(in));
  ptx::add_shared(shared, 2.0f);
  counter[2] = ptx::fetch_add_shared(shared, 3) + ptx::fetch_or_shared(shared, 4);
  ptx::prefetch_l2(in + 64);
  ptx::add_global(out, 1.0f);
  const uint32_t ticket = ptx::fetch_add_global(counter, 1);
  if (ptx::load_acquire_global(counter + 1) == ticket) ptx::store_release_global(counter + 1, 1);
  ptx::store_global_16(out, ptx::load_shared<ptx::U32x4>(shared));
  ptx::store_global_16_streaming(out + 4, ptx::load_shared<ptx::U32x4>(shared));
  out[8] = ptx::load_shared<float>(shared) + ptx::load_shared<uint16_t>(shared);
  out[9] = static_cast<float>(ptx::load_shared<ptx::U32x2>(shared).v[1]);
}

__global__ void sync_and_copy(const float* in, float* out) {
  const uint32_t shared = ptx::dynamic_shared_memory() + 16 * threadIdx.x;
  ptx::cp_async_16(shared, in);
  ptx::cp_async_8(shared + 4096, in, 4);
  ptx::cp_async_4(shared + 8192, in);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  ptx::cp_async_wait<0>();
  ptx::sync_threads();
  ptx::sync_warp();
  ptx::sync_warp(0xffff);
  if (threadIdx.x < 32) {
    ptx::named_barrier_arrive(1, 64);
  } else {
    ptx::named_barrier_sync(1, 64);
  }
  ptx::fence_block();
  ptx::fence_gpu();
  out[threadIdx.x] = ptx::load_shared<float>(shared);
}

__global__ void matrices(float* out) {
  const uint32_t row = ptx::dynamic_shared_memory() + 16 * ptx::lane_id();
  uint32_t a[4], b[2], c[1], t[4], u[2];
  ptx::ldmatrix_x4(a, row);
  ptx::ldmatrix_x2(b, row);
  ptx::ldmatrix_x1(c, row);
  ptx::ldmatrix_x4_trans(t, row);
  ptx::ldmatrix_x2_trans(u, row);
  b[0] ^= c[0];
  float d[4] = {1, 2, 3, 4};
  ptx::mma_m16n8k16_bf16(d, a, b);
  ptx::mma_m16n8k16_f16(d, t, u);
  ptx::mma_m16n8k8_tf32(d, a, u);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}

__global__ void warp_and_math(const float* in, float* out, uint32_t* bits) {
  float x = in[threadIdx.x];
  x = ptx::shuffle_xor(x, 1) + ptx::shuffle_from(x, 3) + ptx::shuffle_up(x, 1);
  x += ptx::shuffle_down(x, 1);
  bits[0] = ptx::ballot(x > 0);
  bits[1] = ptx::any(x > 1) + ptx::all(x > 2);
  bits[2] = ptx::pack_bf16x2(x, 1) ^ ptx::pack_f16x2(x, 1) ^ ptx::tf32_from_float(x);
  bits[7] = ptx::permute_bytes(bits[2], bits[1], 0x6420) + ptx::fma_f16x2(bits[2], bits[1], 1);
  bits[3] = ptx::bf16_from_float(x) + ptx::f16_from_float(x) + ptx::bits_of_float(x);
  x = ptx::fma(x, ptx::exp2_approx(x), ptx::log2_approx(x));
  x = ptx::sqrt(x) + static_cast<float>(ptx::popcount(bits[1]));
  x = ptx::max(ptx::rcp_approx(x), ptx::tanh_approx(x));
  x += ptx::float_from_bf16(static_cast<uint16_t>(bits[4]));
  x += ptx::float_from_f16(static_cast<uint16_t>(bits[5])) + ptx::float_from_bits(bits[6]);
  out[threadIdx.x] = x;
}

int launch(const float* in, float* out, void* stream) {
  return ATTNFORGE_LAUNCH(sync_and_copy, dim3(2), dim3(64), 64 * 1024, stream, in, out);
}
