#include "cpu/mlp_columns.h"

#include <algorithm>
#include <cmath>

#include "cpu/elementwise.h"
#include "cpu/gemm.h"

namespace dit_fast::cpu {
namespace {

// A layer of fewer weights than this is turned to [O,K,I] and back, so that one product serves all columns.
constexpr Index small_layer = 4096;

bool has_momentum(Index num_settings, const Setting* settings) {
  return std::any_of(settings, settings + num_settings, [](const Setting& s) { return s.momentum != 0; });
}

template <class Real>
bool needs_cotangents(const MlpSweep<Real>& args) {
  return has_momentum(args.num_steps * 2 * static_cast<Index>(args.layers.size()), args.settings);
}

Index parameter_size(const MlpLayer& layer, bool bias) {
  return bias ? layer.O : layer.O * layer.I;
}

}  // namespace

template <class Real>
Index Columns<Real>::size_of_column(const MlpSweep<Real>& args, Index max_batch) {
  Index total = 0, widest = args.layers.front().O, turned = 0;
  for (const MlpLayer& layer : args.layers) {
    total += (piecewise_linear(layer.activation) ? 1 : 2) * max_batch * layer.O;
    widest = std::max({widest, layer.O, layer.I * (&layer != &args.layers.front())});
    if (layer.O * layer.I < small_layer) turned = std::max(turned, layer.O * layer.I);
    if (needs_cotangents(args)) total += parameter_size(layer, false) + parameter_size(layer, true);
  }
  return total + 2 * max_batch * widest + turned;
}

template <class Real>
Columns<Real>::Columns(const MlpSweep<Real>& args, Index max_batch, Index max_columns) : args_(args) {
  Index widest = 1, turned = 0, pieces = 6;
  for (const MlpLayer& layer : args.layers) {
    widest = std::max({widest, layer.O, layer.I * (&layer != &args.layers.front())});
    if (layer.O * layer.I < small_layer) turned = std::max(turned, layer.O * layer.I);
    pieces += 4;
  }
  const bool cotangents = needs_cotangents(args);
  arena_ = Arena<Real>(size_of_column(args, max_batch) * max_columns + max_batch * widest + pieces * 16);
  for (const MlpLayer& layer : args.layers) {
    const Index size = max_batch * max_columns * layer.O;
    z_.push_back(arena_.take(size));
    h_.push_back(piecewise_linear(layer.activation) ? z_.back() : arena_.take(size));
    for (const bool bias : {false, true})
      c_.push_back(cotangents ? arena_.take(max_columns * parameter_size(layer, bias)) : nullptr);
  }
  d_ = arena_.take(max_batch * max_columns * widest);
  below_ = arena_.take(max_batch * max_columns * widest);
  scaled_ = arena_.take(max_batch * widest);
  turned_ = arena_.take(max_columns * turned);
  dots_.resize(static_cast<std::size_t>(max_batch * max_columns));
  l2_dots_.resize(static_cast<std::size_t>(max_columns));
  directions_.resize(2 * args.layers.size());
}

template <class Real>
bool Columns<Real>::step(const Primal<Real>& primal, Index t, Index k0, Index count, int threads) {
  k0_ = k0;
  K_ = count;
  double coefficient_sum = 0;
  for (Index b = 0; b < primal.B; ++b) coefficient_sum += primal.coefficients[b];
  take_directions(t, coefficient_sum);
  for (Index k = 0; k < K_; ++k) l2_dots_[k] = args_.l2 == 0 ? 0 : l2_dot(primal, k);
  if (args_.curvature == Curvature::none) {
    first_order_dots(primal, threads);
    if (!add_scores(primal, t)) return false;
    for (std::size_t p = 0; p < directions_.size(); ++p)
      if (directions_[p].u && directions_[p].keep != 1)
        scale_to(K_ * parameter_size(args_.layers[p / 2], p % 2), directions_[p].keep, directions_[p].u,
                 directions_[p].u);
    return true;
  }
  forward(primal, threads);
  if (!add_scores(primal, t)) return false;
  differentiate_loss(primal);
  backward(primal, threads);
  return true;
}

template <class Real>
void Columns<Real>::take_directions(Index t, double coefficient_sum) {
  const Setting* settings = args_.settings + t * static_cast<Index>(directions_.size());
  for (std::size_t p = 0; p < directions_.size(); ++p)
    directions_[p] = direction(p, parameter_size(args_.layers[p / 2], p % 2), settings[p], args_.l2 * coefficient_sum);
}

// ridge: l2 Σ_b a_b, the multiple of the identity inside H.
template <class Real>
typename Columns<Real>::Direction Columns<Real>::direction(std::size_t parameter, Index size, const Setting& setting,
                                                           double ridge) {
  if (!args_.u[parameter]) return {};
  Real* u = args_.u[parameter] + k0_ * size;
  const double decay = setting.weight_decay + ridge;
  if (setting.momentum == 0) return {u, static_cast<Real>(-setting.lr), static_cast<Real>(1 - setting.lr * decay), u};
  Real *m = args_.m[parameter] + k0_ * size, *c = c_[parameter];
  const Real rate = static_cast<Real>(setting.lr), momentum = static_cast<Real>(setting.momentum);
  const Real damped = static_cast<Real>(setting.first != 0 ? 1 : 1 - setting.dampening);
  const bool nesterov = setting.nesterov != 0;
  for (Index i = 0; i < K_ * size; ++i) {
    const Real r = -rate * u[i], buffer = m[i] + (nesterov ? momentum * r : r);
    c[i] = damped * buffer + (nesterov ? r : 0);
    m[i] = momentum * buffer;
    u[i] += static_cast<Real>(decay) * c[i];
  }
  return {c, 1, 1, u};
}

// l2 ⟨c_k, θ⟩
template <class Real>
double Columns<Real>::l2_dot(const Primal<Real>& primal, Index column) const {
  double sum = 0;
  for (std::size_t p = 0; p < directions_.size(); ++p) {
    if (!directions_[p].u) continue;
    const Index size = parameter_size(args_.layers[p / 2], p % 2);
    const Real* theta = p % 2 ? primal.layers[p / 2].bias : primal.layers[p / 2].weight;
    sum += static_cast<double>(directions_[p].scale) * inner(size, directions_[p].data + column * size, theta);
  }
  return args_.l2 * sum;
}

// żˡ = ḣˡ⁻¹ Wᵀ + hˡ⁻¹ Cᵀ + c, ḣˡ = φ' żˡ; dots = ⟨∂ℓ/∂zᴸ, żᴸ⟩
template <class Real>
void Columns<Real>::forward(const Primal<Real>& primal, int threads) {
  const Index B = primal.B;
  for (std::size_t l = 0; l < z_.size(); ++l) {
    const Index O = args_.layers[l].O, I = args_.layers[l].I;
    const auto& layer = primal.layers[l];
    const Direction &weight = directions_[2 * l], &bias = directions_[2 * l + 1];
    Real scale = weight.scale;
    if (l > 0) {
      gemm<Real>(Op::none, Op::transpose, B * K_, O, I, h_[l - 1], I, layer.weight, I, 0, z_[l], O, threads);
      scale_to(B * I, scale, layer.input, scaled_);
      scale = 1;
    }
    gemm<Real>(Op::none, Op::transpose, B, K_ * O, I, l > 0 ? scaled_ : layer.input, I, weight.data, I, l > 0, z_[l],
               K_ * O, threads);
    scale_and_shift(B, K_ * O, scale, bias.scale, bias.data, z_[l]);
    if (l + 1 < z_.size()) multiply_rows(B, K_, O, layer.first, z_[l], h_[l]);
  }
  const Index O = args_.layers.back().O;
  for (Index b = 0; b < B; ++b)
    for (Index k = 0; k < K_; ++k) dots_[k * B + b] = inner(O, primal.top + b * O, z_.back() + (b * K_ + k) * O);
}

// dots = Σ_l ⟨δˡ, hˡ⁻¹ Cᵀ + c⟩, with δ free of coefficients
template <class Real>
void Columns<Real>::first_order_dots(const Primal<Real>& primal, int threads) {
  const Index B = primal.B;
  std::fill_n(dots_.begin(), B * K_, 0.0);
  for (std::size_t l = 0; l < z_.size(); ++l) {
    const Index O = args_.layers[l].O, I = args_.layers[l].I;
    const Direction &weight = directions_[2 * l], &bias = directions_[2 * l + 1];
    gemm<Real>(Op::none, Op::transpose, B, K_ * O, I, primal.layers[l].input, I, weight.data, I, 0, z_[l], K_ * O,
               threads);
    scale_and_shift(B, K_ * O, weight.scale, bias.scale, bias.data, z_[l]);
    for (Index b = 0; b < B; ++b)
      for (Index k = 0; k < K_; ++k)
        dots_[k * B + b] += inner(O, primal.layers[l].delta + b * O, z_[l] + (b * K_ + k) * O);
  }
}

template <class Real>
bool Columns<Real>::add_scores(const Primal<Real>& primal, Index t) {
  const Index* ids = args_.ids + args_.offsets[t];
  double sum = 0;
  for (Index k = 0; k < K_; ++k) {
    double* scores = args_.scores + (k0_ + k) * args_.scores_stride;
    for (Index b = 0; b < primal.B; ++b) {
      const double dot = dots_[k * primal.B + b] + l2_dots_[k];
      scores[ids[b]] -= primal.coefficients[b] * dot;
      sum += dot;
    }
  }
  return std::isfinite(sum);
}

// δ̇ᴸ = φ' (a_b ∂²ℓ/∂y² φ' ż) + curve ż
template <class Real>
void Columns<Real>::differentiate_loss(const Primal<Real>& primal) {
  const std::size_t last = z_.size() - 1;
  const Index O = args_.layers[last].O, B = primal.B;
  const auto& layer = primal.layers[last];
  const Real scale = static_cast<Real>(args_.loss_scale);
  for (Index b = 0; b < B; ++b) {
    const Real a = static_cast<Real>(primal.coefficients[b]);
    const Real *first = layer.first + b * O, *curve = layer.second + b * O;
    const bool curved = args_.curvature == Curvature::exact && !piecewise_linear(args_.layers[last].activation);
    for (Index k = 0; k < K_; ++k) {
      const Real* z = z_[last] + (b * K_ + k) * O;
      Real* d = d_ + (b * K_ + k) * O;
      for (Index o = 0; o < O; ++o) d[o] = first[o] * z[o];
      loss_hessian(args_.loss, a * scale, O, primal.probabilities + b * O, d, d);
      for (Index o = 0; o < O; ++o) d[o] = first[o] * d[o] + (curved ? curve[o] * z[o] : 0);
    }
  }
}

template <class Real>
void Columns<Real>::backward(const Primal<Real>& primal, int threads) {
  for (std::size_t l = z_.size(); l-- > 0;) {
    if (l > 0) pull_back(primal, l, threads);
    update(primal, l, threads);
    std::swap(d_, below_);
  }
}

// δ̇ˡ⁻¹ = φ' (δ̇ˡ W + δˡ C) + curve żˡ⁻¹, into below_
template <class Real>
void Columns<Real>::pull_back(const Primal<Real>& primal, std::size_t l, int threads) {
  const Index O = args_.layers[l].O, I = args_.layers[l].I, B = primal.B;
  const bool exact = args_.curvature == Curvature::exact;
  const Direction& weight = directions_[2 * l];
  gemm<Real>(Op::none, Op::none, B * K_, I, O, d_, O, primal.layers[l].weight, I, 0, below_, I, threads);
  if (exact) {
    scale_to(B * O, weight.scale, primal.layers[l].delta, scaled_);
    if (O == 1 || O * I < small_layer) {
      const Real* turned = weight.data;
      if (O > 1 && K_ > 1) {
        for (Index o = 0; o < O; ++o)
          for (Index k = 0; k < K_; ++k) std::copy_n(weight.data + (k * O + o) * I, I, turned_ + (o * K_ + k) * I);
        turned = turned_;
      }
      gemm<Real>(Op::none, Op::none, B, K_ * I, O, scaled_, O, turned, K_ * I, 1, below_, K_ * I, threads);
    } else {
      for (Index k = 0; k < K_; ++k)
        gemm<Real>(Op::none, Op::none, B, I, O, scaled_, O, weight.data + k * O * I, I, 1, below_ + k * I, K_ * I,
                   threads);
    }
  }
  const auto& below = primal.layers[l - 1];
  if (exact && !piecewise_linear(args_.layers[l - 1].activation))
    combine_rows(B, K_, I, below.first, below.second, z_[l - 1], below_);
  else
    multiply_rows(B, K_, I, below.first, below_, below_);
}

// U = keep U + δ̇ᵀ h + δᵀ ḣ, and the bias by the sums of δ̇
template <class Real>
void Columns<Real>::update(const Primal<Real>& primal, std::size_t l, int threads) {
  const Index O = args_.layers[l].O, I = args_.layers[l].I, B = primal.B;
  const Direction &weight = directions_[2 * l], &bias = directions_[2 * l + 1];
  const auto& layer = primal.layers[l];
  gemm<Real>(Op::transpose, Op::none, K_ * O, I, B, d_, K_ * O, layer.input, I, weight.keep, weight.u, I, threads);
  if (bias.u) add_row_sums(B, K_ * O, bias.keep, d_, bias.u);
  if (l == 0 || args_.curvature != Curvature::exact) return;
  if (O == 1 || K_ == 1) {
    gemm<Real>(Op::transpose, Op::none, O, K_ * I, B, layer.delta, O, h_[l - 1], K_ * I, 1, weight.u, K_ * I, threads);
  } else if (O * I < small_layer) {
    gemm<Real>(Op::transpose, Op::none, O, K_ * I, B, layer.delta, O, h_[l - 1], K_ * I, 0, turned_, K_ * I, threads);
    for (Index o = 0; o < O; ++o)
      for (Index k = 0; k < K_; ++k) add_scaled<Real>(I, 1, turned_ + (o * K_ + k) * I, weight.u + (k * O + o) * I);
  } else {
    for (Index k = 0; k < K_; ++k)
      gemm<Real>(Op::transpose, Op::none, O, I, B, layer.delta, O, h_[l - 1] + k * I, K_ * I, 1, weight.u + k * O * I,
                 I, threads);
  }
}

template class Columns<float>;
template class Columns<double>;

}  // namespace dit_fast::cpu
