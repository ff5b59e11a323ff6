#include "cpu/mlp_columns.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/elementwise.h"
#include "cpu/small_gemm.h"

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

}  // namespace

template <class Real>
Index Columns<Real>::size_of_column(const MlpSweep<Real>& args, Index max_batch) {
  Index total = 0, widest = args.layers.front().O, turned = 0;
  for (std::size_t p = 0; needs_cotangents(args) && p < 2 * args.layers.size(); ++p) total += args.parameter_size(p);
  for (const MlpLayer& layer : args.layers) {
    total += (piecewise_linear(layer.activation) ? 1 : 2) * max_batch * layer.O;
    widest = std::max({widest, layer.O, layer.I * (&layer != &args.layers.front())});
    if (layer.O * layer.I < small_layer) turned = std::max(turned, layer.O * layer.I);
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
  }
  for (std::size_t p = 0; p < 2 * args.layers.size(); ++p)
    c_.push_back(cotangents ? arena_.take(max_columns * args.parameter_size(p)) : nullptr);
  d_ = arena_.take(max_batch * max_columns * widest);
  below_ = arena_.take(max_batch * max_columns * widest);
  scaled_ = arena_.take(max_batch * widest);
  turned_ = arena_.take(max_columns * turned);
  dots_.resize(static_cast<std::size_t>(max_batch * max_columns));
  sums_.resize(static_cast<std::size_t>(max_columns * args.layers.front().O));
  directions_.resize(2 * args.layers.size());
}

template <class Real>
bool Columns<Real>::step(const Primal<Real>& primal, Index t, Index k0, Index count, int threads) {
  k0_ = k0;
  K_ = count;
  const Setting* settings = args_.settings + t * static_cast<Index>(directions_.size());
  const double ridge = args_.curvature == Curvature::none ? 0 : args_.l2 * primal.coefficient_sum;
  for (std::size_t p = 0; p < directions_.size(); ++p) directions_[p] = direction(p, settings[p], ridge);
  start_dots(primal);
  if (args_.curvature == Curvature::none) {
    first_order_dots(primal, threads);
    if (!add_scores(primal, t)) return false;
    for (const Direction& d : directions_)
      for (Index r = 0; d.u && d.keep != 1 && r < d.rows; ++r)
        scale_to(d.row, d.keep, d.u + r * d.u_stride, d.u + r * d.u_stride);
    return true;
  }
  forward(primal, threads);
  if (!add_scores(primal, t)) return false;
  differentiate_loss(primal);
  backward(primal, threads);
  return true;
}

template <class Real>
template <class Change>
void Columns<Real>::visit(Index k, Index row, Change change) {
  const Visits<Real>& visits = args_.visits;
  const Real* gradient = visits.gradients + row * visits.stride;
  for (std::size_t p = 0; p < directions_.size(); ++p) {
    Real* u = args_.u[p];
    if (!u) continue;
    const MlpLayer& layer = args_.layers[p / 2];
    const Index O = layer.O, I = layer.I, size = args_.parameter_size(p);
    const Real* from = gradient + (p % 2 ? layer.bias : layer.weight);
    if (p > 0) {
      for (Index e = 0; e < size; ++e) change(u[k * size + e], from[e]);
    } else if (args_.gram) {
      for (Index m = 0; m < args_.M; ++m)
        for (Index o = 0; o < O; ++o)
          change(u[(m * args_.C + k) * O + o], visits.projected[(m * visits.num_rows + row) * O + o]);
    } else {
      for (Index i = 0; i < I; ++i)
        for (Index o = 0; o < O; ++o) change(u[(i * args_.C + k) * O + o], from[o * I + i]);
    }
  }
}

template <class Real>
void Columns<Real>::join(Index k, Index row) {
  visit(k, row, [](Real& u, Real q) { u = q; });
}

template <class Real>
void Columns<Real>::leave(Index k, Index row) {
  visit(k, row, [](Real& u, Real q) { u -= q; });
}

// ridge: l2 Σ_b a_b, the multiple of the identity inside H; 0 where H is.
template <class Real>
typename Columns<Real>::Direction Columns<Real>::direction(std::size_t parameter, const Setting& setting,
                                                           double ridge) {
  if (!args_.u[parameter]) return {};
  const MlpLayer& layer = args_.layers[parameter / 2];
  const Index size = args_.parameter_size(parameter);
  // the first layer's weight is [I,C,O], everything else K columns one after the other
  const bool turned = parameter == 0;
  const Index rows = turned ? args_.first_rows() : 1, row = turned ? K_ * layer.O : K_ * size;
  const Index stride = turned ? args_.C * layer.O : row, offset = k0_ * (turned ? layer.O : size);
  Real* u = args_.u[parameter] + offset;
  const double decay = setting.weight_decay + ridge;
  if (setting.momentum == 0)
    return {u, static_cast<Real>(-setting.lr), static_cast<Real>(1 - setting.lr * decay), u, rows, row, stride, stride};
  const SgdRule<Real> rule{static_cast<Real>(setting.lr), static_cast<Real>(setting.momentum),
                           static_cast<Real>(setting.first != 0 ? 1 : 1 - setting.dampening), static_cast<Real>(decay),
                           setting.nesterov != 0};
  Real *m = args_.m[parameter] + offset, *c = c_[parameter];
  for (Index r = 0; r < rows; ++r) apply_momentum(row, rule, u + r * stride, m + r * stride, c + r * row);
  return {c, 1, 1, u, rows, row, row, stride};
}

// dots = l2 ⟨c_k, θ⟩
template <class Real>
void Columns<Real>::start_dots(const Primal<Real>& primal) {
  std::fill_n(dots_.begin(), primal.B * K_, 0.0);
  if (args_.l2 == 0) return;
  const Index O = args_.layers.front().O, I = args_.layers.front().I;
  std::fill(sums_.begin(), sums_.end(), 0.0);
  accumulate_products(I, K_, O, directions_[0].data, directions_[0].data_stride, primal.layers[0].weight, sums_.data());
  for (Index k = 0; k < K_; ++k) {
    double sum = std::accumulate(&sums_[k * O], &sums_[k * O] + O, 0.0) * static_cast<double>(directions_[0].scale);
    for (std::size_t p = 1; p < directions_.size(); ++p) {
      if (!directions_[p].u) continue;
      const Index size = args_.parameter_size(p);
      const Real* theta = p % 2 ? primal.layers[p / 2].bias : primal.layers[p / 2].weight;
      sum += static_cast<double>(directions_[p].scale) * inner(size, directions_[p].data + k * size, theta);
    }
    for (Index b = 0; b < primal.B; ++b) dots_[b * K_ + k] = args_.l2 * sum;
  }
}

// ż¹ = x Cᵀ up to the direction's scale; with gram the samples' rows of V = X Cᵀ.
template <class Real>
void Columns<Real>::first_products(const Primal<Real>& primal, int threads) {
  const Index O = args_.layers[0].O, I = args_.layers[0].I, B = primal.B;
  const Direction& weight = directions_[0];
  if (args_.gram) {
    for (Index b = 0; b < B; ++b)
      std::copy_n(weight.data + primal.rows[b] * weight.data_stride, K_ * O, z_[0] + b * K_ * O);
    return;
  }
  product<Real>(Op::none, Op::none, B, K_ * O, I, primal.layers[0].input, I, weight.data, weight.data_stride, 0, z_[0],
                K_ * O, threads);
}

// żˡ = ḣˡ⁻¹ Wᵀ + hˡ⁻¹ Cᵀ + c, ḣˡ = φ' żˡ; dots += ⟨∂ℓ/∂zᴸ, żᴸ⟩
template <class Real>
void Columns<Real>::forward(const Primal<Real>& primal, int threads) {
  const Index B = primal.B;
  for (std::size_t l = 0; l < z_.size(); ++l) {
    const Index O = args_.layers[l].O, I = args_.layers[l].I;
    const auto& layer = primal.layers[l];
    const Direction &weight = directions_[2 * l], &bias = directions_[2 * l + 1];
    Real scale = weight.scale;
    if (l == 0) {
      first_products(primal, threads);
    } else {
      product<Real>(Op::none, Op::transpose, B * K_, O, I, h_[l - 1], I, layer.weight, I, 0, z_[l], O, threads);
      scale_to(B * I, scale, layer.input, scaled_);
      product<Real>(Op::none, Op::transpose, B, K_ * O, I, scaled_, I, weight.data, I, 1, z_[l], K_ * O, threads);
      scale = 1;
    }
    scale_and_shift(B, K_ * O, scale, bias.scale, bias.data, z_[l]);
    if (l + 1 < z_.size()) multiply_rows(B, K_, O, layer.first, z_[l], h_[l]);
  }
  add_row_dots(B, K_, args_.layers.back().O, primal.top, z_.back(), dots_.data());
}

// dots += Σ_l ⟨δˡ, hˡ⁻¹ Cᵀ + c⟩, with δ free of coefficients
template <class Real>
void Columns<Real>::first_order_dots(const Primal<Real>& primal, int threads) {
  const Index B = primal.B;
  for (std::size_t l = 0; l < z_.size(); ++l) {
    const Index O = args_.layers[l].O, I = args_.layers[l].I;
    const Direction &weight = directions_[2 * l], &bias = directions_[2 * l + 1];
    if (l == 0)
      first_products(primal, threads);
    else
      product<Real>(Op::none, Op::transpose, B, K_ * O, I, primal.layers[l].input, I, weight.data, I, 0, z_[l], K_ * O,
                    threads);
    scale_and_shift(B, K_ * O, weight.scale, bias.scale, bias.data, z_[l]);
    add_row_dots(B, K_, O, primal.layers[l].delta, z_[l], dots_.data());
  }
}

template <class Real>
bool Columns<Real>::add_scores(const Primal<Real>& primal, Index t) {
  const Index* ids = args_.ids + args_.offsets[t];
  double sum = 0;
  for (Index k = 0; k < K_; ++k) {
    double* scores = args_.scores + (k0_ + k) * args_.scores_stride;
    for (Index b = 0; b < primal.B; ++b) {
      const double dot = dots_[b * K_ + k];
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
  if (args_.loss != Loss::cross_entropy) {
    multiply_rows(B, K_, O, primal.top_curve, z_[last], d_);
    return;
  }
  const auto& layer = primal.layers[last];
  const bool curved = args_.curvature == Curvature::exact && !piecewise_linear(args_.layers[last].activation);
  for (Index b = 0; b < B; ++b) {
    const Real scale = static_cast<Real>(primal.coefficients[b] * args_.loss_scale);
    const Real *first = layer.first + b * O, *curve = layer.second + b * O;
    for (Index k = 0; k < K_; ++k) {
      const Real* z = z_[last] + (b * K_ + k) * O;
      Real* d = d_ + (b * K_ + k) * O;
      for (Index o = 0; o < O; ++o) d[o] = first[o] * z[o];
      loss_hessian(args_.loss, scale, O, primal.probabilities + b * O, d, d);
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
  product<Real>(Op::none, Op::none, B * K_, I, O, d_, O, primal.layers[l].weight, I, 0, below_, I, threads);
  if (exact) {
    scale_to(B * O, weight.scale, primal.layers[l].delta, scaled_);
    if (O == 1 || O * I < small_layer) {
      const Real* turned = weight.data;
      if (O > 1 && K_ > 1) {
        for (Index o = 0; o < O; ++o)
          for (Index k = 0; k < K_; ++k) std::copy_n(weight.data + (k * O + o) * I, I, turned_ + (o * K_ + k) * I);
        turned = turned_;
      }
      product<Real>(Op::none, Op::none, B, K_ * I, O, scaled_, O, turned, K_ * I, 1, below_, K_ * I, threads);
    } else {
      for (Index k = 0; k < K_; ++k)
        product<Real>(Op::none, Op::none, B, I, O, scaled_, O, weight.data + k * O * I, I, 1, below_ + k * I, K_ * I,
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
  const Index rows = args_.first_rows();
  if (l == 0)  // with gram V = keep V + (x xᵀ)ᵀ δ̇
    product<Real>(Op::transpose, Op::none, rows, K_ * O, B, layer.input, rows, d_, K_ * O, weight.keep, weight.u,
                  weight.u_stride, threads);
  else
    product<Real>(Op::transpose, Op::none, K_ * O, I, B, d_, K_ * O, layer.input, I, weight.keep, weight.u, I, threads);
  if (bias.u) add_row_sums(B, K_ * O, bias.keep, d_, bias.u);
  if (l == 0 || args_.curvature != Curvature::exact) return;
  if (O == 1 || K_ == 1) {
    product<Real>(Op::transpose, Op::none, O, K_ * I, B, layer.delta, O, h_[l - 1], K_ * I, 1, weight.u, K_ * I,
                  threads);
  } else if (O * I < small_layer) {
    product<Real>(Op::transpose, Op::none, O, K_ * I, B, layer.delta, O, h_[l - 1], K_ * I, 0, turned_, K_ * I,
                  threads);
    for (Index o = 0; o < O; ++o)
      for (Index k = 0; k < K_; ++k) add_scaled<Real>(I, 1, turned_ + (o * K_ + k) * I, weight.u + (k * O + o) * I);
  } else {
    for (Index k = 0; k < K_; ++k)
      product<Real>(Op::transpose, Op::none, O, I, B, layer.delta, O, h_[l - 1] + k * I, K_ * I, 1,
                    weight.u + k * O * I, I, threads);
  }
}

template class Columns<float>;
template class Columns<double>;

}  // namespace dit_fast::cpu
