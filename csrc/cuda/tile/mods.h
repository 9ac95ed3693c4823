// Scores and masks of a caller's own: what the loop of tile/attend.h asks of a Mod.
//
//   kScores, kMasks   which of the two it has
//   score(s, at)      another logit for s, in natural units: after scale, softcap and ALiBi
//   sees(at)          whether a pair of row and key is seen; besides window and lengths
//
// A mod is only asked about rows and keys that exist: past the ends of a tile about the last ones,
// and what it says of those is dropped. So no index it makes of a place is out of a call's bounds.
#pragma once

#include "cuda/tile/product.h"
#include "cuda/tile/rows.h"

namespace attnforge::cuda {

// A row and a key. query and key count from the start of their sequence; position is where the
// query stands among the keys, query + keys - queries.
struct Place {
  int batch, head, query, key, position;
};

struct NoMod {
  static constexpr bool kScores = false, kMasks = false;
};

// Row r of the tile, and key 0.
AF_DEVICE Place place_of_row(const Sequence& seq, const RowTile& rows, int r) {
  const int row = at_most(r, rows.rows - 1 - rows.first), query = rows.query(row);
  return {seq.batch, rows.head(row), query, 0, query + seq.offset()};
}

// Whether a mod lets row r see a key that exists.
template <class Mod>
AF_DEVICE bool mod_sees(const Mod& mod, const Sequence& seq, const RowTile& rows, int r, int key) {
  if constexpr (Mod::kMasks) {
    Place at = place_of_row(seq, rows, r);
    at.key = key;
    return mod.sees(at);
  }
  return true;
}

// Base-2 logits of rows from first_row on and keys from first_key on, in place.
template <int kM, int kN, class Mod>
AF_DEVICE void apply_mod(Accumulators<kM, kN>& s, const Mod& mod, const Sequence& seq,
                         const RowTile& rows, int first_row, int first_key) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Place at = place_of_row(seq, rows, fragment_row(first_row, m, h));
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          at.key = at_most(first_key + fragment_column(n, i), seq.k_len - 1);
          float& x = s[m][n][i];
          if constexpr (Mod::kScores) x = mod.score(x * kLn2, at) * kLog2E;
          if constexpr (Mod::kMasks) x = mod.sees(at) ? x : -kInf;
        }
      }
    }
  }
}

}  // namespace attnforge::cuda
