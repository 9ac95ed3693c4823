// Gradient of the mass on spans of keys, M_it = sum over keys j of span t of exp(S_ij - LSE_i):
//
//   dS_ij = P_ij dM_it(j) [* (1 - tanh^2) under a softcap], 0 for keys in no span
//   dQ = scale dS K      dK = scale dS^T Q      dLSE_i = -sum_t dM_it M_it
//
// The walker gives P; dS takes its place in the tile and meets K and Q there. dQ has one owner. dK
// is summed in slabs, one for each chunk of rows of a query head, added in their order: one batch
// entry after the other, so that slabs need Hq * chunks * Sk * D floats (chunks * Hq is about
// max(16, Hq)). Flops: 6 D per visible pair. Where K or Q hold NaN or infinity, sums run over pairs
// that are visible and in a span, so that nothing leaks through 0 * NaN.
#include "cpu/reductions/spans.h"

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

// A worker's operands and sums beside its tile.
struct Scratch {
  float* k_columns;  // column panels [D / kNR][kTileKeys][kNR] of one key block
  float* q_columns;  // [D / kNR][kTileRows][kNR], scaled
  float* dq;         // [kTileRows][ldd]
  float* dk;         // [kTileKeys + kMR][ldd]
};

AF_INLINE Scratch take_scratch(Arena& a, int64_t ldd) {
  Scratch w;
  w.k_columns = a.take<float>(kTileKeys * ldd);
  w.q_columns = a.take<float>(kTileRows * ldd);
  w.dq = a.take<float>(kTileRows * ldd);
  w.dk = a.take<float>((kTileKeys + kMR) * ldd);
  return w;
}

struct Layout {
  WalkPlan walk;
  int64_t ldd, scratch_bytes, slab_floats, bytes;
};

AF_INLINE Layout make_layout(const ScoreParams& one, int64_t threads) {
  const FlashProblem& p = one.problem;
  Layout l;
  l.walk = plan_walk(one, kTileRows, sum_chunks(p), threads, p.softcap > 0.0f);
  l.ldd = padded_columns(p.head_dim);
  Arena scratch{nullptr};
  take_scratch(scratch, l.ldd);
  l.scratch_bytes = scratch.used;
  l.slab_floats = p.seqlen_k * l.ldd;
  l.bytes =
      l.walk.bytes + threads * l.scratch_bytes + p.heads_q * l.walk.chunks * l.slab_floats * 4;
  return l;
}

AF_INLINE void axpy_panels(float a, const float* panels, int64_t panel_stride, int64_t dim,
                           float* y) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    store(y + d, fma(splat(a), load(panels + d / kNR * panel_stride + d % kNR), load(y + d)));
  }
}

template <class T>
struct SpanGrad {
  static constexpr Score kScore = Score::kProbability;
  const SpanGradParams& params;
  Scratch w;
  int64_t ldd;
  float* slab;  // [seqlen_k][ldd]: dK of this task
  bool q_finite;

  AF_INLINE_MEMBER void begin(const Tile& t) {
    const FlashProblem& p = t.problem();
    q_finite = true;
    for (int64_t r = 0; r < t.rows; ++r) {
      q_finite &= pack_column_panels(
          row_ptr<const T>(params.scores.q, t.task.seq.batch, t.first + r, t.task.head), 0, 1,
          p.head_dim, p.softmax_scale, w.q_columns + r * kNR, kTileRows * kNR);
    }
    fill(w.dq, 0, kTileRows * ldd, 0.0f);
    fill(params.dlse + t.row(0), 0, t.rows, 0.0f);
  }

  // P of a row becomes dS.
  AF_INLINE_MEMBER void differentiate(const Tile& t, const Block& b, int64_t r) const {
    float* s = t.s + r * kLds;
    const float* slope = t.slope ? t.slope + r * kLds : nullptr;
    const float* dout = params.dout + t.row(r) * params.spans;
    int64_t done = b.lo;
    float sum = 0.0f;
    for_each_span(params.boundaries, params.spans, b.key0, t.columns(r, b.key0),
                  [&](int64_t span, int64_t lo, int64_t hi) {
                    fill(s, done, lo, 0.0f);
                    done = hi;
                    sum += dout[span] * sum_columns(s, lo, hi);
                    int64_t c = lo;
                    for (; c + kLanes <= hi; c += kLanes) {
                      VecF ds = load(s + c) * splat(dout[span]);
                      store(s + c, slope ? ds * load(slope + c) : ds);
                    }
                    for (; c < hi; ++c) s[c] *= slope ? dout[span] * slope[c] : dout[span];
                  });
    fill(s, done, b.hi, 0.0f);
    params.dlse[t.row(r)] -= sum;
  }

  AF_INLINE_MEMBER void block(const Tile& t, const Block& b) {
    const FlashProblem& p = t.problem();
    const ScoreParams& in = params.scores;
    const int64_t keys = min64(b.hi, t.task.seq.k_len - b.key0), d = p.head_dim;
    const T* k = row_ptr<const T>(in.k, t.task.seq.batch, b.key0 + b.lo, t.task.kv_head);
    const bool finite = pack_column_panels(k, in.k.seq_stride, keys - b.lo, d, 1.0f,
                                           w.k_columns + b.lo * kNR, kTileKeys * kNR);
    for (int64_t r = 0; r < t.rows; ++r) differentiate(t, b, r);
    if (finite && q_finite) {
      gemm<kLds, 1>(t.rows, vectors_of(d), keys - b.lo, t.s + b.lo, kLds, w.k_columns + b.lo * kNR,
                    kTileKeys * kNR, w.dq, ldd, true);
      gemm<1, kLds>(keys - b.lo, vectors_of(d), t.rows, t.s + b.lo, 1, w.q_columns, kTileRows * kNR,
                    w.dk, ldd, false);
    } else {
      accumulate_pairs(t, b, keys);
    }
    float* sum = slab + (b.key0 + b.lo) * ldd;
    for (int64_t e = 0; e < (keys - b.lo) * ldd; e += kLanes) {
      store(sum + e, load(sum + e) + load(w.dk + e));
    }
  }

  AF_INLINE_MEMBER void accumulate_pairs(const Tile& t, const Block& b, int64_t keys) const {
    const int64_t d = t.problem().head_dim;
    fill(w.dk, 0, (keys - b.lo) * ldd, 0.0f);
    for (int64_t r = 0; r < t.rows; ++r) {
      for_each_span(params.boundaries, params.spans, b.key0, t.columns(r, b.key0),
                    [&](int64_t, int64_t lo, int64_t hi) {
                      for (int64_t c = lo; c < hi; ++c) {
                        const float ds = t.s[r * kLds + c];
                        axpy_panels(ds, w.k_columns + c * kNR, kTileKeys * kNR, d, w.dq + r * ldd);
                        axpy_panels(ds, w.q_columns + r * kNR, kTileRows * kNR, d,
                                    w.dk + (c - b.lo) * ldd);
                      }
                    });
    }
  }

  AF_INLINE_MEMBER void end(const Tile& t) {
    const FlashProblem& p = t.problem();
    for (int64_t r = 0; r < t.rows; ++r) {
      store_output<T>(w.dq + r * ldd, p.softmax_scale, p.head_dim,
                      row_ptr<T>(params.dq, t.task.seq.batch, t.first + r, t.task.head), nullptr);
    }
  }
};

// dK of one KV head, keys [first, end): slabs of its query heads, added in order.
template <class T>
AF_INLINE void finish_keys(const SpanGradParams& params, const Layout& l, const float* slabs,
                           int64_t kv_head, int64_t first, int64_t end, float* sum) {
  const FlashProblem& p = params.scores.problem;
  const int64_t count = l.walk.group * l.walk.chunks;
  const float* own = slabs + kv_head * count * l.slab_floats;
  for (int64_t key = first; key < end; ++key) {
    for (int64_t e = 0; e < l.ldd; e += kLanes) {
      VecF total = load(own + key * l.ldd + e);
      for (int64_t n = 1; n < count; ++n) total += load(own + n * l.slab_floats + key * l.ldd + e);
      store(sum + e, total);
    }
    store_output<T>(sum, 1.0f, p.head_dim, row_ptr<T>(params.dk, 0, key, kv_head), nullptr);
  }
}

// The params of one batch entry as a batch of one.
AF_INLINE SpanGradParams entry(const SpanGradParams& all, int64_t batch) {
  SpanGradParams one = all;
  FlashProblem& p = one.scores.problem;
  const int64_t item = p.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t rows = batch * p.heads_q * p.seqlen_q;
  auto advance = [&](TensorRef& t) {
    t.data = static_cast<char*>(t.data) + batch * t.batch_stride * item;
  };
  advance(one.scores.q), advance(one.scores.k), advance(one.dq), advance(one.dk);
  one.scores.lse.data += batch * one.scores.lse.batch_stride;
  one.dout += rows * one.spans;
  one.dlse += rows;
  if (p.seqused_k) p.seqused_k += batch;
  if (p.alibi_slopes) p.alibi_slopes += batch * p.alibi_batch_stride;
  p.batch = 1;
  return one;
}

template <class T>
AF_INLINE void run(const SpanGradParams& params, const Layout& l, const Workers& workers) {
  const FlashProblem& p = params.scores.problem;
  char* scratch = static_cast<char*>(params.scores.workspace) + l.walk.bytes;
  float* slabs = reinterpret_cast<float*>(scratch + workers.num_threads * l.scratch_bytes);
  auto scratch_of = [&](int64_t worker) {
    Arena a{scratch + worker * l.scratch_bytes};
    return take_scratch(a, l.ldd);
  };
  walk<T>(params.scores, l.walk, workers, [&](const Task& task) {
    float* slab = slabs + (task.head * l.walk.chunks + task.chunk) * l.slab_floats;
    fill(slab, 0, l.slab_floats, 0.0f);
    return SpanGrad<T>{params, scratch_of(task.worker), l.ldd, slab, true};
  });
  const int64_t blocks = ceil_div(p.seqlen_k, kTileKeys);
  parallel_tasks(workers, p.heads_k * blocks, [&](int64_t task, int64_t worker) {
    const int64_t first = task % blocks * kTileKeys;
    finish_keys<T>(params, l, slabs, task / blocks, first, min64(first + kTileKeys, p.seqlen_k),
                   scratch_of(worker).dk);
  });
}

}  // namespace

int64_t span_grad_workspace(const SpanGradParams& params, int64_t num_threads) {
  return make_layout(entry(params, 0).scores, num_threads).bytes;
}

void span_grad(const SpanGradParams& params, const Workers& workers) {
  for (int64_t batch = 0; batch < params.scores.problem.batch; ++batch) {
    const SpanGradParams one = entry(params, batch);
    const Layout layout = make_layout(one.scores, workers.num_threads);
    dispatch_dtype(one.scores.problem.dtype,
                   [&](auto element) { run<decltype(element)>(one, layout, workers); });
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
