// The two steps of k-means: the nearest centroid of every key, and the sums of clusters.
//
//   nearest   kTileRows rows of x against panels of centroids, kPanels of them at a time, so that
//             scores stay in cache; a lane keeps the largest it has seen and where, and lanes meet
//             at the end. Of equal scores the first centroid wins; NaN never does
//   sums      a task is a slice of channels of one head, over all rows in their order
//
//   flops     2 rows clusters dim per head, 4 instructions per vector of scores beside them
//   bytes     centroids once per tile of rows, from the last-level cache
#include "cpu/kernels.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/parallel.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

constexpr int64_t kTileRows = 96;  // a multiple of every kMR
constexpr int64_t kPanels = 4;
constexpr int64_t kLds = kPanels * kNR;  // 96 x 64 floats of scores: a part of L2
constexpr int64_t kSlice = 64;           // channels of a task of sums

struct Layout {
  int64_t panels, columns;  // of a head's centroids, padded
};

AF_INLINE Layout layout_of(const NearestParams& params) {
  const int64_t panels = ceil_div(params.clusters, kNR);
  return {panels, panels * kNR};
}

struct Scratch {
  float* x;       // row groups
  float* scores;  // [kTileRows][kLds]
  float* best;    // [kTileRows][kLanes]
  int32_t* at;    // like best
};

AF_INLINE Scratch take_scratch(Arena& a, int64_t dim) {
  Scratch w;
  w.x = a.take<float>(kTileRows * dim);
  w.scores = a.take<float>(kTileRows * kLds);
  w.best = a.take<float>(kTileRows * kLanes);
  w.at = a.take<int32_t>(kTileRows * kLanes);
  return w;
}

struct Room {
  float* panels;  // [heads][panels][dim][kNR]
  float* shift;   // [heads][columns]
  char* scratch;
  int64_t scratch_bytes;
};

AF_INLINE int64_t place_room(Room& room, const NearestParams& params, int64_t threads, char* base) {
  const Layout y = layout_of(params);
  Arena a{base}, one{nullptr};
  room.panels = a.take<float>(params.heads * y.columns * params.dim);
  room.shift = a.take<float>(params.heads * y.columns);
  take_scratch(one, params.dim);
  room.scratch = base + a.used, room.scratch_bytes = one.used;
  return a.used + one.used * threads;
}

AF_INLINE void pack_panel(const NearestParams& params, const Layout& y, const Room& room,
                          int64_t head, int64_t panel) {
  const int64_t first = panel * kNR, n = min64(kNR, params.clusters - first);
  const float* c = params.c + (head * params.clusters + first) * params.dim;
  float* dst = room.panels + (head * y.columns + first) * params.dim;
  for (int64_t d = 0; d < params.dim; ++d) {
    for (int64_t j = 0; j < kNR; ++j) dst[d * kNR + j] = j < n ? c[j * params.dim + d] : 0.0f;
  }
  float* shift = room.shift + head * y.columns + first;
  const float* own = params.shift ? params.shift + head * params.clusters + first : nullptr;
  for (int64_t j = 0; j < kNR; ++j) shift[j] = j >= n ? kInf : own ? own[j] : 0.0f;
}

// Scores of `rows` rows at columns [column, column + n) against what each lane has seen.
AF_INLINE void keep_largest(const Scratch& w, int64_t rows, const float* shift, int64_t column,
                            int64_t n) {
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int64_t r = 0; r < rows; ++r) {
    VecF best = load(w.best + r * kLanes);
    VecI at = load_raw<VecI>(w.at + r * kLanes), here = lane + static_cast<int32_t>(column);
    for (int64_t c = 0; c < n; c += kLanes, here += kLanes) {
      const VecF s = load(w.scores + r * kLds + c) - load(shift + c);
      const VecI larger = s > best;
      best = larger ? s : best;
      at = larger ? here : at;
    }
    store(w.best + r * kLanes, best);
    store_raw(w.at + r * kLanes, at);
  }
}

AF_INLINE void label_tile(const NearestParams& params, const Layout& y, const Room& room,
                          int64_t head, int64_t row0, int64_t rows, const Scratch& w) {
  const int64_t dim = params.dim;
  for (int64_t r = 0; r < rows; ++r) {
    pack_row(params.x + (head * params.rows + row0 + r) * dim, dim, 1.0f, r, w.x);
  }
  zero_rows(rows, round_up(rows, kMR), dim, w.x);
  for (int64_t r = 0; r < rows; ++r) {
    store(w.best + r * kLanes, splat(-kInf));
    store_raw(w.at + r * kLanes, VecI{});
  }
  const float* panels = room.panels + head * y.columns * dim;
  const float* shift = room.shift + head * y.columns;
  for (int64_t panel = 0; panel < y.panels; panel += kPanels) {
    const int64_t n = min64(kPanels, y.panels - panel);
    gemm<1, kMR>(rows, 2 * n, dim, w.x, dim, panels + panel * dim * kNR, dim * kNR, w.scores, kLds,
                 false);
    keep_largest(w, rows, shift + panel * kNR, panel * kNR, n * kNR);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* best = w.best + r * kLanes;
    const int32_t* at = w.at + r * kLanes;
    int64_t top = 0;
    for (int64_t i = 1; i < kLanes; ++i) {
      if (best[i] > best[top] || (best[i] == best[top] && at[i] < at[top])) top = i;
    }
    params.labels[head * params.rows + row0 + r] = at[top];
  }
}

}  // namespace

int64_t nearest_workspace(const NearestParams& params, int64_t num_threads) {
  Room room;
  return place_room(room, params, num_threads, nullptr);
}

void nearest(const NearestParams& params, const Workers& workers) {
  const Layout y = layout_of(params);
  Room room;
  place_room(room, params, workers.num_threads, static_cast<char*>(params.workspace));
  parallel_tasks(workers, params.heads * y.panels, [&](int64_t task, int64_t) {
    pack_panel(params, y, room, task / y.panels, task % y.panels);
  });
  const int64_t tiles = ceil_div(params.rows, kTileRows);
  parallel_tasks(workers, params.heads * tiles, [&](int64_t task, int64_t worker) {
    Arena own{room.scratch + worker * room.scratch_bytes};
    const int64_t row0 = task % tiles * kTileRows;
    label_tile(params, y, room, task / tiles, row0, min64(kTileRows, params.rows - row0),
               take_scratch(own, params.dim));
  });
}

void cluster_sums(const ClusterSumsParams& params, const Workers& workers) {
  const int64_t slices = ceil_div(params.dim, kSlice);
  parallel_tasks(workers, params.heads * slices, [&](int64_t task, int64_t) {
    const int64_t head = task / slices, d0 = task % slices * kSlice;
    const int64_t n = min64(kSlice, params.dim - d0);
    float* sums = params.sums + head * params.clusters * params.dim + d0;
    int32_t* counts = params.counts + head * params.clusters;
    for (int64_t c = 0; c < params.clusters; ++c) {
      __builtin_memset(sums + c * params.dim, 0, n * sizeof(float));
      if (d0 == 0) counts[c] = 0;
    }
    for (int64_t r = 0; r < params.rows; ++r) {
      const int64_t label = params.labels[head * params.rows + r];
      if (label < 0 || label >= params.clusters) continue;  // labels are data
      const float* x = params.x + (head * params.rows + r) * params.dim + d0;
      float* sum = sums + label * params.dim;
      int64_t d = 0;
      for (; d + kLanes <= n; d += kLanes) store(sum + d, load(sum + d) + load(x + d));
      for (; d < n; ++d) sum[d] += x[d];
      if (d0 == 0) ++counts[label];
    }
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
