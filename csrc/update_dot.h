// update_dot: lowrank_update of K directions and then grad_dot with them, each U read and written once.
//
//   U[k,o,i] = alpha U[k,o,i] + Σ_b Σ_s ( Σ_r c[k,b,r] δ[b,r,s,o] ) a[b,s,i]        v[k,o] likewise, without a
//   dots[k,b',r'] += Σ_layers Σ_s' Σ_o δ'[b',r',s',o] ( Σ_i U[k,o,i] a'[b',s',i] + v[k,o] )
//
// An adjoint sweep does both between two steps: the update of step t, the dots of step t − 1. The two sets of samples
// have sizes of their own; K, B, R, B' and R' are the same in all layers. Types, roundings and what empty operands do
// are those of the two ops (lowrank_update.h, grad_dot.h). Python faces dit_fast.ops.update_dot and update_dot_layers,
// plain-torch twins in dit_fast.ops_torch.
#pragma once

#include <vector>

#include "layer.h"

namespace dit_fast {

template <class Real>
struct UpdateDotLayer {
  Samples<Real> update, dot;
  Directions<Real> directions;
};

template <class Real>
struct UpdateDot {
  double alpha;
  Rows<const double> coefficients;  // rows (k, b), R elements each
  Rows<double> dots;                // rows (k, b'), R' elements each
  std::vector<UpdateDotLayer<Real>> layers;
};

namespace cpu {
template <class Real>
void update_dot(const UpdateDot<Real>& args, int threads);
}

namespace cuda {
// Launches on `stream` of `device` and returns: no synchronisation, no allocation. Throws on a failed launch.
// U is bit-equal in every run; the order in which blocks add to dots is free.
template <class Real>
void update_dot(const UpdateDot<Real>& args, int device, void* stream);
}  // namespace cuda

}  // namespace dit_fast
