// mlp_gradient: weighted loss gradients of a feed-forward net at n parameter points.
//
//   gradients[t, :] += Σ_b a_b ∇ℓ_b(θ[t])      without the l2 part
//
// The net, its loss, theta [n, P] (n = num_steps), the data and the coefficients are those of mlp_sweep.h, with one
// batch for all points: offsets[0] … offsets[1]. gradients [n, P] is accumulated into, in theta's order of parameters.
// Empty: n of 0 or a batch of 0 leaves gradients as they are.
// Python face dit_fast.ops.mlp_gradient, plain-torch twin dit_fast.ops_torch.mlp_gradient.
#pragma once

#include "mlp_sweep.h"

namespace dit_fast::cpu {

template <class Real>
void mlp_gradient(const MlpSweep<Real>& args, Real* gradients, Index gradients_stride, int threads);

}  // namespace dit_fast::cpu
