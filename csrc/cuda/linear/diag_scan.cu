// The diagonal scan h_t = e^{g_t} h_{t-1} + x_t and its backward,
//
//   dx_t = dh_t + e^{g_{t+1}} dx_{t+1}      dg_t = e^{g_t} h_{t-1} dx_t
//
//   thread   a channel of a sequence, all of its tokens; 32 neighbours read whole lines
//   bytes    x, g and out once; backward x, g, dout, dx once and g, dg once more: h_{t-1} waits in
//            dg for the way back. Bound by memory where batch * channels fill the GPU, by latency
//            elsewhere: eight tokens are on their way at a time
#include "cuda/linear/delta_launch.h"
#include "cuda/linear/walk.h"

namespace attnforge::cuda {

namespace {

constexpr int kThreads = 64, kAhead = 8;

// A thread's channel of one sequence.
struct Lane {
  bool some;
  int64_t state;  // of states [sequences, dim]
  int64_t first;  // element of the first token
  int count;

  AF_DEVICE static Lane of(const DiagScanParams& p) {
    const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (n >= p.sequences * p.dim) return {false, 0, 0, 0};
    const Tokens tokens = tokens_of(p.rows, p.cu_seqlens, static_cast<int>(n / p.dim));
    return {true, n, (tokens.batch * p.rows + tokens.first) * p.dim + n % p.dim, tokens.count};
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    diag_scan_fwd_kernel(const __grid_constant__ DiagScanParams p) {
  const Lane lane = Lane::of(p);
  if (!lane.some) return;
  const T* x = static_cast<const T*>(p.x) + lane.first;
  const float* g = p.g + lane.first;
  T* out = static_cast<T*>(p.out) + lane.first;
  float h = p.initial_state != nullptr ? p.initial_state[lane.state] : 0.0f;
  for (int t = 0; t < lane.count; t += kAhead) {
    float xs[kAhead], decays[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const bool real = t + i < lane.count;
      xs[i] = real ? widen(x[(t + i) * p.dim]) : 0.0f;
      decays[i] = real ? g[(t + i) * p.dim] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (t + i >= lane.count) break;
      h = ptx::fma(decay_of(clamped_gate(decays[i])), h, xs[i]);
      out[(t + i) * p.dim] = narrow<T>(h);
    }
  }
  if (p.final_state != nullptr) p.final_state[lane.state] = h;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    diag_scan_bwd_kernel(const __grid_constant__ DiagScanParams p) {
  const Lane lane = Lane::of(p);
  if (!lane.some) return;
  const T* x = static_cast<const T*>(p.x) + lane.first;
  const T* dout = static_cast<const T*>(p.dout) + lane.first;
  const float* g = p.g + lane.first;
  T* dx = static_cast<T*>(p.dx) + lane.first;
  float* dg = p.dg + lane.first;
  float h = p.initial_state != nullptr ? p.initial_state[lane.state] : 0.0f;
  for (int t = 0; t < lane.count; t += kAhead) {
    float xs[kAhead], logs[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const bool real = t + i < lane.count;
      xs[i] = real ? widen(x[(t + i) * p.dim]) : 0.0f;
      logs[i] = real ? g[(t + i) * p.dim] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (t + i >= lane.count) break;
      dg[(t + i) * p.dim] = h;
      h = ptx::fma(decay_of(clamped_gate(logs[i])), h, xs[i]);
    }
  }
  float carried = p.dfinal_state != nullptr ? p.dfinal_state[lane.state] : 0.0f;
  for (int end = lane.count; end > 0; end -= kAhead) {
    float douts[kAhead], logs[kAhead], before[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t at = int64_t{end - 1 - i} * p.dim;
      const bool real = end > i;
      douts[i] = real ? widen(dout[at]) : 0.0f;
      logs[i] = real ? g[at] : 0.0f;
      before[i] = real ? dg[at] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (end <= i) break;
      const int64_t at = int64_t{end - 1 - i} * p.dim;
      const float grad = douts[i] + carried;
      carried = decay_of(clamped_gate(logs[i])) * grad;
      dx[at] = narrow<T>(grad);
      dg[at] = before[i] * carried;
    }
  }
  if (p.dinitial_state != nullptr) p.dinitial_state[lane.state] = carried;
}

unsigned blocks_of(const DiagScanParams& p) {
  return static_cast<unsigned>((p.sequences * p.dim + kThreads - 1) / kThreads);
}

}  // namespace

int diag_scan_fwd(const DiagScanParams& params, void* stream) {
  if (blocks_of(params) == 0) return 0;
  return with_dtype(params.dtype, [&]<DType kDType>() {
    using T = typename ElementOf<kDType>::Type;
    return ATTNFORGE_LAUNCH((diag_scan_fwd_kernel<T>), dim3(blocks_of(params)), dim3(kThreads), 0,
                            stream, params);
  });
}

int diag_scan_bwd(const DiagScanParams& params, void* stream) {
  if (blocks_of(params) == 0) return 0;
  return with_dtype(params.dtype, [&]<DType kDType>() {
    using T = typename ElementOf<kDType>::Type;
    return ATTNFORGE_LAUNCH((diag_scan_bwd_kernel<T>), dim3(blocks_of(params)), dim3(kThreads), 0,
                            stream, params);
  });
}

}  // namespace attnforge::cuda
