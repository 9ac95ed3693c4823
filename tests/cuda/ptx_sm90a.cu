// What csrc/cuda/ptx/ has on sm_90a: TMA, mbarriers, wgmma of every N, setmaxnreg.
#include "cuda/launch.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/ptx/sync.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/warp.h"
#include "cuda/ptx/wgmma.h"

namespace ptx = attnforge::ptx;
using attnforge::cuda::TensorMap;

__global__ void tensors(const __grid_constant__ TensorMap map, const float* in) {
  const uint32_t barrier = ptx::dynamic_shared_memory(), shared = barrier + 1024;
  if (threadIdx.x / 32 == 0 && ptx::elect_one()) {
    ptx::prefetch_tensor_map(&map);
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_init(barrier + 8, 32);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(barrier, 5 * 4096);
    ptx::tma_load_2d(shared, &map, barrier, 0, 1);
    ptx::tma_load_3d(shared, &map, barrier, 0, 1, 2);
    ptx::tma_load_4d(shared, &map, barrier, 0, 1, 2, 3);
    ptx::tma_load_5d(shared, &map, barrier, 0, 1, 2, 3, 4);
    ptx::bulk_load(shared, in, 4096, barrier);
  }
  ptx::sync_threads();
  ptx::cp_async_16(shared, in);
  ptx::cp_async_mbarrier_arrive(barrier + 8);
  ptx::mbarrier_wait(barrier, 0);
  if (ptx::mbarrier_try_wait(barrier + 8, 0)) ptx::mbarrier_arrive(barrier + 8);
  const uint32_t s[4] = {1, 2, 3, 4}, t[2] = {5, 6};
  ptx::stmatrix_x4(shared + 16 * ptx::lane_id(), s);
  ptx::stmatrix_x4_trans(shared + 16 * ptx::lane_id(), s);
  ptx::stmatrix_x2(shared + 16 * ptx::lane_id(), t);
  ptx::fence_proxy_async();
  ptx::sync_threads();
  if (threadIdx.x == 0) {
    ptx::tma_store_2d(&map, shared, 0, 1);
    ptx::tma_store_3d(&map, shared, 0, 1, 2);
    ptx::tma_store_4d(&map, shared, 0, 1, 2, 3);
    ptx::tma_store_5d(&map, shared, 0, 1, 2, 3, 4);
    ptx::bulk_commit();
    ptx::bulk_wait_read<1>();
    ptx::tma_add_2d(&map, shared, 0, 1);
    ptx::tma_add_3d(&map, shared, 0, 1, 2);
    ptx::tma_add_4d(&map, shared, 0, 1, 2, 3);
    ptx::tma_add_5d(&map, shared, 0, 1, 2, 3, 4);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
    ptx::mbarrier_invalidate(barrier);
  }
}

template <int kN>
__device__ void products(float* out) {
  const uint32_t shared = ptx::dynamic_shared_memory();
  const uint64_t x = ptx::wgmma_descriptor(shared, 16, 1024, ptx::MatrixSwizzle::k128);
  const uint64_t y = ptx::wgmma_descriptor(shared + 8192, 4096, 1024, ptx::MatrixSwizzle::k128);
  uint32_t a[1][4] = {{1, 2, 3, 4}};
  float d[kN / 2];
  ptx::wgmma_fence();
  ptx::wgmma_bf16<kN>(d, x, y, false);
  ptx::wgmma_bf16<kN, true, true>(d, x, y, true);
  ptx::wgmma_bf16<kN>(d, a[0], y, true);
  ptx::wgmma_bf16<kN, true>(d, a[0], y, true);
  ptx::wgmma_f16<kN>(d, x, y, true);
  ptx::wgmma_f16<kN, false, true>(d, x, y, true);
  ptx::wgmma_f16<kN, true>(d, a[0], y, true);
  ptx::wgmma_e4m3<kN>(d, x, y, true);
  ptx::wgmma_e4m3<kN>(d, a[0], y, true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_pin(d);
  ptx::wgmma_pin(a);
  for (int i = 0; i < kN / 2; ++i) out[128 * i + threadIdx.x] = d[i];
}

template <int... kN>
__device__ void products_of_each_n(float* out) {
  (products<kN>(out), ...);
}

__global__ void __launch_bounds__(128) wgmma(float* out) {
  products_of_each_n<8, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256>(
      out);
}

__global__ void __launch_bounds__(256, 1) registers(float* out) {
  if (threadIdx.x < 128) {
    ptx::lower_registers<24>();
  } else {
    ptx::raise_registers<240>();
    out[threadIdx.x] = 1;
  }
}

int map_and_launch(TensorMap* map, void* stream) {
  using attnforge::cuda::TensorSwizzle, attnforge::cuda::TensorType;
  const attnforge::cuda::TensorShape shape = {
      nullptr, 2, {64, 64}, {2, 128}, {64, 64}, TensorType::kBf16, TensorSwizzle::k128};
  const int error = attnforge::cuda::make_tensor_map(map, shape);
  if (error) return error;
  const float* in = nullptr;
  return ATTNFORGE_LAUNCH(tensors, dim3(1), dim3(32), 64 * 1024, stream, *map, in);
}
