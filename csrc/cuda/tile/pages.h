// The store of keys in pages: cp.async gathers rows through a page table.
//
// A table entry is data. A page that does not exist is not read: its keys are zeros, and a flag per
// key, written beside the tile, hides them. Rows that start at multiples of 16 bytes are copied in
// chunks; others by single elements through registers.
//
// Pages of codes land as they are and become elements in a tile of their own, by the threads that
// copied them. A stored code means (code - zero) * scale, and tensor cores multiply codes:
//
//   S = (Q code - zero_k sum(Q)) scale_k        O = sum of (P scale_v) code - (P scale_v) zero_v
//
// with scales and zeros of each key beside the tile, whatever they are given per.
#pragma once

#include <type_traits>

#include "cuda/tile/codes.h"
#include "cuda/tile/divider.h"
#include "cuda/tile/epilogue.h"
#include "cuda/tile/keys.h"
#include "cuda/tile/softmax.h"

namespace attnforge::cuda {

// Pages as kernels take them.
struct PageSource {
  PagePool pool;
  Divider slots;
  bool chunks;  // rows start at multiples of 16 bytes

  static PageSource of(const PagePool& pool, int64_t heads) {
    const int64_t item = pool.type == PageType::kFloat32                                       ? 4
                         : pool.type == PageType::kFloat16 || pool.type == PageType::kBFloat16 ? 2
                                                                                               : 1;
    const auto whole = [&](const TensorRef& t) {
      return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.batch_stride * item % 16 == 0 &&
             (pool.page_size == 1 || t.seq_stride * item % 16 == 0) &&
             (heads == 1 || t.head_stride * item % 16 == 0);
    };
    return {pool, Divider::by(pool.page_size), whole(pool.k) && whole(pool.v)};
  }
};

// kShared: V is the first channels of K, one tile for both.
template <class T_, bool kCodes_, bool kShared_, int kBlockN, int kDim, int kValueDim>
struct PageKeys {
  using T = T_;
  static constexpr bool kPages = true, kCodes = kCodes_, kShared = kShared_;
  template <int kWidth>
  using Tile = SharedTile<T, kBlockN, kWidth>;
  struct Byte {
    uint8_t bits;
  };
  using Stored = std::conditional_t<kCodes, Byte, T>;
  using KTile = Tile<kDim>;
  using VTile = Tile<kShared ? kDim : kValueDim>;
  using KLanding = SharedTile<Stored, kBlockN, kDim>;
  using VLanding = SharedTile<Stored, kBlockN, kValueDim>;
  static constexpr int kVLandingBytes = kShared ? 0 : VLanding::kBytes;
  static constexpr int kLandingBytes = KLanding::kBytes + kVLandingBytes;
  // Behind the tiles of a stage: a flag per key, and pairs (scale, zero) for K and for V.
  static constexpr int kFlagBytes = 4 * kBlockN, kPairBytes = 8 * kBlockN;
  static constexpr int kBesideBytes = kFlagBytes + (kCodes ? 2 * kPairBytes : 0);
  // Swizzled addresses are exclusive ors: tiles start at multiples of 128 bytes.
  static constexpr int kStageBytes = kLandingBytes + (kBesideBytes + 127) / 128 * 128;
  static constexpr int kWorkBytes = kCodes ? KTile::kBytes + (kShared ? 0 : VTile::kBytes) : 0;

  static_assert(KLanding::kBytes % 128 == 0 && kLandingBytes % 128 == 0 && kWorkBytes % 128 == 0);

  const PageSource& source;
  const int32_t* table;  // of the sequence
  int head, k_dim, v_dim;

  struct Place {
    bool real;
    int page, slot;
  };
  AF_DEVICE Place place(int key) const {
    const int entry = source.slots.quotient(key);
    const int page = table[entry];
    return {page >= 0 && page < source.pool.pages, page, key - entry * source.slots.divisor};
  }
  AF_DEVICE const Stored* row(const TensorRef& t, const Place& at) const {
    return at.real ? row_ptr<const Stored>(t, at.page, at.slot, head) : nullptr;
  }
  AF_DEVICE static int stored(const PagePool& pool, int dim) {  // elements of a row in memory
    return kCodes && pool.type == PageType::kInt4 ? dim / 2 : dim;
  }

  AF_DEVICE static int key_at(int place) { return place; }
  AF_DEVICE static int columns(uint32_t, int first) { return first; }

  AF_DEVICE static uint32_t flags(uint32_t stage) { return stage + kLandingBytes; }
  AF_DEVICE static uint32_t pairs(uint32_t stage, bool keys) {
    return stage + kLandingBytes + kFlagBytes + (keys ? 0 : kPairBytes);
  }
  AF_DEVICE static KTile k_tile(uint32_t stage, uint32_t work) { return {kCodes ? work : stage}; }
  AF_DEVICE static VTile v_tile(uint32_t stage, uint32_t work) {
    return {kShared  ? k_tile(stage, work).base
            : kCodes ? work + KTile::kBytes
                     : stage + KTile::kBytes};
  }

  template <class Team>
  AF_DEVICE void load(uint32_t stage, int first, int rows AF_SITE) const {
    using S = Share<Team, KLanding>;
    static_assert(kShared || S::kPass == Share<Team, VLanding>::kPass);
    const PagePool& pool = source.pool;
#pragma unroll
    for (int i = 0; i < S::kPasses; ++i) {
      const int r = S::own_row() + i * S::kPass;
      if (!S::inside(r)) continue;
      Place at = {false, 0, 0};
      if (r < rows) at = place(first + r);
      copy<Team>(KLanding{stage}, i, row(pool.k, at), stored(pool, k_dim) AF_PASS_SITE);
      if constexpr (!kShared) {
        copy<Team>(VLanding{stage + KLanding::kBytes}, i, row(pool.v, at),
                   stored(pool, v_dim) AF_PASS_SITE);
      }
      if (S::own_chunk() != 0) continue;
      ptx::store_shared(flags(stage) + 4 * r, uint32_t{at.real} AF_PASS_SITE);
      if constexpr (kCodes) {
        ptx::store_shared(pairs(stage, true) + 8 * r,
                          pair(at, pool.k_scale, pool.k_zero) AF_PASS_SITE);
        ptx::store_shared(pairs(stage, false) + 8 * r,
                          pair(at, pool.v_scale, pool.v_zero) AF_PASS_SITE);
      }
    }
  }
  // This thread's chunks of pass i.
  template <class Team, class Landing>
  AF_DEVICE void copy(const Landing& tile, int i, const Stored* from, int count AF_SITE) const {
    using S = Share<Team, Landing>;
    constexpr int kPer = Landing::kPerChunk, kItem = static_cast<int>(sizeof(Stored));
#pragma unroll
    for (int s = 0; s < S::kSegments; ++s) {
      const int begin = (s * S::kPeriod + S::own_chunk()) * kPer;
      const int here = from == nullptr ? 0 : at_least(0, at_most(count - begin, kPer));
      if (source.chunks) {
        ptx::cp_async_16(S::place(tile, i, s), from + begin,
                         static_cast<uint32_t>(here * kItem) AF_PASS_SITE);
        continue;
      }
      ptx::U32x4 chunk = {};
#pragma unroll
      for (int n = 0; n < kPer; ++n) {
        const uint32_t bits = n < here ? bits_of(from[begin + n]) : 0u;
        chunk.v[n * kItem / 4] |= bits << (n * kItem % 4 * 8);
      }
      ptx::store_shared(S::place(tile, i, s), chunk AF_PASS_SITE);
    }
  }
  AF_DEVICE static uint32_t bits_of(float x) { return ptx::bits_of_float(x); }
  template <class X>
  AF_DEVICE static uint32_t bits_of(X x) {
    return x.bits;
  }
  AF_DEVICE FloatPair pair(const Place& at, const float* scales, const float* zeros) const {
    if (!at.real) return {0.0f, 0.0f};
    const PagePool& pool = source.pool;
    const int64_t n = at.page * pool.code_page + at.slot * pool.code_slot + head;
    const float centre = pool.type == PageType::kInt4 ? kInt4Centre : 0.0f;
    return {scales != nullptr ? scales[n] : 1.0f, zeros != nullptr ? zeros[n] - centre : 0.0f};
  }

  template <class Team>
  AF_DEVICE bool settle(uint32_t stage, uint32_t work, bool whole) const {
    if constexpr (kCodes) {
      switch (source.pool.type) {
        case PageType::kFp8:
          return decode<Team, PageType::kFp8>(stage, work, whole);
        case PageType::kInt8:
          return decode<Team, PageType::kInt8>(stage, work, true);
        default:
          return decode<Team, PageType::kInt4>(stage, work, true);
      }
    } else {
      return kShared || whole ? false : tame<Team>(v_tile(stage, work));
    }
  }
  template <class Team, PageType kType>
  AF_DEVICE bool decode(uint32_t stage, uint32_t work, bool whole) const {
    decode_tile_chunks<kType, Team>(KLanding{stage}, k_tile(stage, work), false);
    if constexpr (kShared) return false;
    return decode_tile_chunks<kType, Team>(VLanding{stage + KLanding::kBytes}, v_tile(stage, work),
                                           !whole);
  }

  template <int kM, int kD, class Seen>
  AF_DEVICE void add_wild(Accumulators<kM, kD>& out, int key, int first_column,
                          const Seen& seen) const {
    const Stored* v = row(source.pool.v, place(key));
    if (v == nullptr || (kCodes && source.pool.type != PageType::kFp8)) return;
    const auto value = [&](int c) {
      if (c >= v_dim) return 0.0f;
      if constexpr (kCodes) {
        return from_e4m3(v[c].bits);
      } else {
        return widen(v[c]);
      }
    };
    add_wild_of<kM, kD>(out, value, first_column, seen);
  }

  // -inf for keys of pages that do not exist.
  template <int kM, int kN>
  AF_DEVICE void hide_missing(Accumulators<kM, kN>& s, uint32_t stage AF_SITE) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const auto real =
          ptx::load_shared<ptx::U32x2>(flags(stage) + 4 * fragment_column(n, 0) AF_PASS_SITE);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = real.v[i % 2] != 0 ? s[m][n][i] : -kInf;
      }
    }
  }

  // ---- codes: what scales and zeros do to a row ----

  template <int kM>
  struct RowState {
    float q_sum[kM][2], shift[kM][2];  // shift: of this lane's keys
    float unit;                        // a power of two; weights are held in units of it
  };

  // In fp16 small scales would push weights below the least number: their unit is that of the first
  // key's scale.
  AF_DEVICE float unit_of(int key) const {
    if constexpr (!__is_same(T, Half)) return 1.0f;
    const float scale = pair(place(key), source.pool.v_scale, nullptr).x;
    const uint32_t exponent = ptx::bits_of_float(scale) >> 23 & 0xffu;
    return exponent > 1 && exponent < 253 ? ptx::float_from_bits(exponent << 23) : 1.0f;
  }
  template <int kM, class QTile>
  AF_DEVICE void begin(RowState<kM>& state, const QTile& q, int first_row, int first_key,
                       int last_key AF_SITE) const {
    state.unit = first_key < last_key ? unit_of(first_key) : 1.0f;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = fragment_row(first_row, m, h);
        float sum = 0.0f;
#pragma unroll 1
        for (int c = static_cast<int>(ptx::lane_id()) % 4; c < QTile::kChunks; c += 4) {
          const auto chunk = ptx::load_shared<ptx::U32x4>(q.chunk(row, c) AF_PASS_SITE);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(T) == 4) {
              sum += ptx::float_from_bits(chunk.v[i]);
            } else {
              sum += unpack<T>(chunk.v[i], 0) + unpack<T>(chunk.v[i], 1);
            }
          }
        }
        state.q_sum[m][h] = quad_sum(sum AF_PASS_SITE);
        state.shift[m][h] = 0.0f;
      }
    }
  }
  template <int kM, int kN>
  AF_DEVICE void decode_scores(Accumulators<kM, kN>& s, uint32_t stage,
                               const RowState<kM>& state AF_SITE) const {
    each_pair<kM, kN>(pairs(stage, true), [&](int m, int n, int i, float scale, float zero) {
      s[m][n][i] = (s[m][n][i] - zero * state.q_sum[m][i / 2]) * scale;
    } AF_PASS_SITE);
  }
  // Weights of values to those of codes. A weight of 0 may be one of a hidden key, whose scale may
  // be anything. shift takes weights as they will be rounded, so that a value of 0 adds 0.
  template <int kM, int kN>
  AF_DEVICE void decode_weights(Accumulators<kM, kN>& s, uint32_t stage, const float (&kept)[kM][2],
                                RowState<kM>& state AF_SITE) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      state.shift[m][0] *= kept[m][0];
      state.shift[m][1] *= kept[m][1];
    }
    const float per_unit = 1.0f / state.unit;
    each_pair<kM, kN>(pairs(stage, false), [&](int m, int n, int i, float scale, float zero) {
      const float p = s[m][n][i], weight = widen(narrow<T>(p * (scale * per_unit)));
      s[m][n][i] = p == 0.0f ? 0.0f : weight;
      state.shift[m][i / 2] += p == 0.0f ? 0.0f : weight * zero;
    } AF_PASS_SITE);
  }
  template <int kM, int kN, class F>
  AF_DEVICE static void each_pair(uint32_t base, const F& f AF_SITE) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const auto two = ptx::load_shared<ptx::U32x4>(base + 8 * fragment_column(n, 0) AF_PASS_SITE);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          f(m, n, i, ptx::float_from_bits(two.v[i % 2 * 2]),
            ptx::float_from_bits(two.v[i % 2 * 2 + 1]));
        }
      }
    }
  }
  template <int kM, int kD>
  AF_DEVICE void finish(Accumulators<kM, kD>& out, const RowState<kM>& state AF_SITE) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float shift = quad_sum(state.shift[m][h] AF_PASS_SITE);
#pragma unroll
        for (int d = 0; d < kD; ++d) {
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i)
            out[m][d][i] = (out[m][d][i] - shift) * state.unit;
        }
      }
    }
  }
};

}  // namespace attnforge::cuda
