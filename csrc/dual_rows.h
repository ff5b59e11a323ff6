// The dual numbers of activations and losses, K tangents at once.
//
//   activation_values    y = φ(x), first = φ'(x), second = φ''(x), from x and the parts of φ (activation.h); for gelu
//                        a is φ(x) itself, of which torch has a faster one than of erfc
//   activation_columns   to[r,k,i] = φ'[r,i] from[r,k,i] + curve[r,i] tangent[r,k,i]
//   loss_columns         to[b,k,·] = a_b scale ∂²ℓ_b/∂y² from[b,k,·]
//
// Everything is contiguous. R rows of n numbers: of samples, or of their positions where channels come last. Where
// `piecewise`, gate is x and φ' = x > 0 ? 1 : slope, else gate is φ'. curve and tangent may be null; `to` may be `from`
// or `tangent`. Python face dit_fast.dual_rows.
#pragma once

#include "activation.h"
#include "loss.h"

namespace dit_fast {

template <class Real>
struct ActivationPoints {
  Index size;
  Activation activation;
  const Real *x, *a, *b;  // b is read for gelu alone
  Real *y, *first, *second;
};

template <class Real>
struct ActivationColumns {
  Index R, K, n;
  bool piecewise;
  double slope;
  const Real *gate, *curve, *tangent, *from;
  Real* to;
};

template <class Real>
struct LossColumns {
  Index B, K, O;
  Loss loss;
  double scale;
  const double* coefficients;  // a [B]
  const Real* probabilities;   // p [B,O] of loss.h; null for squared_error
  const Real* from;
  Real* to;
};

template <class Real>
DIT_FAST_HOST_DEVICE void activation_values_at(Activation activation, const ActivationPoints<Real>& args, Index i) {
  const Real x = args.x[i];
  ActivationParts<Real> parts{args.a[i], 0};
  if (activation == Activation::gelu) {
    // nearer to 0 φ(x) has lost its digits, and erfc is 1
    parts.a = std::fabs(x) < Real(1e-30) ? Real(1) : 2 * parts.a / x;
    parts.b = args.b[i];
  }
  const ActivationValues<Real> values = activate_by_parts(activation, Real(0), x, parts);
  args.y[i] = values.value;
  args.first[i] = values.first;
  args.second[i] = values.second;
}

// φ' from the gate.
template <class Real>
DIT_FAST_HOST_DEVICE Real gate_factor(bool piecewise, Real slope, Real gate) {
  return !piecewise ? gate : gate > 0 ? Real(1) : slope;
}

// Row b·K + k.
template <class Real>
DIT_FAST_HOST_DEVICE void loss_column_at(const LossColumns<Real>& args, Index row) {
  const Index b = row / args.K;
  const Real scale = static_cast<Real>(args.coefficients[b] * args.scale);
  loss_hessian(args.loss, scale, args.O, args.probabilities ? args.probabilities + b * args.O : nullptr,
               args.from + row * args.O, args.to + row * args.O);
}

namespace cpu {
template <class Real>
void activation_values(const ActivationPoints<Real>& args, int threads);
template <class Real>
void activation_columns(const ActivationColumns<Real>& args, int threads);
template <class Real>
void loss_columns(const LossColumns<Real>& args, int threads);
}  // namespace cpu

namespace cuda {
// Launch on `stream` of `device` and return: no synchronisation, no allocation. Throw on a failed launch.
template <class Real>
void activation_values(const ActivationPoints<Real>& args, int device, void* stream);
template <class Real>
void activation_columns(const ActivationColumns<Real>& args, int device, void* stream);
template <class Real>
void loss_columns(const LossColumns<Real>& args, int device, void* stream);
}  // namespace cuda

}  // namespace dit_fast
