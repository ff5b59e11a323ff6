// Activations of feed-forward nets: value, first and second derivative, the same on CPU and GPU.
#pragma once

#include <cmath>

#include "layer.h"

namespace dit_fast {

enum class Activation { identity, relu, leaky_relu, tanh, sigmoid, silu, gelu, gelu_tanh };

template <class Real>
struct ActivationValues {
  Real value, first, second;
};

// What of φ takes a function of libm, by which torch's vectorised ones can stand in for it.
//
//   tanh            a = tanh z
//   sigmoid, silu   a = 1/(1 + exp −z)
//   gelu            a = erfc(−z/√2), b = exp(−z²/2)
//   gelu_tanh       a = tanh √(2/π) (z + 0.044715 z³)
template <class Real>
struct ActivationParts {
  Real a, b;
};

template <class Real>
DIT_FAST_HOST_DEVICE ActivationParts<Real> activation_parts(Activation activation, Real z) {
  switch (activation) {
    case Activation::tanh:
      return {std::tanh(z), 0};
    case Activation::sigmoid:
    case Activation::silu:
      return {Real(1) / (Real(1) + std::exp(-z)), 0};
    case Activation::gelu:
      return {std::erfc(-z * Real(0.70710678118654752440)), std::exp(Real(-0.5) * z * z)};
    case Activation::gelu_tanh:
      return {std::tanh(Real(0.79788456080286535588) * (z + Real(0.044715) * z * z * z)), 0};
    default:
      return {};
  }
}

// φ(z), φ'(z), φ''(z). At a kink the derivatives are torch's: those of the left side. `slope` is leaky_relu's, left of
// 0.
template <class Real>
DIT_FAST_HOST_DEVICE ActivationValues<Real> activate_by_parts(Activation activation, Real slope, Real z,
                                                              const ActivationParts<Real>& parts) {
  const Real one = 1, half = Real(0.5);
  switch (activation) {
    case Activation::identity:
      return {z, one, 0};
    case Activation::relu:
      return {z <= 0 ? 0 : z, z > 0 ? one : 0, 0};  // NaN stays NaN
    case Activation::leaky_relu:
      return {z > 0 ? z : slope * z, z > 0 ? one : slope, 0};
    case Activation::tanh: {
      const Real t = parts.a, first = one - t * t;
      return {t, first, -2 * t * first};
    }
    case Activation::sigmoid: {
      const Real s = parts.a, first = s * (one - s);
      return {s, first, first * (one - 2 * s)};
    }
    case Activation::silu: {
      const Real s = parts.a, ds = s * (one - s);
      return {z * s, s + z * ds, ds * (2 + z * (one - 2 * s))};
    }
    case Activation::gelu: {
      // φ = z Φ(z), φ' = Φ + z n, φ'' = n (2 − z²), with n the density of the normal distribution
      const Real distribution = half * parts.a;
      const Real density = Real(0.39894228040143267794) * parts.b;
      return {z * distribution, distribution + z * density, density * (2 - z * z)};
    }
    case Activation::gelu_tanh: {
      // φ = ½ z (1 + tanh u), u = √(2/π) (z + 0.044715 z³)
      const Real c = Real(0.79788456080286535588), cubic = Real(0.044715);
      const Real t = parts.a, dt = one - t * t;
      const Real du = c * (one + 3 * cubic * z * z), ddu = c * 6 * cubic * z;
      return {half * z * (one + t), half * (one + t) + half * z * dt * du,
              dt * du + half * z * dt * (ddu - 2 * t * du * du)};
    }
  }
  return {};
}

template <class Real>
DIT_FAST_HOST_DEVICE ActivationValues<Real> activate(Activation activation, Real slope, Real z) {
  return activate_by_parts(activation, slope, z, activation_parts(activation, z));
}

// Whether φ'' is 0 wherever it exists, so that its terms can be left out.
DIT_FAST_HOST_DEVICE bool piecewise_linear(Activation activation) {
  return activation == Activation::identity || activation == Activation::relu || activation == Activation::leaky_relu;
}

}  // namespace dit_fast
