// The delta rules in chunks (Yang et al., 2024: DeltaNet, Gated DeltaNet; gates of channels: Kimi
// Delta Attention). With S [V, K] at a chunk's start and D the decays between its tokens:
//
//   e_i = v_i - D_i S k_i - sum_{j < i} D_ij (k_i k_j) beta_j e_j    what a state lacks of a value
//   o_i = scale (D_i S q_i + sum_{j <= i} D_ij (q_i k_j) beta_j e_j)
//   S  <- D S + sum_j D_j beta_j e_j k_j^T
//
// The gradient of the state walks back by the same rule: with -sum_{j <= i} scale D_ij (k_i q_j)
// dO_j in place of v_i, e is -dwrite (delta_launch.h), and q_j dO_j is added to the state besides.
// What is left of the backward are walks of the additive recurrence: delta_chunk.cu.
//
// The block, its columns and its state are those of walk.cu: a warp has 16 columns of values as
// rows, so the state, e and o stay in its registers and each column solves its own system, by
// forward substitution in blocks of 16. The triangular matrix is never inverted: inverses by powers
// lose all digits where keys repeat. All that feeds back into the state is fp32 for every dtype
// (the state and e in two tf32 parts beside 16-bit keys); what leaves in out is rounded to tf32
// once in 16-bit calls.
//
// grid: tiles of 64 columns * value heads * sequences. bytes: as walk.cu, and beta; in reverse also
// 24 V (errors twice, dv and dO in fp32). flops per token of a chunk of 32: 2 (2 rows K + 2 rows V
// + 3 K V), two of the three K V in two parts.
#include "cuda/linear/channels.h"
#include "cuda/linear/delta_launch.h"
#include "cuda/linear/delta_solve.h"
#include "cuda/linear/leave.h"

namespace attnforge::cuda {

constexpr DType kThisDType = DType::ATTNFORGE_DTYPE;

template <DType kDType, int kDim, WalkGate kGate, bool kBack>
struct DeltaCase {
  static constexpr WalkTile kTile = walk_tile(kDType, kDType, kWalkDims[kDim], kGate);
  static constexpr bool kReverse = kBack;
};

// What a chunk of the walk in reverse leaves beside dv, before e = -dwrite is multiplied by beta.
template <class W, class Share>
AF_DEVICE void leave_parts(const DeltaWalk& delta, const LinearWalk& walk, const Chunk& chunk,
                           const typename W::Output& e, const typename W::Output& dout,
                           const Share& share) {
  typename W::Output terms;
  zero_fragments<W::kN>(terms);
  float betas[W::kN][2];
#pragma unroll
  for (int c = 0; c < W::kN; ++c) betas[c][0] = share(c, 0), betas[c][1] = share(c, 1);
  each_result<W>(chunk, [&](int c, int i, int row, int column) {
    const int64_t at = chunk.element(walk, row, column);
    const float error = delta.errors[at];
    terms[c][i] = -e[c][i] * error;
    delta.errors[at] = betas[c][i % 2] * error;
    delta.dvalues[at] = -betas[c][i % 2] * e[c][i];
    if (delta.dout32 != nullptr) delta.dout32[at] = dout[c][i];
  });
  sum_columns<W>(chunk, terms, [&](int row, float sum) {
    const int64_t at = chunk.token(walk, row) * walk.heads + chunk.head;
    delta.dbeta_parts[at * delta.parts + chunk.first_column / 16 + warp_id()] = sum;
  });
}

template <class Case>
__global__ void __launch_bounds__(32 * kWalkWarps)
    delta_walk_kernel(const __grid_constant__ DeltaWalk delta, int tiles) {
  using W = DeltaBlock<Walk<Case::kTile>>;
  using T = typename W::T;
  using P = typename W::P;
  using Fine = typename W::Fine;
  using Team = typename W::Team;
  constexpr int kRows = W::kRows;
  constexpr bool kReverse = Case::kReverse;
  const DeltaProblem& p = delta.problem;
  const int first_column = static_cast<int>(blockIdx.x) % tiles * kWalkColumns;
  const int pair = static_cast<int>(blockIdx.x) / tiles, heads = static_cast<int>(p.value_heads);
  const int head = pair % heads, sequence = pair / heads;
  const int dim = static_cast<int>(p.key_dim);
  const int columns = at_most(static_cast<int>(p.value_dim) - first_column, kWalkColumns);
  const Tokens tokens = tokens_of(p.rows, p.cu_seqlens, sequence);
  const W block = {{ptx::dynamic_shared_memory()}};
  const int lane = static_cast<int>(ptx::lane_id()), own = W::own_column();

  const auto group = static_cast<int32_t>(p.value_heads / p.heads);
  const auto q = WalkRows<const T>::of({p.q, group}, tokens, head, kReverse);
  const auto k = WalkRows<const T>::of({p.k, group}, tokens, head, kReverse);
  auto v = WalkRows<const T>::of({kReverse ? delta.dout : p.v}, tokens, head, kReverse);
  v.first += first_column;
  const int64_t first_token = int64_t{tokens.batch} * p.rows + tokens.first;
  const int64_t width = W::kRead ? p.key_dim : 1;
  const GateRows gates = {p.g == nullptr ? nullptr : p.g + (first_token * heads + head) * width,
                          heads * width, tokens.count, kReverse};
  const auto load = [&](int n) {
    const int row = n * kRows, left = tokens.count - row;
    load_rows<Team>(block.x(n), q.at(row), q.stride, left, dim);
    load_rows<Team>(block.y(n), k.at(row), k.stride, left, dim);
    load_rows<Team>(block.z(n), v.at(row), v.stride, left, columns);
    if constexpr (W::kRead) {
      load_tile<Team>(block.gates(n), dim, [&](int r) { return gates.before(row + r); });
    }
  };

  LinearWalk walk;  // where results go
  walk.rows = p.rows, walk.heads = p.value_heads, walk.columns = p.value_dim;
  walk.reverse = kReverse, walk.out = {delta.out};
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
    const int row = n * kRows;
    const Chunk chunk = {tokens, head, first_column, columns, row, tokens.count - row};
    float beta = 0.0f;
    if (lane < at_most(chunk.left, kRows)) {
      beta = p.beta[chunk.token(walk, lane) * heads + head];
    }
    const auto decays = block.template prepare<kReverse>(
        n, lane < kRows ? gates.before(row + lane) : nullptr, beta, p.scale);
    const auto from_start = [&](int c, int i) { return decays.from_start(c, i); };
    const auto to_end = [&](int c, int i) { return decays.to_end(c, i); };
    const auto share = [&](int c, int i) {
      return ptx::shuffle_from(beta, static_cast<uint32_t>(fragment_column(c, i)));
    };
    typename W::Output e, out, dout;  // the tile of z is read before results go there
    zero_fragments<W::kN>(out);
    product_along<Fine, W::kN, W::kD>(out, state, block.keys_from_start(n));
    scale_columns<W::kN>(out, from_start);
    if constexpr (kReverse) {
      left_across<W::kN>(dout, block.z(n), own);
      product_along<Product<float>, W::kN, W::kN>(out, dout, block.between());
      zero_fragments<W::kN>(e);
    } else {
      left_across<W::kN>(e, block.z(n), own);
    }
    add_fragments<W::kN>(e, out, -1.0f);
    block.solve(e);
    zero_fragments<W::kN>(out);
    bool leaves_out = true;
    if constexpr (kReverse) {
      leave_parts<W>(delta, walk, chunk, e, dout, share);
      scale_columns<W::kN>(e, share);
      add_fragments<W::kN>(out, e, -1.0f);
      scale_columns<W::kN>(dout, [&](int c, int i) { return p.scale * to_end(c, i); });
    } else {
      leaves_out = delta.errors == nullptr;
      if (leaves_out) {
        product_along<P, W::kN, W::kD>(out, state, block.queries_from_start(n));
        scale_columns<W::kN>(out, [&](int c, int i) { return p.scale * from_start(c, i); });
      } else {
        each_result<W>(chunk, [&](int c, int i, int r, int column) {
          delta.errors[chunk.element(walk, r, column)] = e[c][i];
        });
      }
      scale_columns<W::kN>(e, share);
      if (leaves_out) product_along<P, W::kN, W::kN>(out, e, block.between());
    }
    scale_columns<W::kD>(state, [&](int d, int i) { return decays.whole(block, d, i); });
    scale_columns<W::kN>(e, to_end);
    product_across<Fine, W::kD, W::kN>(state, e, block.keys_to_end(n));
    if constexpr (kReverse) {
      product_across<Fine, W::kD, W::kN>(state, dout, block.queries_to_end(n));
    }
    if (leaves_out) store_out<W>(walk, block, n, chunk, out);
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
      float* to = place(delta.final_state, d, i);
      if (to == nullptr) continue;
      float value = state[d][i];
      if (kReverse && count > 0 && gates.first_token != nullptr) {
        value *= decay_of(clamped_gate(gates.first_token[W::kRead ? fragment_column(d, i) : 0]));
      }
      *to = value;
    }
  }
}

template <>
int delta_walk<kThisDType>(const DeltaWalk& walk, void* stream) {
  const DeltaProblem& p = walk.problem;
  const int64_t tiles = (p.value_dim + kWalkColumns - 1) / kWalkColumns;
  const int64_t blocks = tiles * p.value_heads * p.sequences;
  if (blocks == 0) return 0;
  const auto launch = [&]<int kDim, WalkGate kGate, bool kReverse>() {
    using Case = DeltaCase<kThisDType, kDim, kGate, kReverse>;
    return ATTNFORGE_LAUNCH((delta_walk_kernel<Case>), dim3(static_cast<unsigned>(blocks)),
                            dim3(32 * kWalkWarps), DeltaBlock<Walk<Case::kTile>>::kSharedBytes,
                            stream, walk, static_cast<int>(tiles));
  };
  const auto with_way = [&]<int kDim, WalkGate kGate>() {
    return walk.reverse ? launch.template operator()<kDim, kGate, true>()
                        : launch.template operator()<kDim, kGate, false>();
  };
  const auto with_gate = [&]<int kDim>() {
    return p.channel_gates ? with_way.template operator()<kDim, WalkGate::kRead>()
                           : with_way.template operator()<kDim, WalkGate::kWhole>();
  };
  const int dim = walk_dim_of(p.key_dim);
  if (dim == 0) return with_gate.template operator()<0>();
  if (dim == 1) return with_gate.template operator()<1>();
  return kNoKernel;
}

}  // namespace attnforge::cuda
