// grad_dot: inner products of K directions with the per-sample gradients of B samples, over the layers of a net.
//
//   dots[k,b,r] += Σ_layers Σ_s ( Σ_o Σ_i δ[b,r,s,o] U[k,o,i] a[b,s,i] + Σ_o δ[b,r,s,o] v[k,o] )
//
// delta δ [B,R,S,O] · activations a [B,S,I] · weight U [K,O,I] · bias v [K,O] or null · dots [K,B,R], always double.
// K, B and R are the same in all layers. Accumulates into dots; overwrites nothing. δ·z is summed in double;
// z = Σ_i U a + v is of the operands' type and serves all R rows. Empty: K, B, R, S or O of 0 leaves dots as they are;
// I of 0 leaves the bias part. Python faces dit_fast.ops.grad_dot and grad_dot_layers, plain-torch twins in
// dit_fast.ops_torch.
#pragma once

#include <vector>

#include "layer.h"

namespace dit_fast {

template <class Real>
struct GradDotLayer {
  Samples<Real> samples;
  Directions<const Real> directions;
};

template <class Real>
struct GradDot {
  Rows<double> dots;  // rows (k, b), R elements each
  std::vector<GradDotLayer<Real>> layers;
};

namespace cpu {
template <class Real>
void grad_dot(const GradDot<Real>& args, int threads);
}

namespace cuda {
// Launches on `stream` of `device` and returns: no synchronisation, no allocation. Throws on a failed launch.
// The order in which blocks add to dots is free: two runs may differ in the last bits of a double.
template <class Real>
void grad_dot(const GradDot<Real>& args, int device, void* stream);
}  // namespace cuda

}  // namespace dit_fast
