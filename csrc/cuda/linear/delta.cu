// Forward of the delta rules with a gate per head or none (Yang et al., 2024: DeltaNet in chunks,
// Gated DeltaNet). With S [V, K] at a chunk's start and D the decays between its tokens:
//
//   e_i = beta_i (v_i - D_i S k_i)                      what a token's state lacks of its value
//   w_i = e_i - sum_{j < i} beta_i D_ij (k_i k_j) w_j   by forward substitution in blocks of 16
//   o_i = scale (D_i S q_i + sum_{j <= i} D_ij (q_i k_j) w_j)
//   S  <- D S + sum_j D_j w_j k_j^T
//
// The block, its columns and its state are those of walk.cu: a warp has 16 columns of values as
// rows, so the state, e, w and o stay in its registers and each column solves its own system. The
// triangular matrix is never inverted: inverses by powers lose all digits where keys repeat. All
// that feeds back into the state is fp32 for every dtype (the state and w in two tf32 parts beside
// 16-bit keys); what leaves in out is rounded to tf32 once in 16-bit calls.
//
// grid: tiles of 64 columns * value heads * sequences. bytes: as walk.cu, and beta. flops per token
// of a chunk of 32: 2 (2 rows K + 2 rows V + 3 K V), two of the three K V in two parts.
#include "cuda/linear/delta_launch.h"
#include "cuda/linear/leave.h"

namespace attnforge::cuda {

constexpr DType kThisDType = DType::ATTNFORGE_DTYPE;

template <DType kDType, int kDim>
struct DeltaCase {
  static constexpr WalkTile kTile = walk_tile(kDType, kWalkDims[kDim], WalkGate::kWhole);
};

template <class W>
struct DeltaBlock : W {
  // beta_i D_ij k_i k_j below the diagonal, zeros elsewhere.
  static constexpr int kSharedBytes = W::kSharedBytes + W::Between::kBytes;
  static_assert(kSharedBytes <= kMostShared);

  AF_DEVICE typename W::Between erase() const {
    return {this->between().base + W::Between::kBytes};
  }

  // A warp has 16 x 16 of both matrices.
  AF_DEVICE void products(int n, const DecaySums& sums, float beta, float scale) const {
    const int row = warp_id() / 2 * 16, column = warp_id() % 2 * 16;
    Accumulators<1, 2> scores, keys;
    zero<1, 2>(scores), zero<1, 2>(keys);
    if (column <= row) {
      product_nt<1, 2>(scores, this->x(n), row, this->y(n), column);
      product_nt<1, 2>(keys, this->y(n), row, this->y(n), column);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = fragment_row(row, 0, h);
      const DecaySums later = sums.of_lane(i);
      const float share = ptx::shuffle_from(beta, static_cast<uint32_t>(i));
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int j = column + fragment_column(c / 2, c % 2);
        const float decay = later.decay_since(sums.of_lane(j));
        const float score = scores[0][c / 2][2 * h + c % 2] * (scale * decay);
        const float key = keys[0][c / 2][2 * h + c % 2] * (share * decay);
        ptx::store_shared(this->between().element(i, j), j <= i ? score : 0.0f);
        ptx::store_shared(erase().element(i, j), j < i ? key : 0.0f);
      }
    }
  }

  // e -> w in the fragments of 16 tokens from block 2 `half` on, which earlier tokens are out of.
  template <int kHalf>
  AF_DEVICE void substitute(typename W::Output& w) const {
    const int lane = static_cast<int>(ptx::lane_id());
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int block = 2 * kHalf + j / 8;
      const auto owner = static_cast<uint32_t>(lane / 4 * 4 + j % 8 / 2);
      const float first = ptx::shuffle_from(w[block][j % 2], owner);
      const float second = ptx::shuffle_from(w[block][2 + j % 2], owner);
#pragma unroll
      for (int n = block; n < 2 * kHalf + 2; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float l =
              ptx::load_shared<float>(erase().element(fragment_column(n, e), 16 * kHalf + j));
          w[n][e] = ptx::fma(-l, first, w[n][e]);
          w[n][2 + e] = ptx::fma(-l, second, w[n][2 + e]);
        }
      }
    }
  }

  // Solves for the tokens of a chunk of 32: the second half takes the first's by a product.
  AF_DEVICE void solve(typename W::Output& w) const {
    substitute<0>(w);
    Fragments<2> early, late;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) early[n][i] = -w[n][i], late[n][i] = w[2 + n][i];
    }
    using Matrix = AlongRows<typename W::Between>;
    struct LaterRows {
      Matrix matrix;
      AF_DEVICE Blocks load(int n, int k AF_SITE) const {
        return matrix.load(n + 2, k AF_PASS_SITE);
      }
    };
    state_product<Product<float>, 2, 2>(late, early, LaterRows{Matrix::of(erase())});
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) w[2 + n][i] = late[n][i];
    }
    substitute<1>(w);
  }
};

template <class Case>
__global__ void __launch_bounds__(32 * kWalkWarps)
    delta_fwd_kernel(const __grid_constant__ DeltaChunkFwdParams params, int tiles) {
  using W = Walk<Case::kTile>;
  using T = typename W::T;
  using P = typename W::P;
  using Fine = FineProduct<T>;
  using Team = typename W::Team;
  constexpr int kRows = W::kRows;
  static_assert(kRows == 32);
  const DeltaProblem& p = params.problem;
  const int first_column = static_cast<int>(blockIdx.x) % tiles * kWalkColumns;
  const int pair = static_cast<int>(blockIdx.x) / tiles, heads = static_cast<int>(p.value_heads);
  const int head = pair % heads, sequence = pair / heads;
  const int dim = static_cast<int>(p.key_dim);
  const int columns = at_most(static_cast<int>(p.value_dim) - first_column, kWalkColumns);
  const Tokens tokens = tokens_of(p.rows, p.cu_seqlens, sequence);
  const DeltaBlock<W> block = {{ptx::dynamic_shared_memory()}};
  const int lane = static_cast<int>(ptx::lane_id()), own = W::own_column();

  const auto group = static_cast<int32_t>(p.value_heads / p.heads);
  const auto q = WalkRows<const T>::of({p.q, group}, tokens, head, false);
  const auto k = WalkRows<const T>::of({p.k, group}, tokens, head, false);
  auto v = WalkRows<const T>::of({p.v}, tokens, head, false);
  v.first += first_column;
  const auto load = [&](int n) {
    const int row = n * kRows, left = tokens.count - row;
    load_rows<Team>(block.x(n), q.at(row), q.stride, left, dim);
    load_rows<Team>(block.y(n), k.at(row), k.stride, left, dim);
    load_rows<Team>(block.z(n), v.at(row), v.stride, left, columns);
  };

  LinearWalk walk;  // where results go
  walk.rows = p.rows, walk.heads = p.value_heads, walk.columns = p.value_dim;
  walk.out = {params.out};
  const int64_t base = (int64_t{sequence} * heads + head) * p.key_dim * p.value_dim + first_column;
  const auto place = [&](auto* data, int d, int i) -> decltype(data) {
    const int row = own + lane / 4 + i / 2 * 8, channel = fragment_column(d, i);
    if (data == nullptr || row >= columns || channel >= dim) return nullptr;
    return data + base + channel * p.value_dim + row;
  };
  typename W::State state;
#pragma unroll
  for (int d = 0; d < W::kD; ++d) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* from = place(p.initial_state, d, i);
      state[d][i] = from == nullptr ? 0.0f : *from;
    }
  }

  const auto step = [&](int n) {
    const int row = n * kRows, left = tokens.count - row;
    const int64_t token = int64_t{tokens.batch} * p.rows + tokens.first + row + lane;
    const bool exists = lane < left;
    const float gate = exists && p.g != nullptr ? p.g[token * heads + head] : 0.0f;
    const float beta = exists ? p.beta[token * heads + head] : 0.0f;
    const DecaySums sums = DecaySums::of(gate), end = sums.of_lane(31);
    block.products(n, sums, beta, p.scale);
    Team::sync();
    typename W::Output out, w, known;
    zero_fragments<W::kN>(out), zero_fragments<W::kN>(known);
    product_along<Fine, W::kN, W::kD>(known, state, block.y(n));
    left_across<W::kN>(w, block.z(n), own);
    float from_start[W::kN][2];
#pragma unroll
    for (int c = 0; c < W::kN; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = fragment_column(c, i);
        if (i < 2) from_start[c][i] = sums.of_lane(column).decay();
        const float share = ptx::shuffle_from(beta, static_cast<uint32_t>(column));
        w[c][i] = share * (w[c][i] - from_start[c][i % 2] * known[c][i]);
      }
    }
    block.solve(w);
    product_along<P, W::kN, W::kD>(out, state, block.x(n));
#pragma unroll
    for (int c = 0; c < W::kN; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[c][i] *= p.scale * from_start[c][i % 2];
    }
    product_along<P, W::kN, W::kN>(out, w, block.between());
    const float whole = end.decay();
#pragma unroll
    for (int d = 0; d < W::kD; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state[d][i] *= whole;
    }
#pragma unroll
    for (int c = 0; c < W::kN; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float to_end = end.decay_since(sums.of_lane(fragment_column(c, e)));
        w[c][e] *= to_end, w[c][2 + e] *= to_end;
      }
    }
    product_across<Fine, W::kD, W::kN>(state, w, block.y(n));
    const Chunk chunk = {tokens, head, first_column, columns, row, left};
    store_out<W>(walk, block, n, chunk, out);
  };

  const int count = ceil_div(tokens.count, kRows);
  if (count > 0) load(0);
  ptx::cp_async_commit();
#pragma unroll 1
  for (int n = 0; n < count; ++n) {
    ptx::cp_async_wait<0>();
    Team::sync();
    if (n + 1 < count) load(n + 1);
    ptx::cp_async_commit();
    step(n);
  }
#pragma unroll
  for (int d = 0; d < W::kD; ++d) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (float* to = place(params.final_state, d, i)) *to = state[d][i];
    }
  }
}

template <>
int delta_chunk_fwd<kThisDType>(const DeltaChunkFwdParams& params, void* stream) {
  const DeltaProblem& p = params.problem;
  const int64_t tiles = (p.value_dim + kWalkColumns - 1) / kWalkColumns;
  const int64_t blocks = tiles * p.value_heads * p.sequences;
  if (blocks == 0) return 0;
  const auto launch = [&]<int kDim>() {
    using Case = DeltaCase<kThisDType, kDim>;
    return ATTNFORGE_LAUNCH((delta_fwd_kernel<Case>), dim3(static_cast<unsigned>(blocks)),
                            dim3(32 * kWalkWarps), DeltaBlock<Walk<Case::kTile>>::kSharedBytes,
                            stream, params, static_cast<int>(tiles));
  };
  const int dim = p.channel_gates ? -1 : walk_dim_of(p.key_dim);
  if (dim == 0) return launch.template operator()<0>();
  if (dim == 1) return launch.template operator()<1>();
  return kNoKernel;
}

}  // namespace attnforge::cuda
