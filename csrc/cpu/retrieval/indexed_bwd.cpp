// Attention to listed keys, backward.
//
//   P = exp(S - LSE), dS = P (dO V^T - delta), delta = rowsum(dO O) - dLSE
//   dQ = scale dS K, dK += scale dS^T Q, dV += P^T dO, dlog_bias = sum over rows of dS
//
// A task is one KV head of one sequence: its rows one after another, in the order of their lists.
// dK and dV of that head are summed in fp32 in the worker's scratch, so nothing is shared: no
// atomics, the same bits for any number of threads. Scratch is 4 (D + Dv) bytes per key and worker.
#include "cpu/kernels.h"
#include "cpu/micro/pack.h"
#include "cpu/micro/parallel.h"
#include "cpu/retrieval/lists.h"

namespace attnforge::cpu {
ATTNFORGE_DECLARE_ISA(ATTNFORGE_ISA)
}

namespace attnforge::cpu::ATTNFORGE_ISA {
namespace {

struct Scratch {
  float *dk, *dv;        // [keys][ld]
  float *q, *dout, *dq;  // one row; q scaled
  int64_t ldk, ldv;
};

AF_INLINE Scratch take_scratch(Arena& a, const FlashProblem& p) {
  Scratch w;
  w.ldk = round_up(p.head_dim, kLanes), w.ldv = round_up(p.v_head_dim, kLanes);
  w.dk = a.take<float>(p.seqlen_k * w.ldk);
  w.dv = a.take<float>(p.seqlen_k * w.ldv);
  w.q = a.take<float>(w.ldk);
  w.dq = a.take<float>(w.ldk);
  w.dout = a.take<float>(w.ldv);
  return w;
}

template <class T>
AF_INLINE void widen_row(const T* src, int64_t dim, float scale, float* dst) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    store(dst + d, load_partial(src + d, dim - d) * splat(scale));
  }
}

template <class T>
AF_INLINE void narrow_row(const float* src, int64_t dim, T* dst) {
  for (int64_t d = 0; d < dim; d += kLanes) store_partial(dst + d, load(src + d), dim - d);
}

template <class T>
AF_INLINE float dot(const float* a, const T* b, int64_t dim) {
  VecF sum{};
  for (int64_t d = 0; d < dim; d += kLanes) {
    sum = fma(load(a + d), load_partial(b + d, dim - d), sum);
  }
  return reduce_add(sum);
}

AF_INLINE void axpy(float a, const float* x, int64_t ld, float* y) {
  for (int64_t d = 0; d < ld; d += kLanes) store(y + d, fma(splat(a), load(x + d), load(y + d)));
}

// dO . O - dLSE, where O is out + out_lo.
template <class T>
AF_INLINE float row_delta(const FlashBwdParams& f, const Sequence& seq, int64_t head, int64_t i,
                          const float* dout) {
  const int64_t dim = f.problem.v_head_dim;
  const T* out = row_ptr<const T>(f.out, seq.batch, i, head);
  const T* low = f.out_lo.data ? row_ptr<const T>(f.out_lo, seq.batch, i, head) : nullptr;
  VecF sum{};
  for (int64_t d = 0; d < dim; d += kLanes) {
    VecF o = load_partial(out + d, dim - d);
    if (low) o += load_partial(low + d, dim - d);
    sum = fma(o, load(dout + d), sum);
  }
  const float extra = f.dlse.data ? *stat_ptr(f.dlse, seq, head, i) : 0.0f;
  return reduce_add(sum) - extra;
}

template <class T>
AF_INLINE void run_row(const IndexedBwdParams& params, const Sequence& seq, int64_t kv_head,
                       int64_t head, int64_t i, const List& list, float* dbias, const Scratch& w) {
  const FlashBwdParams& f = params.flash;
  const FlashProblem& p = f.problem;
  widen_row(row_ptr<const T>(f.q, seq.batch, i, head), p.head_dim, p.softmax_scale, w.q);
  widen_row(row_ptr<const T>(f.dout, seq.batch, i, head), p.v_head_dim, 1.0f, w.dout);
  fill(w.dq, 0, w.ldk, 0.0f);
  const float lse = *stat_ptr(f.lse, seq, head, i);
  const float lse2 = lse == -kInf ? 0.0f : lse * kLog2E;
  const float delta = lse == -kInf ? 0.0f : row_delta<T>(f, seq, head, i, w.dout);
  for_entries(list, seq.k_len, [&](int64_t entry, int64_t key, float bias) {
    const T* k = row_ptr<const T>(f.k, seq.batch, key, kv_head);
    const T* v = row_ptr<const T>(f.v, seq.batch, key, kv_head);
    const float s2 = (dot(w.q, k, p.head_dim) + bias) * kLog2E - lse2;
    const float weight = exp2(splat(s2 > 127.0f ? 127.0f : s2))[0];
    const float ds = weight * (dot(w.dout, v, p.v_head_dim) - delta);
    axpy(weight, w.dout, w.ldv, w.dv + key * w.ldv);
    axpy(ds, w.q, w.ldk, w.dk + key * w.ldk);
    for (int64_t d = 0; d < p.head_dim; d += kLanes) {
      const VecF x = load_partial(k + d, p.head_dim - d);
      store(w.dq + d, fma(splat(ds), x, load(w.dq + d)));
    }
    if (dbias) dbias[entry] += ds;
  });
  for (int64_t d = 0; d < w.ldk; d += kLanes) {
    store(w.dq + d, load(w.dq + d) * splat(p.softmax_scale));
  }
  narrow_row(w.dq, p.head_dim, row_ptr<T>(f.dq, seq.batch, i, head));
}

template <class T>
AF_INLINE void run_unit(const IndexedBwdParams& params, int64_t unit, const Scratch& w) {
  const FlashBwdParams& f = params.flash;
  const FlashProblem& p = f.problem;
  const KeyLists& lists = params.lists;
  const int64_t kv_head = unit % p.heads_k, group = group_size(p);
  const Sequence seq = sequence(p, unit / p.heads_k);
  const int64_t grad_heads = max64(lists.heads, p.heads_k);
  fill(w.dk, 0, p.seqlen_k * w.ldk, 0.0f);
  fill(w.dv, 0, p.seqlen_k * w.ldv, 0.0f);
  for (int64_t g = 0; g < group; ++g) {
    const int64_t head = kv_head * group + g;
    const bool own = lists.heads == p.heads_q;
    const List list = list_of(lists, seq.batch, own ? head : shared_list(p, lists, kv_head));
    const int64_t grad_head = own ? head : kv_head;
    float* dbias = params.dlog_bias;
    if (dbias) dbias += (seq.batch * grad_heads + grad_head) * lists.slots;
    for (int64_t i = 0; i < p.seqlen_q; ++i) {
      run_row<T>(params, seq, kv_head, head, i, list, dbias, w);
    }
  }
  for (int64_t key = 0; key < p.seqlen_k; ++key) {
    narrow_row(w.dk + key * w.ldk, p.head_dim, row_ptr<T>(f.dk, seq.batch, key, kv_head));
    narrow_row(w.dv + key * w.ldv, p.v_head_dim, row_ptr<T>(f.dv, seq.batch, key, kv_head));
  }
}

AF_INLINE int64_t scratch_bytes(const FlashProblem& p) {
  Arena a{nullptr};
  take_scratch(a, p);
  return a.used;
}

}  // namespace

int64_t indexed_bwd_workspace(const IndexedBwdParams& params, int64_t num_threads) {
  return scratch_bytes(params.flash.problem) * num_threads;
}

void indexed_bwd(const IndexedBwdParams& params, const Workers& workers) {
  const FlashProblem& p = params.flash.problem;
  const int64_t bytes = scratch_bytes(p);
  dispatch_dtype(p.dtype, [&](auto element) {
    parallel_tasks(workers, p.batch * p.heads_k, [&](int64_t unit, int64_t worker) {
      Arena a{static_cast<char*>(params.flash.workspace) + worker * bytes};
      run_unit<decltype(element)>(params, unit, take_scratch(a, p));
    });
  });
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
