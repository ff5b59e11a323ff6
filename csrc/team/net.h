// What a team needs to know of a net, and where in its memory everything lies. Passed to kernels by value.
//
// A team takes a group of G columns (or models) through all steps. Its memory holds their blocks and, per layer, what
// one batch leaves: activations of the logged model [B,O], tangents and output gradients of the group [B,G,O].
#pragma once

#include "mlp_retrain.h"

namespace dit_fast::team {

// Deeper nets do not fit.
constexpr int max_layers = 8;

// Positions within the memory, in elements; −1 for what is not there.
template <class Real>
struct Layer {
  int O, I;
  Index theta_weight, theta_bias;  // within a row of theta
  Activation activation;
  Real slope;
  int weight, bias;   // within a column's parameters, and in theta's copy
  int z;              // zˡ before the activation [B,O], of the first layer of retraining
  int h, first;       // hˡ, φ'(zˡ) [B,O]
  int second;         // φ''(zˡ), then the curve a_b ∂ℓ_b/∂hˡ φ''(zˡ) [B,O]
  int delta;          // δˡ = a_b ∂ℓ_b/∂zˡ [B,O]
  int tangent;        // żˡ, or hˡ of the models [B,G,O]
  int tangent_first;  // φ' of the models [B,G,O]
  int tangent_delta;  // δ̇ˡ, or δˡ of the models [B,G,O]
};

template <class Real>
struct Net {
  Layer<Real> layers[max_layers];
  int num_layers, G, P, max_batch;
  Loss loss;
  Curvature curvature;
  Real loss_scale;
  double l2;
  // u or d [G,P], m and c where there is momentum; each parameter's part as it lies in the arguments: [I,G,O] of the
  // first weight, [G,O,I] and [G,O] of the others
  int u, m, c;
  int theta;               // a copy of the parameters, the first weight [I,O]; −1: they are read where they are
  int x, x_stride;         // a copy of the batch's rows; −1: they are read where they are
  int probabilities, top;  // of the loss, ∂ℓ_b/∂zᴸ [B,O]
  int kept;                // 0 where a model lacks the sample [B,G], of retraining with l2
  // doubles, ahead of everything else
  int coefficients, partials, sums;
  Index num_doubles, num_bytes;

  DIT_FAST_HOST_DEVICE const Layer<Real>& last() const { return layers[num_layers - 1]; }
};

// Partial sums of an inner product, so that its order does not depend on the team's size.
constexpr int num_partials = 32;

enum class Task { sweep, retrain };

// The memory of a group of G within `limit` bytes, theta and the batch copied where there is room. num_bytes is beyond
// the limit, or −1 for a net too deep, where it does not fit.
template <class Real>
Net<Real> plan(Task task, const MlpSweep<Real>& args, Index max_batch, Index G, bool momentum, Index limit) {
  Net<Real> net{};
  net.num_bytes = -1;
  if (args.layers.size() > max_layers) return net;
  net.num_layers = static_cast<int>(args.layers.size());
  net.loss = args.loss;
  net.curvature = args.curvature;
  net.loss_scale = static_cast<Real>(args.loss_scale);
  net.l2 = args.l2;
  net.max_batch = static_cast<int>(max_batch);
  net.G = static_cast<int>(G);

  // in Index, so that a net far too large does not wrap around
  Index used = 0, P = 0;
  const auto take = [&](bool wanted, Index size) {
    const Index at = used;
    if (wanted) used += size;
    return wanted ? static_cast<int>(at) : -1;
  };
  net.coefficients = take(true, max_batch);
  net.sums = take(args.l2 != 0, G);
  net.partials = take(args.l2 != 0 && task == Task::sweep, G * num_partials);
  net.num_doubles = used;
  used = 0;
  for (const MlpLayer& layer : args.layers) P += layer.O * layer.I + (layer.bias < 0 ? 0 : layer.O);
  net.u = take(true, G * P);
  net.m = take(momentum, G * P);
  net.c = take(momentum && task == Task::sweep, G * P);
  net.P = static_cast<int>(P);
  const bool sweep = task == Task::sweep;
  P = 0;
  for (int l = 0; l < net.num_layers; ++l) {
    const MlpLayer& from = args.layers[static_cast<std::size_t>(l)];
    Layer<Real>& to = net.layers[l];
    to.O = static_cast<int>(from.O);
    to.I = static_cast<int>(from.I);
    to.theta_weight = from.weight;
    to.theta_bias = from.bias;
    to.activation = from.activation;
    to.slope = static_cast<Real>(from.slope);
    to.weight = static_cast<int>(P);
    P += from.O * from.I;
    to.bias = from.bias < 0 ? -1 : static_cast<int>(P);
    P += from.bias < 0 ? 0 : from.O;
    const Index rows = max_batch * from.O;
    to.z = take(!sweep && l == 0, rows);
    to.h = take(true, rows);
    to.first = take(true, rows);
    to.second = take(sweep && !piecewise_linear(from.activation), rows);
    to.delta = take(true, rows);
    to.tangent = take(true, G * rows);
    to.tangent_first = take(!sweep, G * rows);
    to.tangent_delta = take(true, G * rows);
  }
  net.probabilities = take(true, max_batch * args.layers.back().O);
  net.top = take(true, max_batch * args.layers.back().O);
  net.kept = take(!sweep && args.l2 != 0, max_batch * G);
  const Index available = (limit - net.num_doubles * Index(sizeof(double))) / Index(sizeof(Real));
  net.theta = take(used + P <= available, P);
  // an odd distance of the rows keeps them on different memory banks
  net.x_stride = static_cast<int>(args.layers.front().I | 1);
  net.x = take(used + max_batch * net.x_stride <= available, max_batch * net.x_stride);
  net.num_bytes = net.num_doubles * Index(sizeof(double)) + used * Index(sizeof(Real));
  return net;
}

// A run as a team sees it: the net, and the arguments of mlp_sweep.h and mlp_retrain.h.
template <class Real>
struct Run {
  Net<Real> net;
  Index K, C, num_steps;
  const Real* theta;
  Index theta_stride;
  const Real* x;
  Index x_stride;
  const Real* targets;
  const Index* classes;
  const Index* rows;
  const Index* ids;
  const double* coefficients;
  const Index* offsets;
  const Setting* settings;
  Real *u[2 * max_layers], *m[2 * max_layers];
};

template <class Real>
Run<Real> run_of(const Net<Real>& net, const MlpSweep<Real>& args) {
  Run<Real> run{net,
                args.K,
                args.C,
                args.num_steps,
                args.theta,
                args.theta_stride,
                args.x,
                args.x_stride,
                args.targets,
                args.classes,
                args.rows,
                args.ids,
                args.coefficients,
                args.offsets,
                args.settings,
                {},
                {}};
  for (std::size_t p = 0; p < args.u.size(); ++p) {
    run.u[p] = args.u[p];
    run.m[p] = args.m[p];
  }
  return run;
}

}  // namespace dit_fast::team
