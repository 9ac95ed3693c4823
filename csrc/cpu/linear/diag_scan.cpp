// Diagonal scan h_t = exp(g_t) h_{t-1} + x_t, channel by channel (HGRN, exponential averages).
//
// A task is up to kWide vectors of channels of one sequence, walked in time with h in L1: x, g and
// out pass through once, which is what it takes. A row of a task is one run of 1 KiB of fp32 (16
// lanes), long enough for the hardware to fetch ahead. Backward, with c_t = exp(g_t) dx_t:
//   dx_t = dout_t + c_{t+1},   dg_t = h_{t-1} c_t,   dh_0 = c_1,   dh_T enters as c_{T+1}
// It keeps h before every kSegment-th token and makes the others again, segment by segment from the
// right: x and g are read three times and no h is taken from a rounded output. Factors near 1 keep
// the digits of their distance from 1 (`Kept`): they multiply once per token.
#include "cpu/kernels.h"
#include "cpu/linear/tokens.h"
#include "cpu/micro/denormals.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kWide = 16;  // vectors; fewer where there are not tasks enough for the threads
constexpr int64_t kTile = kWide * kLanes;
constexpr int64_t kSegment = 32;  // the h of a segment are 32 KiB on 16 lanes

struct Lane {
  TokenSpan span;
  int64_t sequence, channel, width;  // of the tile: channels that exist
};

// Channels of a task.
AF_INLINE int64_t tile_width(const DiagScanParams& p, int64_t threads) {
  const int64_t per_sequence = ceil_div(threads, max64(1, p.sequences));
  return min64(kTile, round_up(ceil_div(p.dim, per_sequence), kLanes));
}

AF_INLINE Lane lane_of(const DiagScanParams& p, int64_t tile, int64_t task) {
  const int64_t tiles = ceil_div(p.dim, tile), channel = task % tiles * tile;
  return {token_span(p.cu_seqlens, p.rows, task / tiles), task / tiles, channel,
          min64(tile, p.dim - channel)};
}

template <class T>
AF_INLINE T* row_of(const DiagScanParams& p, T* data, const Lane& lane, int64_t t) {
  return data + (lane.span.batch * p.rows + lane.span.first + t) * p.dim + lane.channel;
}

// f(d, get, put) for every vector of a tile: whole ones, then the lanes that are left.
template <class F>
AF_INLINE void each_vector(int64_t width, const F& f) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    f(
        d, [&](const auto* row) __attribute__((always_inline)) { return load(row + d); },
        [&](auto* row, VecF x) __attribute__((always_inline)) { store(row + d, x); });
  }
  if (d == width) return;
  f(
      d,
      [&](const auto* row)
          __attribute__((always_inline)) { return load_partial(row + d, width - d); },
      [&](auto* row, VecF x)
          __attribute__((always_inline)) { store_partial(row + d, x, width - d); });
}

// A state into the tile h, zeros without one.
AF_INLINE void read_state(const float* states, const DiagScanParams& p, const Lane& lane,
                          float* h) {
  const float* own = states + lane.sequence * p.dim + lane.channel;
  each_vector(lane.width,
              [&](int64_t d, const auto& get, const auto&)
                  __attribute__((always_inline)) { store(h + d, states ? get(own) : VecF{}); });
}
AF_INLINE void write_state(const float* h, const DiagScanParams& p, const Lane& lane,
                           float* states) {
  if (!states) return;
  float* own = states + lane.sequence * p.dim + lane.channel;
  each_vector(lane.width, [&](int64_t d, const auto&, const auto& put)
                              __attribute__((always_inline)) { put(own, load(h + d)); });
}

// h = exp(g) h + x for tokens [t, end); each(t, d, put, before, after) sees every vector.
template <class T, class F>
AF_INLINE void walk(const DiagScanParams& p, const Lane& lane, int64_t t, int64_t end, float* h,
                    const F& each) {
  const T* x = row_of(p, static_cast<const T*>(p.x), lane, t);
  const float* g = row_of(p, p.g, lane, t);
  for (; t < end; ++t, x += p.dim, g += p.dim) {
    if (t + kRowsAhead < end) {
      prefetch_row(x + kRowsAhead * p.dim, lane.width);
      prefetch_row(g + kRowsAhead * p.dim, lane.width);
    }
    each_vector(lane.width,
                [&](int64_t d, const auto& get, const auto& put) __attribute__((always_inline)) {
                  const VecF before = load(h + d);
                  const VecF after = kept_of(get(g))(before, get(x));
                  store(h + d, after);
                  each(t, d, put, before, after);
                });
  }
}

template <class T>
void forward(const DiagScanParams& p, const Lane& lane) {
  alignas(64) float h[kTile];
  read_state(p.initial_state, p, lane, h);
  T* out = row_of(p, static_cast<T*>(p.out), lane, 0);
  walk<T>(p, lane, 0, lane.span.rows, h,
          [&](int64_t t, int64_t, const auto& put, VecF, VecF after)
              __attribute__((always_inline)) { put(out + t * p.dim, after); });
  write_state(h, p, lane, p.final_state);
}

template <class T>
void backward(const DiagScanParams& p, const Lane& lane, float* scratch) {
  const int64_t rows = lane.span.rows, segments = ceil_div(rows, kSegment);
  float *hs = scratch, *starts = hs + kSegment * kTile;
  alignas(64) float h[kTile], carried[kTile];
  read_state(p.initial_state, p, lane, h);
  read_state(p.dfinal_state, p, lane, carried);
  for (int64_t s = 0; s < segments; ++s) {
    __builtin_memcpy(starts + s * kTile, h, sizeof(h));
    if (s + 1 == segments) break;
    walk<T>(p, lane, s * kSegment, (s + 1) * kSegment, h,
            [](int64_t, int64_t, const auto&, VecF, VecF) __attribute__((always_inline)) {});
  }
  for (int64_t s = segments - 1; s >= 0; --s) {
    const int64_t first = s * kSegment, end = min64(rows, first + kSegment);
    __builtin_memcpy(h, starts + s * kTile, sizeof(h));
    walk<T>(p, lane, first, end, h,
            [&](int64_t t, int64_t d, const auto&, VecF before, VecF)
                __attribute__((always_inline)) { store(hs + (t - first) * kTile + d, before); });
    for (int64_t t = end - 1; t >= first; --t) {
      const T* dout = row_of(p, static_cast<const T*>(p.dout), lane, t);
      T* dx = row_of(p, static_cast<T*>(p.dx), lane, t);
      const float* g = row_of(p, p.g, lane, t);
      float* dg = row_of(p, p.dg, lane, t);
      each_vector(lane.width,
                  [&](int64_t d, const auto& get, const auto& put) __attribute__((always_inline)) {
                    const int64_t at = (t - first) * kTile + d;
                    const VecF x = get(dout) + load(carried + d);
                    const VecF c = kept_of(get(g))(x, VecF{});
                    store(carried + d, c);
                    put(dx, x);
                    put(dg, load(hs + at) * c);
                  });
    }
  }
  write_state(carried, p, lane, p.dinitial_state);
}

AF_INLINE int64_t worker_floats(const DiagScanParams& p) {
  return (ceil_div(p.rows, kSegment) + kSegment) * kTile;
}

// run(element, lane, worker) for every task.
template <class F>
AF_INLINE void every_lane(const DiagScanParams& p, const Workers& workers, const F& run) {
  const int64_t tile = tile_width(p, workers.num_threads);
  if (tile == 0) return;
  dispatch_dtype(p.dtype, [&](auto element) {
    parallel_tasks(workers, p.sequences * ceil_div(p.dim, tile), [&](int64_t task, int64_t worker) {
      FlushDenormals flush;
      run(element, lane_of(p, tile, task), worker);
    });
  });
}

}  // namespace

void diag_scan_fwd(const DiagScanParams& p, const Workers& workers) {
  every_lane(p, workers,
             [&](auto element, const Lane& lane, int64_t) { forward<decltype(element)>(p, lane); });
}

int64_t diag_scan_bwd_workspace(const DiagScanParams& p, int64_t num_threads) {
  return num_threads * worker_floats(p) * 4;
}

void diag_scan_bwd(const DiagScanParams& p, const Workers& workers) {
  float* scratch = static_cast<float*>(p.workspace);
  every_lane(p, workers, [&](auto element, const Lane& lane, int64_t worker) {
    backward<decltype(element)>(p, lane, scratch + worker * worker_floats(p));
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
