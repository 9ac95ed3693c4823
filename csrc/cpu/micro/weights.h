// Scores to weights by the function a call asks for, and back: dS from dP.
//
//   softmax, signed   base-2 scores, a running maximum m and a sum l
//   softplus          natural scores; l sums the weights, m is 0 once a key was seen
//   sigmoid, relu     natural scores; l is 1 once a key was seen, so that the LSE is 0
// With these (m, l) splits merge and rows end in one way. Hidden scores are -inf and weigh 0.
#pragma once

#include "cpu/micro/softmax.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

// e^-|x|, from which the two functions below are exact in their tails; 0 at -inf.
AF_INLINE VecF exp_tail(VecF x) {
  return exp2(vabs(x) * splat(-kLog2E));
}
AF_INLINE VecF sigmoid(VecF x) {
  VecF e = exp_tail(x);
  return (x >= splat(0.0f) ? splat(1.0f) : e) / (splat(1.0f) + e);
}
AF_INLINE VecF relu(VecF x) {
  return vmax(splat(0.0f), x);
}
AF_INLINE VecF softplus(VecF x) {
  return relu(x) + log1p_unit(exp_tail(x));
}

// As softmax_row: s becomes weights, m and l are updated, what was accumulated wants the factor.
// Calls of their own: inlined side by side, their loops run out of registers.
template <ScoreFn kFn>
[[gnu::noinline]] static float weigh_row_as(float* s, int64_t n, float& m, float& l) {
  if constexpr (kFn == ScoreFn::kSoftmax) return softmax_row(s, n, m, l);
  if constexpr (kFn == ScoreFn::kSignedSoftmax) return softmax_row<true>(s, n, m, l);
  VecF seen{}, sum{};
  for (int64_t c = 0; c < n; c += kLanes) {
    VecF x = load(s + c), w;
    if constexpr (kFn == ScoreFn::kSigmoid) w = sigmoid(x);
    if constexpr (kFn == ScoreFn::kRelu) w = relu(x);
    if constexpr (kFn == ScoreFn::kSoftplus) w = softplus(x);
    seen = x == splat(-kInf) ? seen : splat(1.0f);
    sum += w;
    store(s + c, w);
  }
  const bool any = reduce_max(seen) > 0.0f;
  if (any) m = 0.0f;
  if constexpr (kFn == ScoreFn::kSoftplus) {
    l += reduce_add(sum);
  } else if (any) {
    l = 1.0f;
  }
  return 1.0f;
}

AF_INLINE float weigh_row(ScoreFn fn, float* s, int64_t n, float& m, float& l) {
  switch (fn) {
    case ScoreFn::kSoftmax:
      return weigh_row_as<ScoreFn::kSoftmax>(s, n, m, l);
    case ScoreFn::kSigmoid:
      return weigh_row_as<ScoreFn::kSigmoid>(s, n, m, l);
    case ScoreFn::kRelu:
      return weigh_row_as<ScoreFn::kRelu>(s, n, m, l);
    case ScoreFn::kSoftplus:
      return weigh_row_as<ScoreFn::kSoftplus>(s, n, m, l);
    case ScoreFn::kSignedSoftmax:
      return weigh_row_as<ScoreFn::kSignedSoftmax>(s, n, m, l);
  }
  return 1.0f;
}

template <class F>
AF_INLINE void differentiate_each(float* s, float* dp, int64_t n, const F& f) {
  for (int64_t c = 0; c < n; c += kLanes) {
    VecF x = load(s + c), d = load(dp + c), prob;
    f(x, d, prob);
    store(s + c, prob);
    store(dp + c, d);
  }
}

// s becomes P and dp becomes dS. lse2: the row's LSE times log2(e), delta: sum P dP - dLSE.
AF_INLINE void differentiate_weights(ScoreFn fn, float* s, float* dp, int64_t n, float lse2,
                                     float delta) {
  const VecF base = splat(lse2), mean = splat(delta);
  switch (fn) {
    case ScoreFn::kSoftmax:
      return differentiate_each(s, dp, n, [=](VecF x, VecF& d, VecF& prob) {
        prob = exp2(x - base);
        d = prob * (d - mean);
      });
    case ScoreFn::kSignedSoftmax:
      return differentiate_each(s, dp, n, [=](VecF x, VecF& d, VecF& prob) {
        VecF size = exp2(size_of(x) - base);
        prob = with_sign_of(x, size);
        d = size * (d - with_sign_of(x, mean));
      });
    case ScoreFn::kSigmoid:
      return differentiate_each(s, dp, n, [](VecF x, VecF& d, VecF& prob) {
        prob = sigmoid(x);
        d = prob * sigmoid(splat(0.0f) - x) * d;
      });
    case ScoreFn::kRelu:
      return differentiate_each(s, dp, n, [](VecF x, VecF& d, VecF& prob) {
        prob = relu(x);
        d = x > splat(0.0f) ? d : splat(0.0f);
      });
    case ScoreFn::kSoftplus: {
      const VecF share = exp2(splat(0.0f) - base);
      return differentiate_each(s, dp, n, [=](VecF x, VecF& d, VecF& prob) {
        prob = softplus(x) * share;
        d = sigmoid(x) * share * (d - mean);
      });
    }
  }
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA
