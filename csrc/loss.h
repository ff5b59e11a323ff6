// Per-sample losses of an output y [O], the same on CPU and GPU: value, gradient and Hessian–vector product.
//
//   cross_entropy   scale · (log Σ_o exp y_o − y_c), c the class        p = softmax(y)
//   bce_logits      scale · Σ_o (log(1 + exp y_o) − τ_o y_o)            p = σ(y)
//   squared_error   scale · Σ_o (y_o − τ_o)²
#pragma once

#include <cmath>

#include "layer.h"

namespace dit_fast {

enum class Loss { cross_entropy, bce_logits, squared_error };

// ℓ(y) / scale. target is τ [O]; cross_entropy takes the class instead.
template <class Real>
DIT_FAST_HOST_DEVICE Real loss_value(Loss loss, Index O, const Real* y, const Real* target, Index label) {
  Real sum = 0, largest = y[0];
  if (loss == Loss::cross_entropy) {
    for (Index o = 1; o < O; ++o) largest = y[o] > largest ? y[o] : largest;
    for (Index o = 0; o < O; ++o) sum += std::exp(y[o] - largest);
    return std::log(sum) + (largest - y[label]);
  }
  for (Index o = 0; o < O; ++o) {
    if (loss == Loss::bce_logits)
      sum += (y[o] > 0 ? y[o] : 0) - target[o] * y[o] + std::log1p(std::exp(-std::fabs(y[o])));
    else
      sum += (y[o] - target[o]) * (y[o] - target[o]);
  }
  return sum;
}

// p [O] from y [O]; squared_error needs none. p may be y.
template <class Real>
DIT_FAST_HOST_DEVICE void loss_probabilities(Loss loss, Index O, const Real* y, Real* p) {
  if (loss == Loss::bce_logits) {
    for (Index o = 0; o < O; ++o) p[o] = Real(1) / (Real(1) + std::exp(-y[o]));
  } else if (loss == Loss::cross_entropy) {
    Real largest = y[0], sum = 0;
    for (Index o = 1; o < O; ++o) largest = y[o] > largest ? y[o] : largest;
    for (Index o = 0; o < O; ++o) sum += p[o] = std::exp(y[o] - largest);
    for (Index o = 0; o < O; ++o) p[o] /= sum;
  }
}

// gradient [O] = ∂ℓ/∂y. target is τ [O]; cross_entropy takes the class instead.
template <class Real>
DIT_FAST_HOST_DEVICE void loss_gradient(Loss loss, Real scale, Index O, const Real* y, const Real* p,
                                        const Real* target, Index label, Real* gradient) {
  for (Index o = 0; o < O; ++o) {
    if (loss == Loss::cross_entropy)
      gradient[o] = scale * (p[o] - Real(o == label));
    else if (loss == Loss::bce_logits)
      gradient[o] = scale * (p[o] - target[o]);
    else
      gradient[o] = 2 * scale * (y[o] - target[o]);
  }
}

// hv [O] = ∂²ℓ/∂y² v, v [O]. hv may be v.
template <class Real>
DIT_FAST_HOST_DEVICE void loss_hessian(Loss loss, Real scale, Index O, const Real* p, const Real* v, Real* hv) {
  if (loss == Loss::cross_entropy) {
    Real mean = 0;
    for (Index o = 0; o < O; ++o) mean += p[o] * v[o];
    for (Index o = 0; o < O; ++o) hv[o] = scale * p[o] * (v[o] - mean);
  } else if (loss == Loss::bce_logits) {
    for (Index o = 0; o < O; ++o) hv[o] = scale * p[o] * (Real(1) - p[o]) * v[o];
  } else {
    for (Index o = 0; o < O; ++o) hv[o] = 2 * scale * v[o];
  }
}

}  // namespace dit_fast
