// The pieces of an adjoint step that are no products, row by row: what stands between the GEMMs of larger nets, and
// what a team does for one sample. Shapes: [B,O] of the logged model, [B,K,O] of K columns, all contiguous.
//
//   activate       z becomes φ(z); first = φ'(z); second = φ''(z), null where φ is piecewise linear
//   combine        g[b,k,o] = first[b,o] g[b,k,o] + curve[b,o] z[b,k,o]; curve and z may be null
//   loss_rows      p, top = ∂ℓ_b/∂zᴸ, delta = a_b top; second becomes the curve a_b ∂ℓ_b/∂hᴸ φ''
//   loss_columns   dots[b,k] += Σ_o top z; d = first (a_b ∂²ℓ_b/∂y² first z) + curve z
//
// Python face dit_fast.mlp_gemm; the cpu functions are for its tests.
#pragma once

#include "activation.h"
#include "loss.h"

namespace dit_fast {

template <class Real>
struct MlpRows {
  Index B, K, O;
  Activation activation;
  double slope;
  Loss loss;
  double loss_scale;
  bool weighted;               // false: a_b = 1 in what loss_rows leaves
  const double* coefficients;  // a [B]
  const Real* targets;         // [B,O] of the batch, or
  const Index* classes;        // [B]
  Real *z, *first, *second;    // activate: [B,O]; loss_rows: z is hᴸ; combine and loss_columns: z is [B,K,O]
  Real *probabilities, *top, *delta;
  Real* g;       // combine: g; loss_columns: d
  double* dots;  // [B,K]
};

// One sample's share of loss_rows.
template <class Real>
DIT_FAST_HOST_DEVICE void loss_row(Loss loss, Real scale, Real a, Index O, const Real* y, const Real* target,
                                   Index label, const Real* first, Real* p, Real* top, Real* delta, Real* second) {
  loss_probabilities(loss, O, y, p);
  loss_gradient(loss, scale, O, y, p, target, label, top);
  for (Index o = 0; o < O; ++o) {
    if (second) second[o] *= a * top[o];
    top[o] *= first[o];
    delta[o] = a * top[o];
  }
}

// One sample's and column's share of loss_columns: the dot; scale includes a_b.
template <class Real>
DIT_FAST_HOST_DEVICE double loss_column(Loss loss, Real scale, Index O, const Real* z, const Real* p, const Real* top,
                                        const Real* first, const Real* curve, Real* d) {
  double dot = 0;
  for (Index o = 0; o < O; ++o) {
    dot += static_cast<double>(top[o]) * static_cast<double>(z[o]);
    d[o] = first[o] * z[o];
  }
  loss_hessian(loss, scale, O, p, d, d);
  for (Index o = 0; o < O; ++o) d[o] = first[o] * d[o] + (curve ? curve[o] * z[o] : Real(0));
  return dot;
}

// Element or row `i` of each piece.
template <class Real>
DIT_FAST_HOST_DEVICE void activate_at(const MlpRows<Real>& args, Index i) {
  const ActivationValues<Real> values = activate(args.activation, static_cast<Real>(args.slope), args.z[i]);
  args.z[i] = values.value;
  args.first[i] = values.first;
  if (args.second) args.second[i] = values.second;
}

template <class Real>
DIT_FAST_HOST_DEVICE void combine_at(const MlpRows<Real>& args, Index i) {
  const Index shared = i / (args.K * args.O) * args.O + i % args.O;
  const Real value = args.first[shared] * args.g[i];
  args.g[i] = args.second ? value + args.second[shared] * args.z[i] : value;
}

template <class Real>
DIT_FAST_HOST_DEVICE void loss_rows_at(const MlpRows<Real>& args, Index b) {
  const Index at = b * args.O;
  const Real a = args.weighted ? static_cast<Real>(args.coefficients[b]) : Real(1);
  loss_row(args.loss, static_cast<Real>(args.loss_scale), a, args.O, args.z + at,
           args.targets ? args.targets + at : nullptr, args.classes ? args.classes[b] : 0, args.first + at,
           args.probabilities + at, args.top + at, args.delta + at, args.second ? args.second + at : nullptr);
}

template <class Real>
DIT_FAST_HOST_DEVICE void loss_columns_at(const MlpRows<Real>& args, Index i) {
  const Index b = i / args.K, at = b * args.O;
  const Real scale = static_cast<Real>(args.coefficients[b]) * static_cast<Real>(args.loss_scale);
  args.dots[i] += loss_column(args.loss, scale, args.O, args.z + i * args.O, args.probabilities + at, args.top + at,
                              args.first + at, args.second ? args.second + at : nullptr, args.g + i * args.O);
}

enum class Piece { activate, combine, loss_rows, loss_columns };

template <class Real>
DIT_FAST_HOST_DEVICE void piece_at(Piece piece, const MlpRows<Real>& args, Index i) {
  switch (piece) {
    case Piece::activate:
      return activate_at(args, i);
    case Piece::combine:
      return combine_at(args, i);
    case Piece::loss_rows:
      return loss_rows_at(args, i);
    case Piece::loss_columns:
      return loss_columns_at(args, i);
  }
}

// How many elements or rows there are.
template <class Real>
Index piece_size(Piece piece, const MlpRows<Real>& args) {
  switch (piece) {
    case Piece::activate:
      return args.B * args.O;
    case Piece::combine:
      return args.B * args.K * args.O;
    case Piece::loss_rows:
      return args.B;
    case Piece::loss_columns:
      return args.B * args.K;
  }
  return 0;
}

namespace cpu {
template <class Real>
void mlp_rows(Piece piece, const MlpRows<Real>& args);
}

namespace cuda {
// Launches on `stream` of `device` and returns: no synchronisation, no allocation. Throws on a failed launch.
template <class Real>
void mlp_rows(Piece piece, const MlpRows<Real>& args, int device, void* stream);
}  // namespace cuda

}  // namespace dit_fast
