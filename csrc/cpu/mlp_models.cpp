#include "cpu/mlp_models.h"

#include <algorithm>
#include <cmath>

#include "cpu/elementwise.h"
#include "cpu/model_rows.h"
#include "cpu/small_gemm.h"

namespace dit_fast::cpu {
namespace {

// A layer that each model multiplies by itself: a call per model would cost more than this much arithmetic.
bool is_tiny(const MlpLayer& layer) {
  return layer.O == 1 || layer.O * layer.I <= 64;
}

// Below this the decay of the first weight cannot be divided by.
constexpr double smallest_keep = 0.1;

Index widest_above_first(const std::vector<MlpLayer>& layers) {
  Index widest = 1;
  for (const MlpLayer& layer : layers) widest = std::max(widest, layer.O);
  return widest;
}

template <class Real>
Index largest_parameter(const MlpSweep<Real>& run) {
  Index largest = 1;
  for (std::size_t p = 0; p < 2 * run.layers.size(); ++p) largest = std::max(largest, run.parameter_size(p));
  return largest;
}

}  // namespace

template <class Real>
Index Models<Real>::size_of_model(const MlpRetrain<Real>& args, Index max_batch) {
  const auto& layers = args.run.layers;
  const Index widest = widest_above_first(layers);
  Index total = 2 * max_batch * widest + largest_parameter(args.run) + widest;
  for (const MlpLayer& layer : layers)
    total += 2 * max_batch * layer.O + (&layer == &layers.front() ? 0 : layer.O * layer.I);
  return total;
}

template <class Real>
Models<Real>::Models(const MlpRetrain<Real>& args, Index max_batch, Index max_models) : args_(args), run_(args.run) {
  const auto& layers = run_.layers;
  const Index widest = widest_above_first(layers), num_layers = static_cast<Index>(layers.size());
  Index shared = max_batch * (layers.front().O + layers.front().I);
  for (const MlpLayer& layer : layers) shared += layer.O * layer.I;
  arena_ = Arena<Real>(size_of_model(args, max_batch) * max_models + shared + (4 * num_layers + 6) * 16);
  for (const MlpLayer& layer : layers) {
    const bool first = &layer == &layers.front();
    h_.push_back(arena_.take(max_batch * max_models * layer.O));
    first_.push_back(arena_.take(max_batch * max_models * layer.O));
    weights_.push_back(first ? nullptr : arena_.take(max_models * layer.O * layer.I));
    shared_.push_back(first ? nullptr : arena_.take(layer.O * layer.I));
  }
  d_ = arena_.take(max_batch * max_models * widest);
  below_ = arena_.take(max_batch * max_models * widest);
  gradient_ = arena_.take(max_models * largest_parameter(run_));
  first_z_ = arena_.take(max_batch * layers.front().O);
  scaled_ = arena_.take(max_batch * layers.front().I);
  row_ = arena_.take(max_models * widest);
}

template <class Real>
void Models<Real>::share(const Primal<Real>& primal, bool gradients, int threads) {
  const Index B = primal.B;
  primal.first_products(first_z_, threads);
  for (std::size_t l = 1; gradients && l < shared_.size(); ++l) {
    const MlpLayer& layer = run_.layers[l];
    product<Real>(Op::transpose, Op::none, layer.O, layer.I, B, primal.layers[l].delta, layer.O, primal.layers[l].input,
                  layer.I, 0, shared_[l], layer.I, threads);
    scale_to<Real>(layer.O * layer.I, -1, shared_[l], shared_[l]);
  }
}

template <class Real>
void Models<Real>::advance(const Primal<Real>& primal, Index t, Index k0, Index count, int threads) {
  begin(k0, count);
  forward_first(primal, threads);
  for (std::size_t l = 1; l < h_.size(); ++l) forward(primal, l, threads);
  differentiate_loss(primal, t);
  remove_samples(primal, t);
  if (h_.size() == 1) subtract_rows(primal.B, K_, run_.layers[0].O, primal.layers[0].delta, d_);
  const Setting* settings = run_.settings + t * 2 * static_cast<Index>(h_.size());
  for (std::size_t l = h_.size(); l-- > 0;) {
    if (l > 0) {
      pull_back(primal, l, threads);
      update_weight(primal, l, settings[2 * l], threads);
    } else {
      update_first(primal, settings[0], threads);
    }
    if (run_.u[2 * l + 1]) update_bias(primal, l, settings[2 * l + 1]);
    std::swap(d_, below_);
  }
}

template <class Real>
void Models<Real>::add_loss_changes(const Primal<Real>& primal, Index t, Index k0, Index count, double* changes,
                                    int threads) {
  begin(k0, count);
  forward_first(primal, threads);
  for (std::size_t l = 1; l < h_.size(); ++l) forward(primal, l, threads);
  const Index O = run_.layers.back().O;
  for (Index b = 0; b < primal.B; ++b) {
    const double scale = primal.coefficients[b] * run_.loss_scale;
    const auto value = [&](const Real* y) {
      return static_cast<double>(loss_value(run_.loss, O, y, target(t, b), label(t, b)));
    };
    const double before = value(primal.output + b * O);
    for (Index k = 0; k < K_; ++k) changes[k0 + k] += scale * (value(h_.back() + (b * K_ + k) * O) - before);
  }
}

template <class Real>
void Models<Real>::begin(Index k0, Index count) {
  k0_ = k0;
  K_ = count;
}

template <class Real>
const Real* Models<Real>::target(Index t, Index b) const {
  return run_.targets ? run_.targets + run_.rows[run_.offsets[t] + b] * run_.layers.back().O : nullptr;
}

template <class Real>
Index Models<Real>::label(Index t, Index b) const {
  return run_.classes ? run_.classes[run_.rows[run_.offsets[t] + b]] : 0;
}

// h¹ = φ(z¹ + x dᵀ + d), one product for all models; with gram x dᵀ = (x xᵀ) Aᵀ
template <class Real>
void Models<Real>::forward_first(const Primal<Real>& primal, int threads) {
  const auto& [O, inputs, weight_at, bias_at, activation, slope] = run_.layers[0];
  const Real* bias_change = run_.u[1] ? run_.u[1] + k0_ * O : nullptr;
  const Index row = K_ * O, I = run_.first_rows();
  product<Real>(Op::none, Op::none, primal.B, row, I, primal.layers[0].input, I, run_.u[0] + k0_ * O, run_.C * O, 0,
                h_[0], row, threads);
  // sample by sample, whose rows stay in the first-level cache
  for (Index b = 0; b < primal.B; ++b) {
    Real* z = h_[0] + b * row;
    add_rows(1, K_, O, first_z_ + b * O, bias_change, z);
    // φ'' is not wanted: what is written of it lands in memory that is free until the way back
    activate_all<Real>(activation, static_cast<Real>(slope), row, z, first_[0] + b * row, below_);
  }
}

// hˡ = φ(hˡ⁻¹ (W + d)ᵀ + b + d)
template <class Real>
void Models<Real>::forward(const Primal<Real>& primal, std::size_t l, int threads) {
  const auto& [O, I, weight_at, bias_at, activation, slope] = run_.layers[l];
  const auto& layer = primal.layers[l];
  const Index B = primal.B;
  const Real* h = h_[l - 1];
  Real* z = h_[l];
  fill_rows(1, K_, O * I, layer.weight, run_.u[2 * l] + k0_ * O * I, weights_[l]);
  std::fill_n(row_, K_ * O, Real(0));
  if (layer.bias) fill_rows(1, K_, O, layer.bias, run_.u[2 * l + 1] + k0_ * O, row_);
  copy_rows(B, K_ * O, row_, z);
  if (is_tiny(run_.layers[l]))
    layer_forward(B, K_, O, I, h, weights_[l], z);
  else
    for (Index k = 0; k < K_; ++k)
      product<Real>(Op::none, Op::transpose, B, O, I, h + k * I, K_ * I, weights_[l] + k * O * I, I, 1, z + k * O,
                    K_ * O, threads);
  activate_all<Real>(activation, static_cast<Real>(slope), B * K_ * O, z, first_[l], below_);
}

// δᴸ = a_b ∂ℓ_b/∂hᴸ φ'
template <class Real>
void Models<Real>::differentiate_loss(const Primal<Real>& primal, Index t) {
  const Index O = run_.layers.back().O, B = primal.B;
  const Real* y = h_.back();
  Real* d = d_;
  for (Index b = 0; b < B; ++b) {
    const Real scale = static_cast<Real>(primal.coefficients[b] * run_.loss_scale);
    if (run_.loss == Loss::bce_logits) {
      bce_gradients(K_, O, scale, y + b * K_ * O, target(t, b), d + b * K_ * O);
      continue;
    }
    for (Index row = b * K_; row < (b + 1) * K_; ++row) {
      const Real* at = y + row * O;
      Real* to = d + row * O;
      loss_probabilities(run_.loss, O, at, to);
      loss_gradient(run_.loss, scale, O, at, to, target(t, b), label(t, b), to);
    }
  }
  if (run_.layers.back().activation != Activation::identity) multiply_all(B * K_ * O, first_.back(), d_);
}

template <class Real>
void Models<Real>::remove_samples(const Primal<Real>& primal, Index t) {
  lost_.clear();
  const Index O = run_.layers.back().O;
  const Index* ids = run_.ids + run_.offsets[t];
  for (Index b = 0; b < primal.B; ++b)
    for (Index r = args_.removed_offsets[ids[b]]; r < args_.removed_offsets[ids[b] + 1]; ++r) {
      const Index k = args_.removed_models[r] - k0_;
      if (k < 0 || k >= K_) continue;
      std::fill_n(d_ + (b * K_ + k) * O, O, Real(0));
      const auto same = std::find_if(lost_.begin(), lost_.end(), [k](const Lost& lost) { return lost.model == k; });
      if (same == lost_.end())
        lost_.push_back({k, primal.coefficients[b]});
      else
        same->coefficients += primal.coefficients[b];
    }
}

// δˡ⁻¹ = φ' (δˡ (W + d)), into below_
template <class Real>
void Models<Real>::pull_back(const Primal<Real>& primal, std::size_t l, int threads) {
  const Index O = run_.layers[l].O, I = run_.layers[l].I, B = primal.B;
  const bool tiny = is_tiny(run_.layers[l]), curved = run_.layers[l - 1].activation != Activation::identity;
  for (Index k = 0; !tiny && k < K_; ++k)
    product<Real>(Op::none, Op::none, B, I, O, d_ + k * O, K_ * O, weights_[l] + k * O * I, I, 0, below_ + k * I,
                  K_ * I, threads);
  // sample by sample, whose rows stay in the first-level cache
  for (Index b = 0; b < B; ++b) {
    Real* below = below_ + b * K_ * I;
    if (tiny) layer_backward(1, K_, O, I, d_ + b * K_ * O, weights_[l], below);
    if (curved) multiply_all(K_ * I, first_[l - 1] + b * K_ * I, below);
    // of the first layer the difference from the logged model alone is wanted
    if (l == 1) subtract_rows(1, K_, I, primal.layers[0].delta + b * I, below);
  }
}

// With gram: A = keep A − η δ in the batch's rows.
template <class Real>
void Models<Real>::update_combinations(const Primal<Real>& primal, const Setting& setting) {
  const Part at = part(0);
  const bool momentum = setting.momentum != 0;
  if (momentum) std::fill_n(gradient_, at.rows * at.row, Real(0));
  const Real keep = static_cast<Real>(1 - setting.lr * setting.weight_decay);
  for (Index m = 0; !momentum && keep != 1 && m < at.rows; ++m)
    scale_to(at.row, keep, at.d + m * at.stride, at.d + m * at.stride);
  for (Index b = 0; b < primal.B; ++b) {
    const Real* delta = d_ + b * at.row;
    if (momentum)
      add_scaled<Real>(at.row, 1, delta, gradient_ + primal.rows[b] * at.row);
    else
      add_scaled(at.row, static_cast<Real>(-setting.lr), delta, at.d + primal.rows[b] * at.stride);
  }
  if (momentum) apply_rule(primal, 0, setting);
}

// d_ holds δ¹ less the logged model's: d = keep d − η xᵀ δ, one product for all models
template <class Real>
void Models<Real>::update_first(const Primal<Real>& primal, const Setting& setting, int threads) {
  if (run_.gram) return update_combinations(primal, setting);
  const Index O = run_.layers[0].O, I = run_.layers[0].I, B = primal.B;
  const double keep = 1 - setting.lr * (setting.weight_decay + run_.l2 * primal.coefficient_sum);
  if (setting.momentum != 0 || std::abs(keep) < smallest_keep) {
    product<Real>(Op::transpose, Op::none, I, K_ * O, B, primal.layers[0].input, I, d_, K_ * O, 0, gradient_, K_ * O,
                  threads);
    return apply_rule(primal, 0, setting);
  }
  const Part at = part(0);
  // the l2 part of the missing samples: d + η l2 a (θ + d), ahead of the multiplication by keep; row by row, as a
  // model's own lie so far apart that they share few cache lines
  for (Index i = 0; run_.l2 != 0 && !lost_.empty() && i < I; ++i) {
    for (Index o = 0; o < O; ++o) row_[o] = primal.layers[0].weight[o * I + i];
    for (const Lost& lost : lost_) {
      const Real share = static_cast<Real>(setting.lr * run_.l2 * lost.coefficients / keep);
      const Real* __restrict theta = row_;
      Real* __restrict d = at.d + i * at.stride + lost.model * O;
      for (Index o = 0; o < O; ++o) d[o] += share * (theta[o] + d[o]);
    }
  }
  scale_to(B * I, static_cast<Real>(-setting.lr), primal.layers[0].input, scaled_);
  product<Real>(Op::transpose, Op::none, I, K_ * O, B, scaled_, I, d_, K_ * O, static_cast<Real>(keep), at.d, at.stride,
                threads);
}

template <class Real>
void Models<Real>::update_weight(const Primal<Real>& primal, std::size_t l, const Setting& setting, int threads) {
  const Index O = run_.layers[l].O, I = run_.layers[l].I, B = primal.B;
  const Real* h = h_[l - 1];
  fill_rows(1, K_, O * I, shared_[l], static_cast<const Real*>(nullptr), gradient_);
  if (is_tiny(run_.layers[l]))
    layer_gradient(B, K_, O, I, d_, h, gradient_);
  else
    for (Index k = 0; k < K_; ++k)
      product<Real>(Op::transpose, Op::none, O, I, B, d_ + k * O, K_ * O, h + k * I, K_ * I, 1, gradient_ + k * O * I,
                    I, threads);
  apply_rule(primal, 2 * l, setting);
}

template <class Real>
void Models<Real>::update_bias(const Primal<Real>& primal, std::size_t l, const Setting& setting) {
  const Index O = run_.layers[l].O, B = primal.B;
  // of the first layer d_ is the difference already
  if (l > 0) subtract_rows(B, K_, O, primal.layers[l].delta, d_);
  std::fill_n(gradient_, K_ * O, Real(0));
  add_row_sums<Real>(B, K_ * O, 1, d_, gradient_);
  apply_rule(primal, 2 * l + 1, setting);
}

template <class Real>
typename Models<Real>::Part Models<Real>::part(std::size_t parameter) const {
  const MlpLayer& layer = run_.layers[parameter / 2];
  const bool first = parameter == 0;
  const Index size = run_.parameter_size(parameter), offset = k0_ * (first ? layer.O : size);
  const Index rows = first ? run_.first_rows() : 1, row = K_ * (first ? layer.O : size);
  return {run_.u[parameter] + offset, run_.m[parameter] ? run_.m[parameter] + offset : nullptr, rows, row,
          first ? run_.C * layer.O : row};
}

// The optimizer's rule with the gradients' difference in gradient_, of which the l2 part is still missing.
template <class Real>
void Models<Real>::apply_rule(const Primal<Real>& primal, std::size_t parameter, const Setting& setting) {
  const MlpLayer& layer = run_.layers[parameter / 2];
  const Part at = part(parameter);
  const bool first = parameter == 0;
  const Real* theta = parameter % 2 ? primal.layers[parameter / 2].bias : primal.layers[parameter / 2].weight;
  const Index size = parameter % 2 ? layer.O : layer.O * layer.I;
  for (const Lost& lost : lost_) {
    const Real share = static_cast<Real>(run_.l2 * lost.coefficients);
    for (Index e = 0; share != 0 && e < size; ++e) {
      // element (o, i) of the first weight lies in row i
      const Index i = e % layer.I, o = e / layer.I;
      const Index in_d = first ? i * at.stride + lost.model * layer.O + o : lost.model * size + e;
      const Index in_gradient = first ? i * at.row + lost.model * layer.O + o : lost.model * size + e;
      gradient_[in_gradient] -= share * (theta[e] + at.d[in_d]);
    }
  }
  const SgdRule<Real> rule{static_cast<Real>(setting.lr), static_cast<Real>(setting.momentum),
                           static_cast<Real>(setting.first != 0 ? 1 : 1 - setting.dampening),
                           static_cast<Real>(setting.weight_decay + run_.l2 * primal.coefficient_sum),
                           setting.nesterov != 0};
  for (Index r = 0; r < at.rows; ++r)
    apply_sgd(at.row, rule, gradient_ + r * at.row, setting.momentum != 0 ? at.m + r * at.stride : nullptr,
              at.d + r * at.stride);
}

template class Models<float>;
template class Models<double>;

}  // namespace dit_fast::cpu
