// Diagonal scan h_t = exp(g_t) h_{t-1} + x_t, channel by channel (HGRN, exponential averages).
//
// A task is kWide vectors of channels of one sequence, walked in time with h in registers: x, g and
// out pass through once, which is what it takes. Backward, with c_t = exp(g_t) dx_t:
//   dx_t = dout_t + c_{t+1},   dg_t = h_{t-1} c_t,   dh_0 = c_1,   dh_T enters as c_{T+1}
// It keeps h before every kSegment-th token and makes the others again, segment by segment from the
// right: x and g are read three times and no h is taken from a rounded output.
#include "cpu/kernels.h"
#include "cpu/linear/tokens.h"
#include "cpu/micro/denormals.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int kWide = 4;  // vectors of a task: one line of 16-bit or four of fp32 numbers per token
constexpr int64_t kTile = kWide * kLanes;
constexpr int64_t kSegment = 64;  // h and exp(g) of a segment fill 32 KiB of L1 on 16 lanes

struct Lane {
  TokenSpan span;
  int64_t sequence, channel, width;  // of the tile: channels that exist
};

AF_INLINE int64_t tiles_of(const DiagScanParams& p) {
  return ceil_div(p.dim, kTile);
}
AF_INLINE Lane lane_of(const DiagScanParams& p, int64_t task) {
  const int64_t sequence = task / tiles_of(p), channel = task % tiles_of(p) * kTile;
  return {token_span(p.cu_seqlens, p.rows, sequence), sequence, channel,
          min64(kTile, p.dim - channel)};
}

template <class T>
AF_INLINE T* row_of(const DiagScanParams& p, T* data, const Lane& lane, int64_t t) {
  return data + (lane.span.batch * p.rows + lane.span.first + t) * p.dim + lane.channel;
}

// The n-th vector of a row or state of the tile.
template <class T>
AF_INLINE VecF get(const T* row, const Lane& lane, int n) {
  const int64_t left = lane.width - n * kLanes;
  return left > 0 ? load_partial(row + n * kLanes, left) : VecF{};
}
template <class T>
AF_INLINE void put(T* row, const Lane& lane, int n, VecF x) {
  const int64_t left = lane.width - n * kLanes;
  if (left > 0) store_partial(row + n * kLanes, x, left);
}
AF_INLINE VecF get_state(const float* states, const DiagScanParams& p, const Lane& lane, int n) {
  return states ? get(states + lane.sequence * p.dim + lane.channel, lane, n) : VecF{};
}

// h = exp(g) h + x for tokens [t, end); each(t, n, decay, before, after) sees every vector.
template <class T, class F>
AF_INLINE void walk(const DiagScanParams& p, const Lane& lane, int64_t t, int64_t end, VecF* h,
                    const F& each) {
  const T* x = row_of(p, static_cast<const T*>(p.x), lane, t);
  const float* g = row_of(p, p.g, lane, t);
  for (; t < end; ++t, x += p.dim, g += p.dim) {
    if (t + kRowsAhead < end) {
      prefetch_row(x + kRowsAhead * p.dim, lane.width);
      prefetch_row(g + kRowsAhead * p.dim, lane.width);
    }
    for (int n = 0; n < kWide; ++n) {
      const VecF decay = exp2(gate_log2(get(g, lane, n))), before = h[n];
      h[n] = fma(decay, before, get(x, lane, n));
      each(t, n, decay, before, h[n]);
    }
  }
}

template <class T>
void forward(const DiagScanParams& p, int64_t task) {
  const Lane lane = lane_of(p, task);
  VecF h[kWide];
  for (int n = 0; n < kWide; ++n) h[n] = get_state(p.initial_state, p, lane, n);
  T* out = row_of(p, static_cast<T*>(p.out), lane, 0);
  walk<T>(p, lane, 0, lane.span.rows, h,
          [&](int64_t t, int n, VecF, VecF, VecF after)
              __attribute__((always_inline)) { put(out + t * p.dim, lane, n, after); });
  if (!p.final_state) return;
  for (int n = 0; n < kWide; ++n) {
    put(p.final_state + lane.sequence * p.dim + lane.channel, lane, n, h[n]);
  }
}

AF_INLINE int64_t worker_floats(const DiagScanParams& p) {
  return (ceil_div(p.rows, kSegment) + 2 * kSegment) * kTile;
}

template <class T>
void backward(const DiagScanParams& p, int64_t task, float* scratch) {
  const Lane lane = lane_of(p, task);
  const int64_t rows = lane.span.rows, segments = ceil_div(rows, kSegment);
  float *hs = scratch, *decays = hs + kSegment * kTile, *starts = decays + kSegment * kTile;
  VecF h[kWide], c[kWide];
  for (int n = 0; n < kWide; ++n) {
    h[n] = get_state(p.initial_state, p, lane, n);
    c[n] = get_state(p.dfinal_state, p, lane, n);
  }
  for (int64_t s = 0; s < segments; ++s) {
    for (int n = 0; n < kWide; ++n) store(starts + s * kTile + n * kLanes, h[n]);
    if (s + 1 == segments) break;
    walk<T>(p, lane, s * kSegment, (s + 1) * kSegment, h,
            [](int64_t, int, VecF, VecF, VecF) __attribute__((always_inline)) {});
  }
  for (int64_t s = segments - 1; s >= 0; --s) {
    const int64_t first = s * kSegment, end = min64(rows, first + kSegment);
    for (int n = 0; n < kWide; ++n) h[n] = load(starts + s * kTile + n * kLanes);
    walk<T>(p, lane, first, end, h,
            [&](int64_t t, int n, VecF decay, VecF before, VecF) __attribute__((always_inline)) {
              const int64_t at = (t - first) * kTile + n * kLanes;
              store(hs + at, before);
              store(decays + at, decay);
            });
    for (int64_t t = end - 1; t >= first; --t) {
      const T* dout = row_of(p, static_cast<const T*>(p.dout), lane, t);
      T* dx = row_of(p, static_cast<T*>(p.dx), lane, t);
      float* dg = row_of(p, p.dg, lane, t);
      for (int n = 0; n < kWide; ++n) {
        const int64_t at = (t - first) * kTile + n * kLanes;
        const VecF x = get(dout, lane, n) + c[n];
        c[n] = load(decays + at) * x;
        put(dx, lane, n, x);
        put(dg, lane, n, load(hs + at) * c[n]);
      }
    }
  }
  if (!p.dinitial_state) return;
  for (int n = 0; n < kWide; ++n) {
    put(p.dinitial_state + lane.sequence * p.dim + lane.channel, lane, n, c[n]);
  }
}

}  // namespace

void diag_scan_fwd(const DiagScanParams& p, const Workers& workers) {
  dispatch_dtype(p.dtype, [&](auto element) {
    parallel_tasks(workers, p.sequences * tiles_of(p), [&](int64_t task, int64_t) {
      FlushDenormals flush;
      forward<decltype(element)>(p, task);
    });
  });
}

int64_t diag_scan_bwd_workspace(const DiagScanParams& p, int64_t num_threads) {
  return num_threads * worker_floats(p) * 4;
}

void diag_scan_bwd(const DiagScanParams& p, const Workers& workers) {
  float* scratch = static_cast<float*>(p.workspace);
  dispatch_dtype(p.dtype, [&](auto element) {
    parallel_tasks(workers, p.sequences * tiles_of(p), [&](int64_t task, int64_t worker) {
      FlushDenormals flush;
      backward<decltype(element)>(p, task, scratch + worker * worker_floats(p));
    });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
