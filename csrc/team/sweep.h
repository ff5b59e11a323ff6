// mlp_sweep.h for a group of columns, all steps, by one team. What is computed is cpu/mlp_columns.cpp's.
//
// A column may join and leave on the way: column k takes part in the steps t < joins[k], with the cotangent that its
// blocks hold at the start; when the steps from leaves[k] on are done, `left` is subtracted from it.
#pragma once

#include "team/primal.h"

namespace dit_fast::team {

template <class Real>
struct Sweep {
  Run<Real> run;
  double* scores;
  Index scores_stride;
  const Index* joins;                // [K] falling
  const Index* leaves;               // [K]; 0 or less: never
  const Real* left[2 * max_layers];  // laid out as u; read for the columns that leave
  Index* bad;                        // the last step whose dots are not finite, where it is above what stands there
};

template <class Team, class Real>
struct Columns {
  // c = scale · data of a parameter of the group; u is multiplied by `keep` when H c is added to it.
  struct Direction {
    const Real* data;
    Real scale, keep;
    Real* u;
  };

  const Sweep<Real>& args;
  Primal<Team, Real> primal;
  const Team& team;
  const Net<Real>& net;
  Index k0;
  int count = 0, active = 0;  // columns of the group, and of those that have joined

  DIT_FAST_HOST_DEVICE Columns(const Team& team, const Sweep<Real>& args, Index group, double* memory)
      : args(args), primal(team, args.run, memory), team(team), net(args.run.net), k0(group * args.run.net.G) {
    const Index rest = args.run.K - k0;
    count = static_cast<int>(rest < net.G ? rest : net.G);
  }

  DIT_FAST_HOST_DEVICE void sweep() {
    primal.exchange(k0, count, true);
    team.sync();
    for (Index t = args.run.num_steps - 1; t >= 0; --t) {
      while (active < count && args.joins[k0 + active] > t) ++active;
      if (active > 0) step(t);
    }
    primal.exchange(k0, count, false);
  }

  DIT_FAST_HOST_DEVICE void step(Index t) {
    if (leave(t + 1)) team.sync();
    primal.load(t);
    make_directions(t);
    team.sync();
    primal.sum_coefficients();
    start_dots(t);
    const bool second_order = net.curvature != Curvature::none;
    for (int l = 0; l < net.num_layers; ++l) {
      primal.forward(l);
      if (second_order) forward(t, l);
      team.sync();
    }
    primal.differentiate_loss(second_order);
    if (net.l2 != 0) for_each(team, active, [&](int g) { finish_dots(g); });
    team.sync();
    if (second_order)
      second_order_part(t);
    else
      first_order_part(t);
    team.sync();
  }

  // Phase: columns that leave at t; whether there are any.
  DIT_FAST_HOST_DEVICE bool leave(Index t) {
    bool any = false;
    for (int g = 0; g < active; ++g) {
      if (args.leaves[k0 + g] != t) continue;
      any = true;
      for (int p = 0; p < 2 * net.num_layers; ++p) {
        if (!args.run.u[p]) continue;
        Real* u = primal.of_group(net.u, place(p));
        primal.for_each_shared(p, k0, g, 1, [&](Index e, int own) { u[own] -= args.left[p][e]; });
      }
    }
    return any;
  }

  DIT_FAST_HOST_DEVICE int place(int p) const { return p % 2 ? net.layers[p / 2].bias : net.layers[p / 2].weight; }

  DIT_FAST_HOST_DEVICE const Setting& setting(Index t, int p) const {
    return args.run.settings[t * 2 * net.num_layers + p];
  }

  // Weight decay and the multiple of the identity inside H. The sum of coefficients must be there.
  DIT_FAST_HOST_DEVICE double decay(const Setting& s) const {
    return s.weight_decay + (net.curvature == Curvature::none ? 0 : net.l2 * primal.coefficient_sum);
  }

  // Elements of a parameter of the group as the memory holds them: those of the joined columns come first, but for the
  // first weight, [I,G,O].
  template <class Work>
  DIT_FAST_HOST_DEVICE void for_each_element(int p, Work work) const {
    const Layer<Real>& layer = net.layers[p / 2];
    if (p == 0) {
      const int row = active * layer.O, stride = net.G * layer.O;
      for_each(team, layer.I * row, [&](int e) { work(e / row * stride + e % row); });
    } else {
      for_each(team, active * (p % 2 ? layer.O : layer.O * layer.I), work);
    }
  }

  // Phase: c of the parameters with momentum, and their m. Their u takes its decay here too, which needs the
  // coefficients: summed from where they come from, as the copy is made in this phase.
  DIT_FAST_HOST_DEVICE void make_directions(Index t) {
    if (net.m < 0) return;
    primal.coefficient_sum = 0;
    const Index start = args.run.offsets[t];
    for (int b = 0; net.l2 != 0 && b < primal.B; ++b) primal.coefficient_sum += args.run.coefficients[start + b];
    for (int p = 0; p < 2 * net.num_layers; ++p) {
      const Setting& s = setting(t, p);
      if (s.momentum == 0 || place(p) < 0) continue;
      const SgdRule<Real> rule{static_cast<Real>(s.lr), static_cast<Real>(s.momentum),
                               static_cast<Real>(s.first != 0 ? 1 : 1 - s.dampening), static_cast<Real>(decay(s)),
                               s.nesterov != 0};
      Real *u = primal.of_group(net.u, place(p)), *m = primal.of_group(net.m, place(p));
      Real* c = primal.of_group(net.c, place(p));
      for_each_element(p, [&](int e) { c[e] = adjoint_step(rule, u[e], m[e]); });
    }
  }

  DIT_FAST_HOST_DEVICE Direction direction(Index t, int p) const {
    if (place(p) < 0) return {nullptr, 0, 1, nullptr};
    const Setting& s = setting(t, p);
    Real* u = primal.of_group(net.u, place(p));
    if (s.momentum != 0) return {primal.of_group(net.c, place(p)), 1, 1, u};
    return {u, static_cast<Real>(-s.lr), static_cast<Real>(1 - s.lr * decay(s)), u};
  }

  // Phase: partial sums of ⟨c_k, θ⟩.
  DIT_FAST_HOST_DEVICE void start_dots(Index t) {
    if (net.l2 == 0) return;
    double* partials = primal.doubles + net.partials;
    for_each(team, active * num_partials, [&](int n) {
      const int g = n / num_partials, own = n % num_partials;
      double total = 0;
      for (int p = 0; p < 2 * net.num_layers; ++p) {
        const Direction c = direction(t, p);
        if (!c.u) continue;
        const Layer<Real>& layer = net.layers[p / 2];
        const Weight<Real> w = primal.weight(p / 2);
        const Real* shift = primal.bias(p / 2);
        const int O = layer.O, I = p % 2 ? 1 : layer.I;
        double sum = 0;
        for (int e = own; e < O * I; e += num_partials) {
          const int o = e % O, i = e / O;
          const Real theta = p % 2 ? shift[o] : w(o, i);
          const Real u = c.data[p == 0 ? (i * net.G + g) * O + o : (g * O + o) * I + i];
          sum += static_cast<double>(u) * static_cast<double>(theta);
        }
        total += static_cast<double>(c.scale) * sum;
      }
      partials[n] = total;
    });
  }

  // sums[g] = l2 ⟨c_k, θ⟩
  DIT_FAST_HOST_DEVICE void finish_dots(int g) {
    double total = 0;
    for (int n = 0; n < num_partials; ++n) total += primal.doubles[net.partials + g * num_partials + n];
    primal.doubles[net.sums + g] = net.l2 * total;
  }

  // Phase: żˡ = ḣˡ⁻¹ Wᵀ + hˡ⁻¹ Cᵀ + c, with ḣˡ⁻¹ = φ' żˡ⁻¹; with `tangents` false żˡ = hˡ⁻¹ Cᵀ + c.
  DIT_FAST_HOST_DEVICE void forward(Index t, int l, bool tangents = true) {
    const Layer<Real>& layer = net.layers[l];
    const int O = layer.O, I = layer.I, G = net.G;
    const Direction weight = direction(t, 2 * l), bias = direction(t, 2 * l + 1);
    Real* z = primal.at(layer.tangent);
    if (l == 0) {
      product<Real>(
          team, primal.B, active * O, I, [&](int b, int i) { return primal.input(0, b)[i]; },
          [&](int i, int j) { return weight.data[i * G * O + j]; },
          [&](int b, int j, Real sum) {
            z[b * G * O + j] = weight.scale * sum + (bias.u ? bias.scale * bias.data[j] : Real(0));
          });
      return;
    }
    const Layer<Real>& below = net.layers[l - 1];
    const Weight<Real> w = primal.weight(l);
    for_each(team, primal.B * active * O, [&](int e) {
      const int b = e / (active * O), j = e % (active * O), g = j / O, o = j % O;
      const Real *h = primal.input(l, b), *first = primal.at(below.first) + b * I;
      const Real *dz = primal.at(below.tangent) + (b * G + g) * I, *c = weight.data + j * I;
      Real through = 0, own = 0;
      for (int i = 0; i < I; ++i) {
        if (tangents) through += first[i] * dz[i] * w(o, i);
        own += h[i] * c[i];
      }
      z[b * G * O + j] = through + weight.scale * own + (bias.u ? bias.scale * bias.data[j] : Real(0));
    });
  }

  // scores −= a_b dot
  DIT_FAST_HOST_DEVICE void add_score(Index t, int b, int g, double dot) {
    if (net.l2 != 0) dot += primal.doubles[net.sums + g];
    // NaN and infinity alone differ from themselves when subtracted
    if (!(dot - dot == 0)) team.raise(args.bad, t);
    team.add(args.scores + (k0 + g) * args.scores_stride + primal.ids[b], -primal.coefficient(b) * dot);
  }

  DIT_FAST_HOST_DEVICE void first_order_part(Index t) {
    for (int l = net.num_layers - 1; l > 0; --l) {
      primal.backward(l);
      team.sync();
    }
    for (int l = 0; l < net.num_layers; ++l) forward(t, l, false);
    team.sync();
    // dots += Σ_l ⟨δˡ, hˡ⁻¹ Cᵀ + c⟩
    for_each(team, primal.B * active, [&](int e) {
      const int b = e / active, g = e % active;
      double dot = 0;
      for (int l = 0; l < net.num_layers; ++l) {
        const Layer<Real>& layer = net.layers[l];
        const Real* z = primal.at(layer.tangent) + (b * net.G + g) * layer.O;
        const Real* delta = primal.at(layer.delta) + b * layer.O;
        for (int o = 0; o < layer.O; ++o) dot += static_cast<double>(delta[o]) * static_cast<double>(z[o]);
      }
      add_score(t, b, g, dot);
    });
    for (int p = 0; p < 2 * net.num_layers; ++p) {
      const Direction c = direction(t, p);
      if (c.u && c.keep != 1) for_each_element(p, [&](int e) { c.u[e] *= c.keep; });
    }
  }

  DIT_FAST_HOST_DEVICE void second_order_part(Index t) {
    const bool exact = net.curvature == Curvature::exact;
    differentiate_loss(t);
    // the logged model's pass back is one layer ahead of the columns'
    int behind = net.num_layers - 1;
    if (exact && behind > 0) primal.backward(behind);
    team.sync();
    for (int l = net.num_layers - 1; l >= 0; --l) {
      if (l > 0) pull_back(t, l);
      if (exact && l > 1) primal.backward(l - 1);
      // the layer above is no longer needed as it was
      if (l + 1 < net.num_layers) update(t, l + 1);
      if (l > 0) team.sync();
    }
    update(t, 0);
  }

  // Phase: dots and δ̇ᴸ = φ' (a_b ∂²ℓ/∂y² φ' ż) + curve ż
  DIT_FAST_HOST_DEVICE void differentiate_loss(Index t) {
    const Layer<Real>& layer = net.last();
    const int O = layer.O;
    const bool curved = net.curvature == Curvature::exact && layer.second >= 0;
    for_each(team, primal.B * active, [&](int e) {
      const int b = e / active, g = e % active, row = (b * net.G + g) * O;
      const Real *z = primal.at(layer.tangent) + row, *top = primal.at(net.top) + b * O;
      const Real *first = primal.at(layer.first) + b * O, *curve = curved ? primal.at(layer.second) + b * O : nullptr;
      Real* d = primal.at(layer.tangent_delta) + row;
      const Real scale = static_cast<Real>(primal.coefficient(b)) * net.loss_scale;
      const Real* p = primal.at(net.probabilities) + b * O;
      add_score(t, b, g, loss_column(net.loss, scale, O, z, p, top, first, curve, d));
    });
  }

  // Phase: δ̇ˡ⁻¹ = φ' (δ̇ˡ W + δˡ C) + curve żˡ⁻¹
  DIT_FAST_HOST_DEVICE void pull_back(Index t, int l) {
    const Layer<Real>&layer = net.layers[l], &below = net.layers[l - 1];
    const int O = layer.O, I = layer.I, G = net.G;
    const bool exact = net.curvature == Curvature::exact, curved = exact && below.second >= 0;
    const Direction weight = direction(t, 2 * l);
    const Weight<Real> w = primal.weight(l);
    for_each(team, primal.B * active * I, [&](int e) {
      const int b = e / (active * I), g = e / I % active, i = e % I, to = (b * G + g) * I + i;
      const Real *d = primal.at(layer.tangent_delta) + (b * G + g) * O, *delta = primal.at(layer.delta) + b * O;
      const Real* c = weight.data + g * O * I + i;
      Real through = 0, own = 0;
      for (int o = 0; o < O; ++o) {
        through += d[o] * w(o, i);
        if (exact) own += delta[o] * c[o * I];
      }
      const int shared = b * I + i;
      Real value = primal.at(below.first)[shared] * (through + weight.scale * own);
      if (curved) value += primal.at(below.second)[shared] * primal.at(below.tangent)[to];
      primal.at(below.tangent_delta)[to] = value;
    });
  }

  // Phase: U = keep U + δ̇ᵀ h + δᵀ ḣ, and the bias by the sums of δ̇
  DIT_FAST_HOST_DEVICE void update(Index t, int l) {
    const Layer<Real>& layer = net.layers[l];
    const int O = layer.O, I = layer.I, G = net.G;
    const bool exact = net.curvature == Curvature::exact;
    const Direction weight = direction(t, 2 * l), bias = direction(t, 2 * l + 1);
    const Real* d = primal.at(layer.tangent_delta);
    if (bias.u)
      for_each(team, active * O, [&](int j) {
        Real sum = 0;
        for (int b = 0; b < primal.B; ++b) sum += d[b * G * O + j];
        bias.u[j] = bias.keep * bias.u[j] + sum;
      });
    if (l == 0) {
      product<Real>(
          team, I, active * O, primal.B, [&](int i, int b) { return primal.input(0, b)[i]; },
          [&](int b, int j) { return d[b * G * O + j]; },
          [&](int i, int j, Real sum) {
            Real& u = weight.u[i * G * O + j];
            u = weight.keep * u + sum;
          });
      return;
    }
    const Layer<Real>& below = net.layers[l - 1];
    for_each(team, active * O * I, [&](int e) {
      const int i = e % I, j = e / I, g = j / O, o = j % O;
      Real sum = 0;
      for (int b = 0; b < primal.B; ++b) {
        const int shared = b * I + i;
        sum += d[b * G * O + j] * primal.at(below.h)[shared];
        if (exact)
          sum += primal.at(layer.delta)[b * O + o] * primal.at(below.first)[shared] *
                 primal.at(below.tangent)[(b * G + g) * I + i];
      }
      weight.u[e] = weight.keep * weight.u[e] + sum;
    });
  }
};

// Everything that one team does: columns group·G … group·G + G − 1 through all steps.
template <class Team, class Real>
DIT_FAST_HOST_DEVICE void sweep_columns(const Team& team, const Sweep<Real>& args, Index group, double* memory) {
  Columns<Team, Real> columns(team, args, group, memory);
  columns.sweep();
}

}  // namespace dit_fast::team
