// SGD's rule for one element, of the adjoint sweep and of retraining, the same on CPU and GPU.
#pragma once

#include "layer.h"

namespace dit_fast {

// rate η, damped 1 − τ (1 in the step that makes the buffer), decay: weight decay and the multiple of the identity that
// l2 puts into H.
template <class Real>
struct SgdRule {
  Real rate, momentum, damped, decay;
  bool nesterov;
};

// The adjoint rule with momentum (mlp_sweep.h): returns c, changes m, and u by decay · c.
template <class Real>
DIT_FAST_HOST_DEVICE Real adjoint_step(const SgdRule<Real>& rule, Real& u, Real& m) {
  const Real r = -rule.rate * u, buffer = m + (rule.nesterov ? rule.momentum : 1) * r;
  const Real c = rule.damped * buffer + (rule.nesterov ? 1 : 0) * r;
  m = rule.momentum * buffer;
  u += rule.decay * c;
  return c;
}

// The rule forwards with momentum (mlp_retrain.h) for the gradient g; without, `sgd_step`.
template <class Real>
DIT_FAST_HOST_DEVICE void momentum_step(const SgdRule<Real>& rule, Real g, Real& m, Real& d) {
  const Real gradient = g + rule.decay * d, buffer = rule.momentum * m + rule.damped * gradient;
  m = buffer;
  d -= rule.rate * ((rule.nesterov ? 1 : 0) * gradient + (rule.nesterov ? rule.momentum : 1) * buffer);
}

template <class Real>
DIT_FAST_HOST_DEVICE void sgd_step(const SgdRule<Real>& rule, Real g, Real& d) {
  d -= rule.rate * (g + rule.decay * d);
}

}  // namespace dit_fast
