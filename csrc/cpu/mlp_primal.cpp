#include "cpu/mlp_primal.h"

#include <algorithm>
#include <numeric>

#include "cpu/elementwise.h"
#include "cpu/small_gemm.h"

namespace dit_fast::cpu {

template <class Real>
Index Primal<Real>::size(const MlpSweep<Real>& args, Index max_batch) {
  const auto rounded = Arena<Real>::rounded;
  Index total = rounded(max_batch * args.first_rows());
  for (const MlpLayer& layer : args.layers) total += 4 * rounded(max_batch * layer.O);
  return total + 3 * rounded(max_batch * args.layers.back().O);
}

template <class Real>
Primal<Real>::Primal(const MlpSweep<Real>& args, Index max_batch) : args(args), arena_(size(args, max_batch)) {
  Real* input = arena_.take(max_batch * args.first_rows());
  for (const MlpLayer& layer : args.layers) {
    const Index size = max_batch * layer.O;
    layers.push_back({nullptr, nullptr, input, arena_.take(size), arena_.take(size), arena_.take(size)});
    input = arena_.take(size);
  }
  output = input;
  probabilities = arena_.take(max_batch * args.layers.back().O);
  top = arena_.take(max_batch * args.layers.back().O);
  top_curve = arena_.take(max_batch * args.layers.back().O);
}

template <class Real>
void Primal<Real>::run(Index t, bool weighted, bool backward, int threads) {
  B = args.offsets[t + 1] - args.offsets[t];
  rows = args.rows + args.offsets[t];
  coefficients = args.coefficients + args.offsets[t];
  coefficient_sum = std::accumulate(coefficients, coefficients + B, 0.0);
  const Real* theta = args.theta + t * args.theta_stride;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    layers[l].weight = theta + args.layers[l].weight;
    layers[l].bias = args.layers[l].bias < 0 ? nullptr : theta + args.layers[l].bias;
  }
  gather();
  forward(threads);
  differentiate_loss(weighted);
  if (!backward) return;
  for (std::size_t l = layers.size() - 1; l-- > 0;) {
    const Index O = args.layers[l].O, above = args.layers[l + 1].O;
    Real* delta = layers[l].delta;
    product<Real>(Op::none, Op::none, B, O, above, layers[l + 1].delta, above, layers[l + 1].weight, O, 0, delta, O,
                  threads);
    if (!piecewise_linear(args.layers[l].activation)) multiply_rows(B, 1, O, layers[l].second, delta, layers[l].second);
    multiply_rows(B, 1, O, layers[l].first, delta, delta);
  }
}

template <class Real>
void Primal<Real>::gather() {
  const Index size = args.first_rows(), stride = args.gram ? size : args.x_stride;
  const Real* from = args.gram ? args.gram : args.x;
  for (Index b = 0; b < B; ++b) std::copy_n(from + rows[b] * stride, size, layers[0].input + b * size);
}

template <class Real>
void Primal<Real>::first_products(Real* z, int threads) const {
  const Index O = args.layers.front().O, I = args.layers.front().I;
  const Layer& layer = layers.front();
  const Real beta = layer.bias ? 1 : 0;
  if (layer.bias) copy_rows(B, O, layer.bias, z);
  if (args.gram)  // the layer's input is not x
    row_products(B, O, I, args.x, args.x_stride, rows, layer.weight, I, beta, z);
  else
    product<Real>(Op::none, Op::transpose, B, O, I, layer.input, I, layer.weight, I, beta, z, O, threads);
}

template <class Real>
void Primal<Real>::forward(int threads) {
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const auto& [O, I, weight, bias, activation, slope] = args.layers[l];
    const Layer& layer = layers[l];
    Real* z = l + 1 < layers.size() ? layers[l + 1].input : output;
    if (l == 0) {
      first_products(z, threads);
    } else {
      if (layer.bias) copy_rows(B, O, layer.bias, z);
      product<Real>(Op::none, Op::transpose, B, O, I, layer.input, I, layer.weight, I, layer.bias ? 1 : 0, z, O,
                    threads);
    }
    activate_all<Real>(activation, static_cast<Real>(slope), B * O, z, layer.first, layer.second);
  }
}

template <class Real>
void Primal<Real>::differentiate_loss(bool weighted) {
  const Index O = args.layers.back().O;
  const bool curved = !piecewise_linear(args.layers.back().activation);
  const Layer& last = layers.back();
  for (Index b = 0; b < B; ++b) {
    const Index at = b * O;
    loss_probabilities(args.loss, O, output + at, probabilities + at);
    loss_gradient(args.loss, static_cast<Real>(args.loss_scale), O, output + at, probabilities + at,
                  args.targets ? args.targets + rows[b] * O : nullptr, args.classes ? args.classes[rows[b]] : 0,
                  top + at);
    const Real a = weighted ? static_cast<Real>(coefficients[b]) : Real(1);
    if (args.loss != Loss::cross_entropy) {
      const Real scale = static_cast<Real>(args.loss_scale);
      std::fill_n(top_curve + at, O, Real(1));
      loss_hessian(args.loss, a * scale, O, probabilities + at, top_curve + at, top_curve + at);
      for (Index o = at; o < at + O; ++o) {
        top_curve[o] *= last.first[o] * last.first[o];
        if (curved && args.curvature == Curvature::exact) top_curve[o] += a * top[o] * last.second[o];
      }
    }
    for (Index o = at; o < at + O; ++o) {
      if (curved) last.second[o] *= a * top[o];
      top[o] *= last.first[o];
      last.delta[o] = a * top[o];
    }
  }
}

template struct Primal<float>;
template struct Primal<double>;

}  // namespace dit_fast::cpu
