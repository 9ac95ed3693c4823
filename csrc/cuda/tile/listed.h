// Lists of blocks, and the store of the keys of a list.
//
// A list holds ascending numbers of blocks. Its stream is the positions of those blocks one after
// the other: place t of the stream is position t % size of its block t / size. Tiles are cut from
// the stream, so that one covers several small blocks or a part of a large one. Streams ascend, so
// a range of positions is a range of places, and what sequence.h says of tiles holds for both.
#pragma once

#include "cuda/tile/divider.h"
#include "cuda/tile/keys.h"

namespace attnforge::cuda {

constexpr int kNowhere = 1 << 29;  // a position that no sequence has; with a window still an int

struct Stream {
  const int32_t* numbers;
  int count;
  Divider size;  // positions of a block

  AF_DEVICE int at(int place) const {
    const int slot = size.quotient(place);
    if (slot >= count) return kNowhere;
    return numbers[slot] * size.divisor + place - slot * size.divisor;
  }

  // A range of positions as places. By a whole warp: its lanes count the numbers before each bound.
  AF_DEVICE TileRange places(const TileRange& positions AF_SITE) const {
    const int bounds[4] = {positions.lo, positions.whole_lo, at_least(positions.whole_hi, 0),
                           positions.hi};
    int before[4] = {};
    for (int n = static_cast<int>(ptx::lane_id()); n < count; n += 32) {
      const int first = numbers[n] * size.divisor;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        before[i] += at_least(0, at_most(bounds[i] - first, size.divisor));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (uint32_t flip = 16; flip > 0; flip /= 2)
        before[i] += ptx::shuffle_xor(before[i], flip, ptx::kFullWarp AF_PASS_SITE);
    }
    return {before[0], before[1], before[2], before[3]};
  }
};

// The keys of a stream as a store of Attend: rows are gathered by position, and the positions of a
// tile's keys lie behind its stage.
template <class T_, int kBlockN, int kDim, int kValueDim>
struct ListedKeys : TensorKeys<T_, kBlockN, kDim, kValueDim> {
  using Base = TensorKeys<T_, kBlockN, kDim, kValueDim>;
  using T = T_;
  static constexpr int kTileBytes = Base::kStageBytes;
  // Swizzled addresses are exclusive ors: tiles start at multiples of 128 bytes.
  static constexpr int kStageBytes = kTileBytes + (4 * kBlockN + 127) / 128 * 128;

  Stream stream;
  int keys;  // of the sequence, in use

  AF_DEVICE int key_at(int place) const { return stream.at(place); }
  AF_DEVICE static auto columns(uint32_t stage, int) {
    return [stage](int n, int i) {
      return ptx::load_shared<int32_t>(stage + kTileBytes + 4 * fragment_column(n, i));
    };
  }

  template <class Team>
  AF_DEVICE void load(uint32_t stage, int first, int AF_SITE) const {
    gather<Team>(Base::k_tile(stage, 0), this->k, this->k_stride, this->k_dim, first AF_PASS_SITE);
    gather<Team>(Base::v_tile(stage, 0), this->v, this->v_stride, this->v_dim, first AF_PASS_SITE);
    for (int n = Team::rank(); n < kBlockN; n += Team::kThreads) {
      ptx::store_shared(stage + kTileBytes + 4 * n, stream.at(first + n) AF_PASS_SITE);
    }
  }
  template <class Team, class Tile>
  AF_DEVICE void gather(const Tile& tile, const T* x, int64_t stride, int dim,
                        int first AF_SITE) const {
    load_tile<Team>(tile, dim, [&](int row) -> const T* {
      const int key = stream.at(first + row);
      return key < keys ? x + key * stride : nullptr;
    } AF_PASS_SITE);
  }

  template <int kM, int kD, class Seen>
  AF_DEVICE void add_wild(Accumulators<kM, kD>& out, int key, int first_column,
                          const Seen& seen) const {
    if (key < keys) Base::template add_wild<kM, kD>(out, key, first_column, seen);
  }
};

}  // namespace attnforge::cuda
