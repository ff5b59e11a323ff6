// grad_dot: inner products of K directions with the gradients of B samples, for one linear layer.
//
//   dots[k,b] += Σ_s ( Σ_o Σ_i δ[b,s,o] U[k,o,i] a[b,s,i] + Σ_o δ[b,s,o] v[k,o] )
//
// delta δ [B,S,O] · activations a [B,S,I] · weight U [K,O,I] · bias v [K,O] or null · dots [K,B], always double.
// Accumulates into dots; overwrites nothing. δ·z is summed in double; z = Σ_i U a + v is of the operands' type.
// Empty: K, B, S or O of 0 leaves dots as they are; I of 0 leaves the bias part.
// Python face dit_fast.ops.grad_dot, plain-torch twin dit_fast.ops_torch.grad_dot.
#pragma once

#include "layer.h"

namespace dit_fast {

template <class Real>
struct GradDot {
  Sizes sizes;
  Rows<double> dots;             // rows k: inner_stride is the stride of k, num_inner is K
  Rows<const Real> delta;        // rows (b, s)
  Rows<const Real> activations;  // rows (b, s)
  Rows<const Real> weight;       // rows (k, o)
  Rows<const Real> bias;         // rows k, as in dots; data is null for a layer without bias
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
