// log_bias = -log(u + clip) of the keys that were hit, where u is the probability of that: with
// p = 1 - angle / pi and P = p^bits, a key is hit at least twice of L times with
//
//   u = 1 - (1 - P)^L - L P (1 - P)^(L - 1)
//
// Where L P < 1 the difference cancels: the binomial tail is summed there, term by term. With
// min_hits 1, u is 1 - (1 - P)^L. The angle is that of the query and the centred key.
//
//   warp       32 hits: the products with the query one after the other, lanes having channels,
//   then
//              a hit per lane. Warps of a query head share its hits out, so that a grid does not
//              depend on how many there are
//   bytes      the rows of K that are hit
//
// Source: MagicPIG (Chen et al., 2024); the code is our own. Limits: head dims up to 256.
#include "cuda/launch.h"
#include "cuda/retrieval/lane_row.h"
#include "cuda/retrieval/launch.h"

namespace attnforge::cuda {
namespace {

constexpr int kWarps = 4, kPairs = 4;
constexpr int kMostParts = 16;    // blocks of a query head: 2,048 hits at a time
constexpr float kLeast = 1e-12f;  // of an inclusion probability that is a divisor
constexpr int kTerms = 12;        // of the binomial tail: the next one is below 1e-9 of the sum

// 1 - acos(c) / pi for c in [-1, 1], relative error below 1e-6 for either sign: Abramowitz and
// Stegun 4.4.46 gives acos of |c|, which is what is left of pi for a negative one.
AF_DEVICE float collision(float c) {
  const float x = c < 0.0f ? -c : c;
  constexpr float kSeries[] = {0.0066700901f, -0.0170881256f, 0.0308918810f, -0.0501743046f,
                               0.0889789874f, -0.2145988016f, 1.5707963050f};
  float p = -0.0012624911f;
#pragma unroll
  for (int i = 0; i < 7; ++i) p = ptx::fma(p, x, kSeries[i]);
  const float part = p * ptx::sqrt(1.0f - x) * 0.31830988618f;
  return c < 0.0f ? part : 1.0f - part;
}

AF_DEVICE float power(float x, int n) {
  float y = 1.0f;
  for (; n > 0; n >>= 1, x *= x) {
    if (n & 1) y *= x;
  }
  return y;
}

// The probability that a key at cosine c is hit at least min_hits (1 or 2) times.
AF_DEVICE float inclusion(float c, int bits, int tables, int min_hits) {
  const float p = power(collision(c), bits), miss = 1.0f - p, l = static_cast<float>(tables);
  const float none = power(miss, tables - 1);
  float term = l * p * none, tail = min_hits == 1 ? term : 0.0f;
  const float sure = 1.0f - none * miss - (min_hits == 2 ? term : 0.0f);
  // From the term of j hits to that of j + 1: (l - j) / (j + 1) p / (1 - p).
  const float ratio = miss > 0.0f ? p / miss : 0.0f;
#pragma unroll
  for (int j = 1; j <= kTerms; ++j) {
    term *= ratio * ((l - static_cast<float>(j)) * (1.0f / static_cast<float>(j + 1)));
    tail += term;
  }
  return p * l < 1.0f ? tail : sure;
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    lsh_weigh_kernel(const __grid_constant__ LshRetrieveParams params, int parts) {
  using Lanes = LaneRow<kPairs>;
  const FlashProblem& p = params.problem;
  const int part = static_cast<int>(blockIdx.x) % parts;
  const int64_t row = blockIdx.x / static_cast<unsigned>(parts);
  const int head = static_cast<int>(row % p.heads_q), batch = static_cast<int>(row / p.heads_q);
  const int kv_head = head / static_cast<int>(p.heads_q / p.heads_k);
  const int64_t unit = batch * p.heads_k + kv_head;
  const int dim = static_cast<int>(p.head_dim), lane = static_cast<int>(ptx::lane_id());
  const int count = params.lens[row], first = 32 * (kWarps * part + warp_id());
  if (first >= count) return;

  // Scaled by the largest element: squares neither overflow nor vanish.
  Lanes q = Lanes::of(row_ptr<const T>(params.q, batch, 0, head), dim);
  const auto larger = [](float most, float a, float b) {
    return ptx::max(most, ptx::max(a < 0.0f ? -a : a, b < 0.0f ? -b : b));
  };
  float top = q.part(q, larger);
  top = over_warp(top, [](float a, float b) { return ptx::max(a, b); });
  const float scale = top > 0.0f ? 1.0f / top : 0.0f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) q.x[i] = {q.x[i].x * scale, q.x[i].y * scale};
  const float norm = ptx::sqrt(q.dot(q));
  const float shift =
      params.mean == nullptr ? 0.0f : q.dot(Lanes::of(params.mean + unit * p.head_dim, dim));
  const float* norms = params.norms + unit * params.norm_stride;
  const int32_t* ids = params.ids + row * params.slots;
  float* log_bias = params.log_bias + row * params.slots;
  for (int start = first; start < count; start += 32 * kWarps * parts) {
    const int here = at_most(32, count - start);
    const int own = lane < here ? ids[start + lane] : 0;
    float product = 0.0f;
#pragma unroll 4
    for (int n = 0; n < here; ++n) {
      const int key = ptx::shuffle_from(own, n);
      const float x = q.dot(Lanes::of(row_ptr<const T>(params.k, batch, key, kv_head), dim));
      if (lane == n) product = x;
    }
    if (lane >= here) continue;
    const float size = norm * norms[own];
    float c = size > 0.0f ? (product - shift) / size : 0.0f;
    c = c > 1.0f ? 1.0f : c < -1.0f ? -1.0f : c == c ? c : 0.0f;
    const LshTables& t = params.tables;
    float u = inclusion(c, static_cast<int>(t.bits), static_cast<int>(t.tables),
                        static_cast<int>(params.min_hits));
    u = at_most(1.0f, at_least(kLeast, u + params.clip));
    log_bias[start + lane] = ptx::log2_approx(u) * -kLn2;
  }
}

}  // namespace

int lsh_weigh(const LshRetrieveParams& params, void* stream) {
  const FlashProblem& p = params.problem;
  constexpr int64_t kHits = 32 * kWarps;
  const int64_t most = (params.slots + kHits - 1) / kHits;
  const int parts = static_cast<int>(most < kMostParts ? most : kMostParts);
  const auto blocks = static_cast<unsigned>(p.batch * p.heads_q * parts);
  if (blocks == 0) return 0;
  return with_dtype(p.dtype, [&]<DType kDType>() {
    using T = typename ElementOf<kDType>::Type;
    return ATTNFORGE_LAUNCH((lsh_weigh_kernel<T>), dim3(blocks), dim3(32 * kWarps), 0, stream,
                            params, parts);
  });
}

}  // namespace attnforge::cuda
