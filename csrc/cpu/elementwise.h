// The vectorised loops of the dual-number sweep. Blocks [B, K, O] and rows [B, O] are contiguous; a row's value serves
// all K columns.
#pragma once

#include "activation.h"
#include "sgd_rule.h"

namespace dit_fast::cpu {

// z becomes φ(z); first = φ'(z); second = φ''(z), which is not written where φ is piecewise linear. n elements.
template <class Real>
void activate_all(Activation activation, Real slope, Index n, Real* z, Real* first, Real* second);

// out[b,k,o] = row[b,o] z[b,k,o]; out may be z.
template <class Real>
void multiply_rows(Index B, Index K, Index O, const Real* row, const Real* z, Real* out);

// g[b,k,o] = first[b,o] g[b,k,o] + curve[b,o] z[b,k,o]
template <class Real>
void combine_rows(Index B, Index K, Index O, const Real* first, const Real* curve, const Real* z, Real* g);

// z[b,j] = scale z[b,j] + bias_scale bias[j], j < n; bias may be null.
template <class Real>
void scale_and_shift(Index B, Index n, Real scale, Real bias_scale, const Real* bias, Real* z);

// z[b,o] = row[o]
template <class Real>
void copy_rows(Index B, Index O, const Real* row, Real* z) {
  for (Index b = 0; b < B; ++b, z += O)
    for (Index o = 0; o < O; ++o) z[o] = row[o];
}

// out[j] = keep out[j] + Σ_b d[b,j], j < n
template <class Real>
void add_row_sums(Index B, Index n, Real keep, const Real* d, Real* out);

// y += scale x
template <class Real>
void add_scaled(Index n, Real scale, const Real* x, Real* y);

// y = scale x; y may be x.
template <class Real>
void scale_to(Index n, Real scale, const Real* x, Real* y);

// Σ x y in double.
template <class Real>
double inner(Index n, const Real* x, const Real* y);

// sums[k,o] += Σ_i u[i,k,o] w[o,i] in double: rows of u lie `stride` apart, w is [O,I].
template <class Real>
void accumulate_products(Index I, Index K, Index O, const Real* u, Index stride, const Real* w, double* sums);

// dots[b,k] += Σ_o row[b,o] z[b,k,o] in double
template <class Real>
void add_row_dots(Index B, Index K, Index O, const Real* row, const Real* z, double* dots);

// The optimizer's adjoint rule for n elements with momentum: c, and the changes of m and of u (decay · c).
template <class Real>
void apply_momentum(Index n, const SgdRule<Real>& rule, Real* u, Real* m, Real* c);

}  // namespace dit_fast::cpu
