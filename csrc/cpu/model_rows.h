// The vectorised loops of batched retraining. Blocks [B,K,O] hold a row per sample b and model k; weights are [K,O,I],
// one per model.
#pragma once

#include "layer.h"
#include "sgd_rule.h"

namespace dit_fast::cpu {

// z[b,k,o] = row[b,o] + shift[k,o]; shift may be null.
template <class Real>
void fill_rows(Index B, Index K, Index O, const Real* row, const Real* shift, Real* z);

// z[b,k,o] += row[b,o] + shift[k,o]; shift may be null.
template <class Real>
void add_rows(Index B, Index K, Index O, const Real* row, const Real* shift, Real* z);

// z[b,k,o] −= row[b,o]
template <class Real>
void subtract_rows(Index B, Index K, Index O, const Real* row, Real* z);

// x[i] *= y[i], i < n
template <class Real>
void multiply_all(Index n, const Real* y, Real* x);

// d[k,o] = scale (σ(y[k,o]) − target[o]), k < K: the gradient of bce_logits for one sample and all models
template <class Real>
void bce_gradients(Index K, Index O, Real scale, const Real* y, const Real* target, Real* d);

// The products of a layer that is too small for a GEMM per model:
// z[b,k,o] += Σ_i h[b,k,i] w[k,o,i]
template <class Real>
void layer_forward(Index B, Index K, Index O, Index I, const Real* h, const Real* w, Real* z);

// below[b,k,i] = Σ_o d[b,k,o] w[k,o,i]
template <class Real>
void layer_backward(Index B, Index K, Index O, Index I, const Real* d, const Real* w, Real* below);

// g[k,o,i] += Σ_b d[b,k,o] h[b,k,i]
template <class Real>
void layer_gradient(Index B, Index K, Index O, Index I, const Real* d, const Real* h, Real* g);

// The optimizer's rule for n elements (csrc/mlp_retrain.h); m is null where there is no momentum.
template <class Real>
void apply_sgd(Index n, const SgdRule<Real>& rule, const Real* g, Real* m, Real* d);

}  // namespace dit_fast::cpu
