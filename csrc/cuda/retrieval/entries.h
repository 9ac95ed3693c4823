// Lists of keys, and the store of the keys of a list: places are its entries, gathered row by row
// by cp.async from a tensor or through a page table.
//
// Lists are data. An entry that names no key in use is not read: its key is zeros, and its bias,
// written beside the tile, is -inf, which hides it from all rows. Other biases are added there.
#pragma once

#include "attnforge/retrieval.h"
#include "cuda/tile/divider.h"
#include "cuda/tile/epilogue.h"
#include "cuda/tile/keys.h"

namespace attnforge::cuda {

// Where the keys of a sequence lie: in a tensor, or through a page table.
struct KeyPlaces {
  const int32_t* table;  // pages of the sequence; null: it is a page itself, number `batch`
  Divider slots;         // of a page
  int pages, batch;

  AF_DEVICE static KeyPlaces of(const PagePool& pool, const Divider& slots, int batch) {
    return {pool.table != nullptr ? pool.table + batch * pool.table_stride : nullptr, slots,
            static_cast<int>(pool.pages), batch};
  }

  struct Place {
    int page, slot;  // page -1: there is none
  };
  AF_DEVICE Place at(int key) const {
    if (table == nullptr) return {batch, key};
    const int number = slots.quotient(key), page = table[number];
    if (page < 0 || page >= pages) return {-1, 0};
    return {page, key - number * slots.divisor};
  }
};

// One list of one sequence.
struct EntryList {
  const int32_t* ids;
  const float* log_bias;  // null: 0
  int count, keys;        // entries; keys in use
  KeyPlaces places;

  // The list of row head `head`; `pack` of its query heads share a KV head.
  AF_DEVICE static EntryList of(const KeyLists& lists, const FlashProblem& p, int head, int pack,
                                int keys, const KeyPlaces& places) {
    const int query_head = head * pack;
    const int own = lists.heads == p.heads_q ? query_head
                    : lists.heads == 1       ? 0
                                             : query_head / static_cast<int>(p.heads_q / p.heads_k);
    const int64_t at = places.batch * lists.heads + own;
    const int room = static_cast<int>(lists.slots);
    return {lists.ids + at * lists.slots,
            lists.log_bias != nullptr ? lists.log_bias + at * lists.slots : nullptr,
            lists.lens != nullptr ? at_least(0, at_most(lists.lens[at], room)) : room, keys,
            places};
  }

  struct Entry {
    float bias;  // base 2; -inf: nothing is there
    KeyPlaces::Place place;
  };
  AF_DEVICE Entry at(int entry) const {
    constexpr Entry kHidden = {-kInf, {-1, 0}};
    if (entry >= count) return kHidden;
    const int key = ids[entry];
    if (key < 0 || key >= keys) return kHidden;
    const float bias = log_bias != nullptr ? log_bias[entry] * kLog2E : 0.0f;
    const KeyPlaces::Place place = places.at(key);
    return {place.page < 0 ? -kInf : bias, place};
  }
};

template <class T_, int kBlockN, int kDim, int kValueDim>
struct EntryKeys : TensorKeys<T_, kBlockN, kDim, kValueDim> {
  using Base = TensorKeys<T_, kBlockN, kDim, kValueDim>;
  using T = T_;
  static constexpr bool kPages = true;  // whole tiles too have keys that are not there
  static constexpr int kTileBytes = Base::kStageBytes;
  // Swizzled addresses are exclusive ors: tiles start at multiples of 128 bytes.
  static constexpr int kStageBytes = kTileBytes + (4 * kBlockN + 127) / 128 * 128;

  EntryList list;
  const TensorRef &k_rows, &v_rows;
  int head;

  AF_DEVICE const T* row(const TensorRef& t, int entry) const {
    const EntryList::Entry at = list.at(entry);
    if (at.bias == -kInf) return nullptr;
    return row_ptr<const T>(t, at.place.page, at.place.slot, head);
  }

  template <class Team>
  AF_DEVICE void load(uint32_t stage, int first, int AF_SITE) const {
    load_tile<Team>(Base::k_tile(stage, 0), this->k_dim,
                    [&](int r) { return row(k_rows, first + r); } AF_PASS_SITE);
    load_tile<Team>(Base::v_tile(stage, 0), this->v_dim,
                    [&](int r) { return row(v_rows, first + r); } AF_PASS_SITE);
    for (int n = Team::rank(); n < kBlockN; n += Team::kThreads) {
      ptx::store_shared(stage + kTileBytes + 4 * n, list.at(first + n).bias AF_PASS_SITE);
    }
  }

  // Biases of this thread's two columns of fragment n.
  AF_DEVICE static FloatPair biases(uint32_t stage, int n AF_SITE) {
    return ptx::load_shared<FloatPair>(stage + kTileBytes + 4 * fragment_column(n, 0) AF_PASS_SITE);
  }

  template <int kM, int kN>
  AF_DEVICE void hide_missing(Accumulators<kM, kN>& s, uint32_t stage AF_SITE) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const FloatPair bias = biases(stage, n AF_PASS_SITE);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float own = i % 2 == 0 ? bias.x : bias.y;
          s[m][n][i] = own == -kInf ? -kInf : s[m][n][i] + own;
        }
      }
    }
  }

  template <int kM, int kD, class Seen>
  AF_DEVICE void add_wild(Accumulators<kM, kD>& out, int entry, int first_column,
                          const Seen& seen) const {
    const T* from = row(v_rows, entry);
    if (from == nullptr) return;
    const int dim = this->v_dim;
    add_wild_of<kM, kD>(
        out, [&](int c) { return c < dim ? widen(from[c]) : 0.0f; }, first_column, seen);
  }
};

}  // namespace attnforge::cuda
