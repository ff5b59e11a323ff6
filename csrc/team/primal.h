// The logged model's pass of one batch by a team, and the group's blocks on their way into its memory and back.
#pragma once

#include "mlp_rows.h"
#include "sgd_rule.h"
#include "team/net.h"
#include "team/team.h"

namespace dit_fast::team {

// W as it lies in theta or in its copy: element (o, i).
template <class Real>
struct Weight {
  const Real* data;
  int of_output, of_input;
  DIT_FAST_HOST_DEVICE Real operator()(int o, int i) const { return data[o * of_output + i * of_input]; }
};

template <class Team, class Real>
struct Primal {
  const Team& team;
  const Run<Real>& run;
  double* doubles;
  Real* memory;
  const Real* theta = nullptr;
  const Index* rows = nullptr;
  const Index* ids = nullptr;
  const double* coefficients = nullptr;
  double coefficient_sum = 0;
  int B = 0;

  DIT_FAST_HOST_DEVICE Primal(const Team& team, const Run<Real>& run, double* start)
      : team(team), run(run), doubles(start), memory(reinterpret_cast<Real*>(start + run.net.num_doubles)) {}

  DIT_FAST_HOST_DEVICE Real* at(int place) const { return memory + place; }

  // A parameter of the group within u, m or c.
  DIT_FAST_HOST_DEVICE Real* of_group(int block, int parameter) const { return memory + block + run.net.G * parameter; }

  DIT_FAST_HOST_DEVICE Weight<Real> weight(int l) const {
    const Layer<Real>& layer = run.net.layers[l];
    if (run.net.theta < 0) return {theta + layer.theta_weight, layer.I, 1};
    const Real* data = memory + run.net.theta + layer.weight;
    return l == 0 ? Weight<Real>{data, 1, layer.O} : Weight<Real>{data, layer.I, 1};
  }

  DIT_FAST_HOST_DEVICE const Real* bias(int l) const {
    const Layer<Real>& layer = run.net.layers[l];
    if (layer.bias < 0) return nullptr;
    return run.net.theta < 0 ? theta + layer.theta_bias : memory + run.net.theta + layer.bias;
  }

  // hˡ⁻¹ of sample b.
  DIT_FAST_HOST_DEVICE const Real* input(int l, int b) const {
    if (l > 0) return memory + run.net.layers[l - 1].h + b * run.net.layers[l].I;
    return run.net.x < 0 ? run.x + rows[b] * run.x_stride : memory + run.net.x + b * run.net.x_stride;
  }

  DIT_FAST_HOST_DEVICE const Real* target(int b) const {
    return run.targets ? run.targets + rows[b] * run.net.last().O : nullptr;
  }
  DIT_FAST_HOST_DEVICE Index label(int b) const { return run.classes ? run.classes[rows[b]] : 0; }
  DIT_FAST_HOST_DEVICE double coefficient(int b) const { return doubles[run.net.coefficients + b]; }

  // Phase: step t of the call.
  DIT_FAST_HOST_DEVICE void load(Index t) {
    const Net<Real>& net = run.net;
    const Index start = run.offsets[t];
    B = static_cast<int>(run.offsets[t + 1] - start);
    theta = run.theta + t * run.theta_stride;
    rows = run.rows + start;
    ids = run.ids + start;
    for_each(team, B, [&](int b) { doubles[net.coefficients + b] = run.coefficients[start + b]; });
    if (net.theta >= 0) {
      for (int l = 0; l < net.num_layers; ++l) {
        const Layer<Real>& layer = net.layers[l];
        Real* to = memory + net.theta + layer.weight;
        const Real* from = theta + layer.theta_weight;
        for_each(team, layer.O * layer.I,
                 [&](int e) { to[l == 0 ? e % layer.I * layer.O + e / layer.I : e] = from[e]; });
        if (layer.bias < 0) continue;
        for_each(team, layer.O, [&](int o) { memory[net.theta + layer.bias + o] = theta[layer.theta_bias + o]; });
      }
    }
    if (net.x >= 0) {
      const int I = net.layers[0].I;
      for_each(team, B * I, [&](int e) {
        memory[net.x + e / I * net.x_stride + e % I] = run.x[rows[e / I] * run.x_stride + e % I];
      });
    }
  }

  // After the phase of `load`, by every thread for itself.
  DIT_FAST_HOST_DEVICE void sum_coefficients() {
    coefficient_sum = 0;
    for (int b = 0; run.net.l2 != 0 && b < B; ++b) coefficient_sum += coefficient(b);
  }

  // Phase: hˡ = φ(hˡ⁻¹ Wᵀ + b) and its derivatives.
  DIT_FAST_HOST_DEVICE void forward(int l) {
    const Layer<Real>& layer = run.net.layers[l];
    const Weight<Real> w = weight(l);
    const Real* shift = bias(l);
    product<Real>(
        team, B, layer.O, layer.I, [&](int b, int i) { return input(l, b)[i]; }, [&](int i, int o) { return w(o, i); },
        [&](int b, int o, Real sum) {
          const int e = b * layer.O + o;
          const Real z = shift ? sum + shift[o] : sum;
          const ActivationValues<Real> values = activate(layer.activation, layer.slope, z);
          if (layer.z >= 0) memory[layer.z + e] = z;
          memory[layer.h + e] = values.value;
          memory[layer.first + e] = values.first;
          if (layer.second >= 0) memory[layer.second + e] = values.second;
        });
  }

  // Phase: δᴸ, top and the curve of the last layer; weighted false: a_b = 1.
  DIT_FAST_HOST_DEVICE void differentiate_loss(bool weighted) {
    const Net<Real>& net = run.net;
    const Layer<Real>& layer = net.last();
    const int O = layer.O;
    for_each(team, B, [&](int b) {
      const Real* y = memory + layer.h + b * O;
      Real *p = memory + net.probabilities + b * O, *top = memory + net.top + b * O;
      loss_row(net.loss, net.loss_scale, weighted ? static_cast<Real>(coefficient(b)) : Real(1), O, y, target(b),
               label(b), at(layer.first) + b * O, p, top, at(layer.delta) + b * O,
               layer.second >= 0 ? at(layer.second) + b * O : nullptr);
    });
  }

  // Phase: δˡ⁻¹ = φ' (δˡ W), and its curve.
  DIT_FAST_HOST_DEVICE void backward(int l) {
    const Layer<Real>&layer = run.net.layers[l], &below = run.net.layers[l - 1];
    const Weight<Real> w = weight(l);
    for_each(team, B * layer.I, [&](int e) {
      const Real* delta = memory + layer.delta + e / layer.I * layer.O;
      Real sum = 0;
      for (int o = 0; o < layer.O; ++o) sum += delta[o] * w(o, e % layer.I);
      if (below.second >= 0) memory[below.second + e] *= sum;
      memory[below.delta + e] = memory[below.first + e] * sum;
    });
  }

  // Phase: work(element of the arguments' blocks, element of the memory's) for the parameter's columns k0 … k0 + count.
  template <class Work>
  DIT_FAST_HOST_DEVICE void for_each_shared(int parameter, Index k0, int first, int count, Work work) const {
    const Layer<Real>& layer = run.net.layers[parameter / 2];
    const int G = run.net.G, O = layer.O;
    if (parameter == 0) {
      for_each(team, layer.I * count * O, [&](int e) {
        const int i = e / (count * O), rest = first * O + e % (count * O);
        work(i * run.C * O + k0 * O + rest, i * G * O + rest);
      });
      return;
    }
    const int size = parameter % 2 ? O : O * layer.I;
    for_each(team, count * size, [&](int e) { work(k0 * size + first * size + e, first * size + e); });
  }

  // Phase: the group's columns from the arguments into the memory, or back.
  DIT_FAST_HOST_DEVICE void exchange(Index k0, int count, bool into_memory) const {
    const Net<Real>& net = run.net;
    for (int p = 0; p < 2 * net.num_layers; ++p) {
      if (!run.u[p]) continue;
      const int place = p % 2 ? net.layers[p / 2].bias : net.layers[p / 2].weight;
      for (const bool momentum : {false, true}) {
        if (momentum && net.m < 0) continue;
        Real* outside = momentum ? run.m[p] : run.u[p];
        Real* inside = of_group(momentum ? net.m : net.u, place);
        for_each_shared(p, k0, 0, count, [&](Index e, int own) {
          if (into_memory)
            inside[own] = outside[e];
          else
            outside[e] = inside[own];
        });
      }
    }
  }
};

}  // namespace dit_fast::team
