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

// φ(z), φ'(z), φ''(z). At a kink the derivatives are torch's: those of the left side. `slope` is leaky_relu's, left of
// 0.
template <class Real>
DIT_FAST_HOST_DEVICE ActivationValues<Real> activate(Activation activation, Real slope, Real z) {
  const Real one = 1, half = Real(0.5);
  switch (activation) {
    case Activation::identity:
      return {z, one, 0};
    case Activation::relu:
      return {z > 0 ? z : 0, z > 0 ? one : 0, 0};
    case Activation::leaky_relu:
      return {z > 0 ? z : slope * z, z > 0 ? one : slope, 0};
    case Activation::tanh: {
      const Real t = std::tanh(z), first = one - t * t;
      return {t, first, -2 * t * first};
    }
    case Activation::sigmoid: {
      const Real s = one / (one + std::exp(-z)), first = s * (one - s);
      return {s, first, first * (one - 2 * s)};
    }
    case Activation::silu: {
      const Real s = one / (one + std::exp(-z)), ds = s * (one - s);
      return {z * s, s + z * ds, ds * (2 + z * (one - 2 * s))};
    }
    case Activation::gelu: {
      // φ = z Φ(z), φ' = Φ + z n, φ'' = n (2 − z²), with n the density of the normal distribution
      const Real distribution = half * std::erfc(-z * Real(0.70710678118654752440));
      const Real density = Real(0.39894228040143267794) * std::exp(-half * z * z);
      return {z * distribution, distribution + z * density, density * (2 - z * z)};
    }
    case Activation::gelu_tanh: {
      // φ = ½ z (1 + tanh u), u = √(2/π) (z + 0.044715 z³)
      const Real c = Real(0.79788456080286535588), cubic = Real(0.044715);
      const Real t = std::tanh(c * (z + cubic * z * z * z)), dt = one - t * t;
      const Real du = c * (one + 3 * cubic * z * z), ddu = c * 6 * cubic * z;
      return {half * z * (one + t), half * (one + t) + half * z * dt * du,
              dt * du + half * z * dt * (ddu - 2 * t * du * du)};
    }
  }
  return {};
}

// Whether φ'' is 0 wherever it exists, so that its terms can be left out.
DIT_FAST_HOST_DEVICE bool piecewise_linear(Activation activation) {
  return activation == Activation::identity || activation == Activation::relu || activation == Activation::leaky_relu;
}

}  // namespace dit_fast
