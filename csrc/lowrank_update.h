// lowrank_update: adds a weighted sum of B samples' gradients to each of K directions, for one linear layer.
//
//   U[k,o,i] += Σ_b c[k,b] Σ_s δ[b,s,o] a[b,s,i]        v[k,o] += Σ_b c[k,b] Σ_s δ[b,s,o]
//
// weight U [K,O,I] · bias v [K,O] or null · coefficients c [K,B], always double · delta δ [B,S,O] · activations a
// [B,S,I]. Accumulates into U and v; overwrites nothing. c·δ is formed in double and rounded once; U's sums are of the
// operands' type, v's are double until they are added. Empty: K, B, S or O of 0 changes nothing; I of 0 leaves the bias
// part. Python face dit_fast.ops.lowrank_update, plain-torch twin dit_fast.ops_torch.lowrank_update.
#pragma once

#include "layer.h"

namespace dit_fast {

template <class Real>
struct LowrankUpdate {
  Sizes sizes;
  Rows<Real> weight;                // rows (k, o)
  Rows<Real> bias;                  // rows k: inner_stride is the stride of k, num_inner is K; data may be null
  Rows<const double> coefficients;  // rows k, as in bias
  Rows<const Real> delta;           // rows (b, s)
  Rows<const Real> activations;     // rows (b, s)
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
