// Attention to listed keys, backward: dK and dV of each key, the sum over the entries that name it
// (indexed_dkdv.cu), ascending. A warp has a key of a KV head, its lanes have channels: one owner,
// one order, no atomics. Keys that no list names get zeros. bytes: 4 (D + Dv) per entry that names
// a key, dK and dV once.
#include "cuda/flash/launch.h"
#include "cuda/launch.h"
#include "cuda/retrieval/launch.h"
#include "cuda/tile/element.h"
#include "cuda/tile/sequence.h"
#include "cuda/tile/team.h"

namespace attnforge::cuda {
namespace {

constexpr int kWarps = 8, kWidth = 256;  // of rows that a warp holds

// The entries that name a key.
struct Naming {
  const int32_t* entries;
  int count;
};

template <class T>
AF_DEVICE void add_entries(const Naming& naming, const float* from, int dim, T* to) {
  constexpr int kParts = kWidth / 128;
  float sum[kParts][4] = {};
  const int lane = static_cast<int>(ptx::lane_id());
  for (int n = 0; n < naming.count; ++n) {
    const float* row = from + int64_t{naming.entries[n]} * dim;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int d = 128 * part + 4 * lane;
      if (d >= dim) continue;
      const ptx::U32x4 x = ptx::load_global_16_streaming(row + d);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[part][i] += ptx::float_from_bits(x.v[i]);
    }
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int d = 128 * part + 4 * lane;
    if (d >= dim) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) to[d + i] = narrow<T>(sum[part][i]);
  }
}

// entries: of a KV head, those of its query heads one behind the other.
template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    indexed_sum_kernel(const __grid_constant__ IndexedBwdParams params,
                       const __grid_constant__ EntryGrads grads,
                       const __grid_constant__ NamedRef named, int64_t entries) {
  const FlashProblem& p = params.flash.problem;
  const int64_t id = int64_t{blockIdx.x} * kWarps + warp_id();
  if (id >= p.batch * p.heads_k * p.seqlen_k) return;
  const int64_t key = id % p.seqlen_k, unit = id / p.seqlen_k;
  const int head = static_cast<int>(unit % p.heads_k), batch = static_cast<int>(unit / p.heads_k);
  const int64_t list = batch * named.heads + (named.heads > 1 ? head : 0);
  const int32_t* start = named.starts + list * (p.seqlen_k + 1) + key;
  const Naming naming = {named.entries + list * entries + start[0], start[1] - start[0]};
  const int d = static_cast<int>(p.head_dim), dv = static_cast<int>(p.v_head_dim);
  add_entries(naming, grads.k + unit * entries * d, d,
              row_ptr<T>(params.flash.dk, batch, key, head));
  add_entries(naming, grads.v + unit * entries * dv, dv,
              row_ptr<T>(params.flash.dv, batch, key, head));
}

}  // namespace

int indexed_sum(const IndexedBwdParams& params, const EntryGrads& grads, const NamedRef& named,
                void* stream) {
  const FlashProblem& p = params.flash.problem;
  const int64_t keys = p.batch * p.heads_k * p.seqlen_k;
  if (keys == 0) return 0;
  const bool own = params.lists.heads == p.heads_q;
  const int64_t entries = params.lists.slots * (own ? p.heads_q / p.heads_k : 1);
  return with_dtype(p.dtype, [&]<DType kDType>() {
    using T = typename ElementOf<kDType>::Type;
    return ATTNFORGE_LAUNCH((indexed_sum_kernel<T>),
                            dim3(static_cast<unsigned>((keys + kWarps - 1) / kWarps)),
                            dim3(32 * kWarps), 0, stream, params, grads, named, entries);
  });
}

}  // namespace attnforge::cuda
