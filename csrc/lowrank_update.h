// lowrank_update: adds a weighted sum of B samples' gradients to each of K directions, over the layers of a net.
//
//   U[k,o,i] = alpha U[k,o,i] + Σ_b Σ_s ( Σ_r c[k,b,r] δ[b,r,s,o] ) a[b,s,i]
//   v[k,o]   = alpha v[k,o]   + Σ_b Σ_s   Σ_r c[k,b,r] δ[b,r,s,o]
//
// weight U [K,O,I] · bias v [K,O] or null · coefficients c [K,B,R], always double · delta δ [B,R,S,O] · activations a
// [B,S,I]. K, B and R are the same in all layers. Accumulates into U and v; with alpha = 0 it overwrites them, whatever
// they held. Σ_r c·δ is formed in double and rounded once; alpha and U's sums are of the operands' type, v's are double
// until they are stored. Empty: B, R or S of 0 leaves alpha U and alpha v; K or O of 0 changes nothing; I of 0 leaves
// the bias part. Python faces dit_fast.ops.lowrank_update and lowrank_update_layers, plain-torch twins in
// dit_fast.ops_torch.
#pragma once

#include <vector>

#include "layer.h"

namespace dit_fast {

template <class Real>
struct LowrankUpdateLayer {
  Samples<Real> samples;
  Directions<Real> directions;
};

template <class Real>
struct LowrankUpdate {
  double alpha;
  Rows<const double> coefficients;  // rows (k, b), R elements each
  std::vector<LowrankUpdateLayer<Real>> layers;
};

namespace cpu {
template <class Real>
void lowrank_update(const LowrankUpdate<Real>& args, int threads);
}

namespace cuda {
// Launches on `stream` of `device` and returns: no synchronisation, no allocation. Throws on a failed launch.
// Each element is summed by one thread in a fixed order: runs are bit-equal.
template <class Real>
void lowrank_update(const LowrankUpdate<Real>& args, int device, void* stream);
}  // namespace cuda

}  // namespace dit_fast
