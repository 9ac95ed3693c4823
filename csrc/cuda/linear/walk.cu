// The additive recurrence in chunks, forward and every gradient: one kernel with its roles free
// (launch.h: LinearWalk; the chunk formulas are those of Sun et al., 2023, and Yang et al., 2023).
//
//   A_ij = read write D_ij x_i y_j, j <= i              D the decays between two tokens
//   out  = read D_i (S x_i) + sum_j A_ij z_j            S [columns, dim] at the chunk's start
//   S   <- D S + sum_j write D_j z_j y_j^T
//
// A block walks one sequence of one head for 64 columns; a warp has 16 of them as rows of
// fragments. Their state stays in its registers from the first token to the last, where it is
// accumulator and left operand at once: no state passes through shared or global memory. A is made
// by the four warps together. One cp.async group per chunk is in flight while the one before is
// worked on.
//
// grid: tiles of 64 columns * heads * sequences. Sequences are not split in time: fewer blocks than
// multiprocessors leave some idle. bytes: x, y once per tile of columns (from L2 after the first),
// z, out and gates once. flops: 2 (dim + columns) rows + 4 dim columns per token of a chunk of
// `rows` (tf32 but for A in 16 bits). Floors and what they mean: docs/linear.md.
#include "cuda/linear/channels.h"
#include "cuda/linear/leave.h"

namespace attnforge::cuda {

constexpr DType kThisDType = DType::ATTNFORGE_DTYPE;

// A kernel's one template argument, as FwdCase is in flash.
template <DType kDType, int kDim, WalkGate kGate, bool kWide>
struct WalkCase {
  static constexpr DType kRead = kWide ? DType::kFloat32 : kDType;
  static constexpr WalkTile kTile = walk_tile(kDType, kRead, kWalkDims[kDim], kGate);
};

// A of a chunk of 32 tokens by products of tiles: a warp has 16 x 16 of it.
template <class W>
AF_DEVICE void products_of_tiles(const W& block, int n, const DecaySums& sums, float factor,
                                 bool strict) {
  const int row = warp_id() / 2 * 16, column = warp_id() % 2 * 16;
  Accumulators<1, 2> a;
  zero<1, 2>(a);
  if (column <= row) product_nt<1, 2>(a, block.x(n), row, block.y(n), column);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = fragment_row(row, 0, h);
    const DecaySums later = sums.of_lane(i);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int j = column + fragment_column(c / 2, c % 2);
      const float decay = later.decay_since(sums.of_lane(j));
      const float value = j + strict <= i ? a[0][c / 2][2 * h + c % 2] * (factor * decay) : 0.0f;
      ptx::store_shared(block.between().element(i, j), value);
    }
  }
}

template <class Case>
__global__ void __launch_bounds__(32 * kWalkWarps)
    linear_walk_kernel(const __grid_constant__ LinearWalk walk, int tiles) {
  using W = Walk<Case::kTile>;
  using T = typename W::T;
  using P = typename W::P;
  using Team = typename W::Team;
  constexpr int kRows = W::kRows;
  const int first_column = static_cast<int>(blockIdx.x) % tiles * kWalkColumns;
  const int pair = static_cast<int>(blockIdx.x) / tiles, heads = static_cast<int>(walk.heads);
  const int head = pair % heads, sequence = pair / heads;
  const Tokens tokens = tokens_of(walk.rows, walk.cu_seqlens, sequence);
  const int dim = static_cast<int>(walk.dim);
  const int columns = at_most(static_cast<int>(walk.columns) - first_column, kWalkColumns);
  const bool reverse = walk.reverse;
  const W block = {ptx::dynamic_shared_memory()};
  const int lane = static_cast<int>(ptx::lane_id()), own = W::own_column();

  const auto rows_of = [&]<class E>(const WalkTensor& t, int column) {
    auto rows = WalkRows<E>::of(t, tokens, head, reverse);
    rows.first += column;
    return rows;
  };
  const auto x = rows_of.template operator()<const typename W::Read>(walk.x, 0);
  const auto y = rows_of.template operator()<const typename W::Read>(walk.y, 0);
  const auto z = rows_of.template operator()<const T>(walk.z, first_column);

  const int64_t per_token = walk.kind == LinearGate::kScalar ? 1
                            : W::kRead                       ? walk.dim
                            : W::kColumns                    ? walk.columns
                                                             : 0;
  GateRows gates = {nullptr, heads * per_token, tokens.count, reverse};
  if (per_token != 0) {
    const int64_t row = int64_t{tokens.batch} * walk.rows + tokens.first;
    gates.first_token =
        walk.gate + (row * heads + head) * per_token + (W::kColumns ? first_column : 0);
  } else if (walk.kind == LinearGate::kHead) {
    gates.first_token = walk.gate + head;
  }

  const auto load = [&](int n) {
    const int row = n * kRows, left = tokens.count - row;
    load_rows<Team>(block.x(n), x.at(row), x.stride, left, dim);
    load_rows<Team>(block.y(n), y.at(row), y.stride, left, dim);
    load_rows<Team>(block.z(n), z.at(row), z.stride, left, columns);
    if constexpr (W::kRead || W::kColumns) {
      load_tile<Team>(block.gates(n), W::kRead ? dim : columns,
                      [&](int r) { return gates.before(row + r); });
    }
  };

  // The state's element of this thread's fragments in memory, null past the edges.
  const int64_t base = (int64_t{sequence} * heads + head) * walk.state;
  const auto place = [&](auto* data, int d, int i) -> decltype(data) {
    const int row = own + lane / 4 + i / 2 * 8, channel = fragment_column(d, i);
    if (data == nullptr || row >= columns || channel >= dim) return nullptr;
    return data + base + channel * walk.dim_stride + (first_column + row) * walk.column_stride;
  };
  typename W::State state;
  float later[2] = {0.0f, 0.0f};  // kSuffix: sums over the tokens that were walked
#pragma unroll
  for (int d = 0; d < W::kD; ++d) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* from = place(walk.initial, d, i);
      state[d][i] = from == nullptr ? 0.0f : *from;
      if (walk.extra == WalkExtra::kSuffix && from != nullptr) {
        later[i / 2] += state[d][i] * *place(walk.other, d, i);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    later[h] += ptx::shuffle_xor(later[h], 1);
    later[h] += ptx::shuffle_xor(later[h], 2);
  }

  const auto step = [&](int n) {
    const int row = n * kRows, left = tokens.count - row;
    typename W::Output out;
    zero_fragments<W::kN>(out);
    Fragments<W::kN> weighted;  // z, decayed to the chunk's end
    if constexpr (!W::kRead && !W::kColumns) {
      const float* gate = gates.before(row + lane);
      const DecaySums sums = DecaySums::of(gate == nullptr ? 0.0f : *gate);
      products_of_tiles(block, n, sums, walk.read * walk.write, walk.strict);
      Team::sync();
      product_along<P, W::kN, W::kD>(out, state, block.x(n));
      left_across<W::kN>(weighted, block.z(n), own);
      const DecaySums end = sums.of_lane(31);
      float write[W::kN][2];
#pragma unroll
      for (int k = 0; k < W::kN; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const DecaySums here = sums.of_lane(fragment_column(k, i));
          write[k][i] = walk.write * end.decay_since(here);
          const float read = walk.read * here.decay();
          out[k][i] *= read, out[k][2 + i] *= read;
        }
      }
      product_along<P, W::kN, W::kN>(out, weighted, block.between());
      const float whole = end.decay();
#pragma unroll
      for (int d = 0; d < W::kD; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state[d][i] *= whole;
      }
#pragma unroll
      for (int k = 0; k < W::kN; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) weighted[k][i] *= write[k][i % 2];
      }
      product_across<P, W::kD, W::kN>(state, weighted, block.y(n));
    } else if constexpr (W::kRead) {
      decay_read_side(
          block, n,
          [&](int i, int channel, float decay) {
            scale_element(block.x(n), block.from_start(), i, channel, decay);
          },
          [&](int i, int channel, float decay) {
            scale_element(block.y(n), block.to_end(), i, channel, decay);
          });
      Team::sync();
      products_between(block, n, block.x(n), block.y(n), block.between(), walk.read * walk.write,
                       walk.strict);
      Team::sync();
      product_along<P, W::kN, W::kD>(out, state, block.from_start());
#pragma unroll
      for (int k = 0; k < W::kN; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[k][i] *= walk.read;
      }
      left_across<W::kN>(weighted, block.z(n), own);
      product_along<P, W::kN, W::kN>(out, weighted, block.between());
#pragma unroll
      for (int d = 0; d < W::kD; ++d) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float whole = ptx::load_shared<float>(block.total(fragment_column(d, e)));
          state[d][e] *= whole, state[d][2 + e] *= whole;
        }
      }
#pragma unroll
      for (int k = 0; k < W::kN; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) weighted[k][i] *= walk.write;
      }
      product_across<P, W::kD, W::kN>(state, weighted, block.to_end());
    } else {
      const auto decays = ColumnDecays<W>::of(block, n, walk.write);
      products_between(block, n, block.x(n), block.y(n), block.between(), walk.read * walk.write,
                       walk.strict);
      Team::sync();
      decays.add_inside(block);
      ptx::sync_warp();
      product_along<P, W::kN, W::kD>(out, state, block.x(n));
      float whole[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = own + lane / 4 + 8 * h;
        whole[h] = ptx::load_shared<float>(block.total(column));
#pragma unroll
        for (int k = 0; k < W::kN; ++k) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int token = fragment_column(k, e);
            const float read =
                walk.read * ptx::load_shared<float>(block.from_start().element(token, column));
            out[k][2 * h + e] = out[k][2 * h + e] * read +
                                ptx::load_shared<float>(block.inside().element(token, column));
          }
        }
      }
      left_across<W::kN>(weighted, block.to_end(), own);
#pragma unroll
      for (int d = 0; d < W::kD; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state[d][i] *= whole[i / 2];
      }
      product_across<P, W::kD, W::kN>(state, weighted, block.y(n));
    }
    leave<W>(walk, block, n, {tokens, head, first_column, columns, row, left}, out, later);
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
      float* to = place(walk.final, d, i);
      if (to == nullptr) continue;
      float value = state[d][i];
      if (reverse && tokens.count > 0 && gates.first_token != nullptr) {
        const int channel = W::kRead      ? fragment_column(d, i)
                            : W::kColumns ? own + lane / 4 + i / 2 * 8
                                          : 0;
        value *= decay_of(clamped_gate(gates.first_token[channel]));
      }
      *to = value;
    }
  }
}

template <>
int linear_walk<kThisDType>(const LinearWalk& walk, void* stream) {
  const int64_t tiles = (walk.columns + kWalkColumns - 1) / kWalkColumns;
  const int64_t blocks = tiles * walk.heads * walk.sequences;
  if (blocks == 0) return 0;
  const auto launch_case = [&]<class Case>() {
    return ATTNFORGE_LAUNCH((linear_walk_kernel<Case>), dim3(static_cast<unsigned>(blocks)),
                            dim3(32 * kWalkWarps), Walk<Case::kTile>::kSharedBytes, stream, walk,
                            static_cast<int>(tiles));
  };
  const auto launch = [&]<int kDim, WalkGate kGate>() {
    // Tensors that a backward has made are fp32: what it sums over are then columns of keys.
    if constexpr (kThisDType != DType::kFloat32) {
      if (walk.wide && kGate == WalkGate::kRead) return kNoKernel;
      if (walk.wide) {
        constexpr WalkGate kWide = kGate == WalkGate::kRead ? WalkGate::kColumns : kGate;
        return launch_case.template operator()<WalkCase<kThisDType, kDim, kWide, true>>();
      }
    }
    return launch_case.template operator()<WalkCase<kThisDType, kDim, kGate, false>>();
  };
  const auto with_gate = [&]<int kDim>() {
    const bool channels = walk.kind == LinearGate::kKey || walk.kind == LinearGate::kValue;
    if (!channels) return launch.template operator()<kDim, WalkGate::kWhole>();
    return walk.gate_columns ? launch.template operator()<kDim, WalkGate::kColumns>()
                             : launch.template operator()<kDim, WalkGate::kRead>();
  };
  switch (walk_dim_of(walk.dim)) {
    case 0:
      return with_gate.template operator()<0>();
    case 1:
      return with_gate.template operator()<1>();
  }
  return kNoKernel;
}

}  // namespace attnforge::cuda
