// Small kernels of the backward: gradients of gates per head, products, sums over heads of a group.
// Bound by memory; a warp per sequence and head, else a thread per element.
#include "cuda/linear/gates.h"

#include "cuda/linear/walk.h"

namespace attnforge::cuda {

namespace {

constexpr int kThreads = 128;

// A lane has a token; from the last 32 of a sequence to its first ones.
__global__ void __launch_bounds__(kThreads) gate_scan_kernel(const __grid_constant__ GateScan s) {
  const int64_t warp = int64_t{blockIdx.x} * (kThreads / 32) + warp_id();
  if (warp >= s.sequences * s.heads) return;
  const int lane = static_cast<int>(ptx::lane_id());
  const int64_t head = warp % s.heads, sequence = warp / s.heads;
  const Tokens tokens = tokens_of(s.rows, s.cu_seqlens, static_cast<int>(sequence));
  float later = 0.0f;
  if (s.dfinal_state != nullptr) {
    for (int64_t i = lane; i < s.state; i += 32) {
      later += s.dfinal_state[warp * s.state + i] * s.final_state[warp * s.state + i];
    }
#pragma unroll
    for (uint32_t flip = 1; flip < 32; flip *= 2) later += ptx::shuffle_xor(later, flip);
  }
  for (int end = tokens.count; end > 0; end -= 32) {
    const int token = end - 1 - lane;
    const int64_t at = (int64_t{tokens.batch} * s.rows + tokens.first + token) * s.heads + head;
    float sum = 0.0f;
    if (token >= 0) {
      for (int64_t plane = 0; plane < s.planes; ++plane) {
        sum += s.dots[plane * s.plane + at] - s.dots[(s.planes + plane) * s.plane + at];
      }
    }
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
      const float other = ptx::shuffle_up(sum, step);
      if (lane >= static_cast<int>(step)) sum += other;
    }
    sum += later;
    if (token >= 0) s.dgate[at] = s.gate[at] <= kReset ? 0.0f : sum;
    later = ptx::shuffle_from(sum, 31);
  }
}

// Rows that a call's sequences have, packed ones from the first row on.
AF_DEVICE int64_t covered(int64_t rows, const int32_t* cu_seqlens, int64_t sequences) {
  return cu_seqlens == nullptr ? rows : at_most<int64_t>(rows, cu_seqlens[sequences]);
}

// The n-th element of [batch, rows, heads, dim].
struct Place {
  int64_t batch, row, head, d;

  AF_DEVICE static Place of(int64_t n, int64_t rows, int64_t heads, int64_t dim) {
    return {n / dim / heads / rows, n / dim / heads % rows, n / dim % heads, n % dim};
  }
  template <class T>
  AF_DEVICE T* in(const TensorRef& t) const {
    return row_ptr<T>(t, static_cast<int>(batch), row, static_cast<int>(head)) + d;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    gate_product_kernel(const __grid_constant__ GateProduct p) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= p.batch * p.rows * p.heads * p.dim) return;
  const Place at = Place::of(n, p.rows, p.heads, p.dim);
  if (at.row >= covered(p.rows, p.cu_seqlens, p.sequences)) return;
  p.dgate[n] = widen(*at.in<const T>(p.a)) * widen(*at.in<const T>(p.b));
}

template <class T>
__global__ void __launch_bounds__(kThreads) group_sum_kernel(const __grid_constant__ GroupSum s) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= s.batch * s.rows * s.heads * s.dim) return;
  const Place at = Place::of(n, s.rows, s.heads, s.dim);
  if (at.row >= covered(s.rows, s.cu_seqlens, s.sequences)) return;
  const float* from = s.from + (n / s.dim * s.group) * s.dim + at.d;
  float sum = 0.0f;
  for (int64_t g = 0; g < s.group; ++g) sum += from[g * s.dim];
  *at.in<T>(s.to) = narrow<T>(sum);
}

unsigned blocks_of(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

}  // namespace

int linear_gate_scan(const GateScan& scan, void* stream) {
  const unsigned blocks = blocks_of(scan.sequences * scan.heads * 32);
  if (blocks == 0) return 0;
  return ATTNFORGE_LAUNCH(gate_scan_kernel, dim3(blocks), dim3(kThreads), 0, stream, scan);
}

int linear_gate_product(const GateProduct& product, void* stream) {
  const unsigned blocks = blocks_of(product.batch * product.rows * product.heads * product.dim);
  if (blocks == 0) return 0;
  return with_dtype(product.dtype, [&]<DType kDType>() {
    using T = typename ElementOf<kDType>::Type;
    return ATTNFORGE_LAUNCH((gate_product_kernel<T>), dim3(blocks), dim3(kThreads), 0, stream,
                            product);
  });
}

int linear_group_sum(const GroupSum& sum, void* stream) {
  const unsigned blocks = blocks_of(sum.batch * sum.rows * sum.heads * sum.dim);
  if (blocks == 0) return 0;
  return with_dtype(sum.dtype, [&]<DType kDType>() {
    using T = typename ElementOf<kDType>::Type;
    return ATTNFORGE_LAUNCH((group_sum_kernel<T>), dim3(blocks), dim3(kThreads), 0, stream, sum);
  });
}

}  // namespace attnforge::cuda
