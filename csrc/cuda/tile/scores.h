// From products to base-2 logits: scale, softcap, ALiBi, and what is hidden.
#pragma once

#include "cuda/tile/product.h"
#include "cuda/tile/rows.h"

namespace attnforge::cuda {

// What a kernel needs of a problem's scores, made on the host: a constant costs no register.
struct ScoreMap {
  float scale;  // softmax_scale log2(e)
  float gain;   // 2 log2(e) softmax_scale / softcap, the argument of tanh by exp2; 0 is no softcap
  float cap;    // softcap log2(e)
  Window keys;  // of rows
  bool sloped;  // ALiBi

  static ScoreMap of(const FlashProblem& p) {
    const auto size = [](int64_t w) { return w < 0 || w > kFar ? kFar : static_cast<int>(w); };
    const float gain = p.softcap > 0.0f ? 2.0f * kLog2E * (p.softmax_scale / p.softcap) : 0.0f;
    return {p.softmax_scale * kLog2E,
            gain,
            p.softcap * kLog2E,
            {size(p.window_left), size(p.window_right)},
            p.alibi_slopes != nullptr};
  }
};

// tanh(x) where y = 2 log2(e) x: absolutely exact to 1e-7, which is what a logit of size cap needs.
AF_DEVICE float tanh_of_exp2(float y) {
  return 1.0f - 2.0f * ptx::rcp_approx(1.0f + ptx::exp2_approx(y));
}

// Logits in place of products. distance(m, n, i): |place of the row - key| of an element, and
// slope(m, n, i) the row's slope. kFeatures: softcap and ALiBi exist at all.
// on_slope(m, n, i, x): gets d logit / d (scale * product) of elements, for a backward.
template <bool kFeatures, int kM, int kN, class Alibi, class OnSlope>
AF_DEVICE void to_logits(Accumulators<kM, kN>& s, const ScoreMap& map, const Alibi& alibi,
                         const OnSlope& on_slope) {
  const bool capped = kFeatures && map.cap > 0.0f;
  const bool sloped = kFeatures && map.sloped;
  const auto each = [&](const auto& f) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) f(m, n, i, s[m][n][i]);
      }
    }
  };
  // One branch for all elements.
  if (capped) {
    each([&](int m, int n, int i, float& x) {
      const float t = tanh_of_exp2(x * map.gain);
      on_slope(m, n, i, 1.0f - t * t);
      x = t * map.cap;
    });
  } else {
    each([&](int, int, int, float& x) { x *= map.scale; });
  }
  if (sloped) each([&](int m, int n, int i, float& x) { x -= alibi(m, n, i); });
}

// The key of element i of fragment n: of a tile of neighbours by its first one, of any other keys
// by asking them.
AF_DEVICE int key_of(int first, int n, int i) {
  return first + fragment_column(n, i);
}
template <class Columns>
AF_DEVICE int key_of(const Columns& columns, int n, int i) {
  return columns(n, i);
}

// Logits of a tile of rows and keys, and -inf for keys that a row does not see. columns: see
// key_of.
template <bool kFeatures, int kM, int kN, class Columns, class OnSlope>
AF_DEVICE void row_logits(Accumulators<kM, kN>& s, const ScoreMap& map, const RowPlaces<kM>& places,
                          const Columns& columns, const OnSlope& on_slope) {
  const auto alibi = [&](int m, int n, int i) {
    const int distance = places.at[m][i / 2] - key_of(columns, n, i);
    return places.slope2[m][i / 2] * static_cast<float>(distance < 0 ? -distance : distance);
  };
  to_logits<kFeatures, kM, kN>(s, map, alibi, on_slope);
}

template <int kM, int kN, class Columns>
AF_DEVICE void hide(Accumulators<kM, kN>& s, const RowPlaces<kM>& places, const Columns& columns,
                    int keys, Window window) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!sees(places.at[m][i / 2], key_of(columns, n, i), keys, window)) {
          s[m][n][i] = -kInf;
        }
      }
    }
  }
}

// Whether a mask over the last keys of a sequence (a tree of drafts) hides one from the row that
// stands at `at`. Rows that do not exist see what they like.
AF_DEVICE bool masked(const FlashProblem& p, const Sequence& seq, int at, int key) {
  if (p.mods.mask == nullptr) return false;
  const int query = at - seq.offset();
  const int64_t column = key - (seq.k_len - p.mods.mask_keys);
  if (query >= seq.q_len || column < 0 || column >= p.mods.mask_keys) return false;
  return p.mods.mask[seq.batch * p.mods.mask_batch + query * p.mods.mask_row + column] == 0;
}

template <int kM, int kN>
AF_DEVICE void hide_by_mask(Accumulators<kM, kN>& s, const RowPlaces<kM>& places, int first_key,
                            const FlashProblem& p, const Sequence& seq) {
  if (p.mods.mask == nullptr) return;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + fragment_column(n, i);
        if (masked(p, seq, places.at[m][i / 2], key)) s[m][n][i] = -kInf;
      }
    }
  }
}

}  // namespace attnforge::cuda
