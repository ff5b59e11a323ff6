// mlp_retrain.h for a group of models, all steps, by one team. What is computed is cpu/mlp_models.cpp's.
#pragma once

#include "team/primal.h"

namespace dit_fast::team {

template <class Real>
struct Retrain {
  Run<Real> run;
  const Index* joins;
  const Index* removed_offsets;
  const Index* removed_models;  // those of one sample rise
};

template <class Team, class Real>
struct Models {
  const Retrain<Real>& args;
  Primal<Team, Real> primal;
  const Team& team;
  const Net<Real>& net;
  Index k0;
  int count = 0, active = 0;  // models of the group, and of those that have joined

  DIT_FAST_HOST_DEVICE Models(const Team& team, const Retrain<Real>& args, Index group, double* memory)
      : args(args), primal(team, args.run, memory), team(team), net(args.run.net), k0(group * args.run.net.G) {
    const Index rest = args.run.K - k0;
    count = static_cast<int>(rest < net.G ? rest : net.G);
  }

  DIT_FAST_HOST_DEVICE void retrain() {
    primal.exchange(k0, count, true);
    team.sync();
    for (Index t = 0; t < args.run.num_steps; ++t) {
      while (active < count && args.joins[k0 + active] <= t) ++active;
      if (active > 0) step(t);
    }
    primal.exchange(k0, count, false);
  }

  DIT_FAST_HOST_DEVICE void step(Index t) {
    const int L = net.num_layers;
    primal.load(t);
    team.sync();
    primal.sum_coefficients();
    // the logged model is one layer, or phase, ahead of the others
    primal.forward(0);
    team.sync();
    for (int l = 0; l < L; ++l) {
      if (l + 1 < L)
        primal.forward(l + 1);
      else
        primal.differentiate_loss(true);
      l == 0 ? forward_first() : forward(l);
      team.sync();
    }
    if (L > 1) primal.backward(L - 1);
    differentiate_loss();
    team.sync();
    if (net.l2 != 0) for_each(team, active, [&](int g) { sum_lost(g); });
    for (int l = L - 1; l > 0; --l) {
      pull_back(l);
      if (l > 1) primal.backward(l - 1);
      // the layer above is no longer needed as it was; its first use of the lost coefficients comes after a sync
      if (l + 1 < L) update(t, l + 1);
      team.sync();
    }
    if (L == 1 && net.l2 != 0) team.sync();
    if (L > 1) update(t, 1);
    update(t, 0);
    team.sync();
  }

  DIT_FAST_HOST_DEVICE Real* d(int l) const { return primal.of_group(net.u, net.layers[l].weight); }

  // Phase: h¹ = φ(z¹ + x dᵀ + d)
  DIT_FAST_HOST_DEVICE void forward_first() {
    const Layer<Real>& layer = net.layers[0];
    const int O = layer.O, row = net.G * O;
    const Real *change = d(0), *shift = layer.bias < 0 ? nullptr : primal.of_group(net.u, layer.bias);
    product<Real>(
        team, primal.B, active * O, layer.I, [&](int b, int i) { return primal.input(0, b)[i]; },
        [&](int i, int j) { return change[i * row + j]; },
        [&](int b, int j, Real sum) {
          activate_model(layer, b * row + j, primal.at(layer.z)[b * O + j % O] + (shift ? sum + shift[j] : sum));
        });
  }

  DIT_FAST_HOST_DEVICE void activate_model(const Layer<Real>& layer, int e, Real z) {
    const ActivationValues<Real> values = activate(layer.activation, layer.slope, z);
    primal.at(layer.tangent)[e] = values.value;
    primal.at(layer.tangent_first)[e] = values.first;
  }

  // Phase: hˡ = φ(hˡ⁻¹ (W + d)ᵀ + b + d)
  DIT_FAST_HOST_DEVICE void forward(int l) {
    const Layer<Real>& layer = net.layers[l];
    const int O = layer.O, I = layer.I, G = net.G;
    const Weight<Real> w = primal.weight(l);
    const Real *change = d(l), *bias = primal.bias(l);
    const Real* shift = bias ? primal.of_group(net.u, layer.bias) : nullptr;
    for_each(team, primal.B * active * O, [&](int e) {
      const int b = e / (active * O), j = e % (active * O), o = j % O;
      const Real* h = primal.at(net.layers[l - 1].tangent) + (b * G + j / O) * I;
      Real sum = 0;
      for (int i = 0; i < I; ++i) sum += h[i] * (w(o, i) + change[j * I + i]);
      activate_model(layer, b * G * O + j, bias ? sum + (bias[o] + shift[j]) : sum);
    });
  }

  DIT_FAST_HOST_DEVICE bool lacks(Index model, Index sample) const {
    Index first = args.removed_offsets[sample], last = args.removed_offsets[sample + 1];
    while (first < last) {
      const Index middle = first + (last - first) / 2;
      if (args.removed_models[middle] < model)
        first = middle + 1;
      else
        last = middle;
    }
    return first < args.removed_offsets[sample + 1] && args.removed_models[first] == model;
  }

  // Phase: δᴸ = a_b ∂ℓ_b/∂hᴸ φ', 0 where the model lacks the sample; of a single layer less the logged model's
  DIT_FAST_HOST_DEVICE void differentiate_loss() {
    const Layer<Real>& layer = net.last();
    const int O = layer.O;
    for_each(team, primal.B * active, [&](int e) {
      const int b = e / active, g = e % active, row = (b * net.G + g) * O;
      const bool lost = lacks(k0 + g, primal.ids[b]);
      const Real *y = primal.at(layer.tangent) + row, *first = primal.at(layer.tangent_first) + row;
      Real* delta = primal.at(layer.tangent_delta) + row;
      if (net.kept >= 0) primal.at(net.kept)[b * net.G + g] = lost ? 0 : 1;
      const Real scale = static_cast<Real>(primal.coefficient(b)) * net.loss_scale;
      loss_probabilities(net.loss, O, y, delta);
      loss_gradient(net.loss, scale, O, y, delta, primal.target(b), primal.label(b), delta);
      for (int o = 0; o < O; ++o) {
        delta[o] = lost ? Real(0) : delta[o] * first[o];
        if (net.num_layers == 1) delta[o] -= primal.at(layer.delta)[b * O + o];
      }
    });
  }

  // sums[g] = Σ a_b of the samples the model lacks in this batch
  DIT_FAST_HOST_DEVICE void sum_lost(int g) {
    double sum = 0;
    for (int b = 0; b < primal.B; ++b)
      if (primal.at(net.kept)[b * net.G + g] == 0) sum += primal.coefficient(b);
    primal.doubles[net.sums + g] = sum;
  }

  // Phase: δˡ⁻¹ = φ' (δˡ (W + d)); of the first layer less the logged model's
  DIT_FAST_HOST_DEVICE void pull_back(int l) {
    const Layer<Real>&layer = net.layers[l], &below = net.layers[l - 1];
    const int O = layer.O, I = layer.I, G = net.G;
    const Weight<Real> w = primal.weight(l);
    const Real* change = d(l);
    for_each(team, primal.B * active * I, [&](int e) {
      const int b = e / (active * I), g = e / I % active, i = e % I, to = (b * G + g) * I + i;
      const Real* delta = primal.at(layer.tangent_delta) + (b * G + g) * O;
      Real sum = 0;
      for (int o = 0; o < O; ++o) sum += delta[o] * (w(o, i) + change[(g * O + o) * I + i]);
      sum *= primal.at(below.tangent_first)[to];
      primal.at(below.tangent_delta)[to] = l == 1 ? sum - primal.at(below.delta)[b * I + i] : sum;
    });
  }

  // Phase: d and m of a layer's parameters.
  DIT_FAST_HOST_DEVICE void update(Index t, int l) {
    const Layer<Real>& layer = net.layers[l];
    const int O = layer.O, I = layer.I, G = net.G, row = G * O;
    const Real *delta = primal.at(layer.tangent_delta), *logged = primal.at(layer.delta);
    const Weight<Real> w = primal.weight(l);
    const Setting* settings = args.run.settings + t * 2 * net.num_layers + 2 * l;
    if (l == 0) {
      product<Real>(
          team, I, active * O, primal.B, [&](int i, int b) { return primal.input(0, b)[i]; },
          [&](int b, int j) { return delta[b * row + j]; },
          [&](int i, int j, Real sum) { apply(settings[0], layer.weight, i * row + j, j / O, w(j % O, i), sum); });
    } else {
      for_each(team, active * O * I, [&](int e) {
        const int i = e % I, j = e / I, g = j / O, o = j % O;
        const Real *h = primal.at(net.layers[l - 1].tangent) + g * I + i, *own = primal.at(net.layers[l - 1].h) + i;
        Real sum = 0;
        for (int b = 0; b < primal.B; ++b) sum += delta[b * row + j] * h[b * G * I] - logged[b * O + o] * own[b * I];
        apply(settings[0], layer.weight, e, g, w(o, i), sum);
      });
    }
    if (layer.bias < 0) return;
    const Real* bias = primal.bias(l);
    for_each(team, active * O, [&](int j) {
      Real sum = 0;
      // of the first layer it is the difference already
      for (int b = 0; b < primal.B; ++b)
        sum += l == 0 ? delta[b * row + j] : delta[b * row + j] - logged[b * O + j % O];
      apply(settings[1], layer.bias, j, j / O, bias[j % O], sum);
    });
  }

  // The optimizer's rule for an element of a parameter, with the gradients' difference g, of which the l2 part is
  // missing.
  DIT_FAST_HOST_DEVICE void apply(const Setting& s, int place, int e, int model, Real theta, Real g) {
    Real& d = primal.of_group(net.u, place)[e];
    if (net.l2 != 0) g -= static_cast<Real>(net.l2 * primal.doubles[net.sums + model]) * (theta + d);
    const SgdRule<Real> rule{static_cast<Real>(s.lr), static_cast<Real>(s.momentum),
                             static_cast<Real>(s.first != 0 ? 1 : 1 - s.dampening),
                             static_cast<Real>(s.weight_decay + net.l2 * primal.coefficient_sum), s.nesterov != 0};
    if (s.momentum != 0)
      momentum_step(rule, g, primal.of_group(net.m, place)[e], d);
    else
      sgd_step(rule, g, d);
  }
};

// Everything that one team does: models group·G … group·G + G − 1 through all steps.
template <class Team, class Real>
DIT_FAST_HOST_DEVICE void retrain_models(const Team& team, const Retrain<Real>& args, Index group, double* memory) {
  Models<Team, Real> models(team, args, group, memory);
  models.retrain();
}

}  // namespace dit_fast::team
