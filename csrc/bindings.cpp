// The only file that knows Python. Pointers and streams arrive as integers; dit_fast.ops has checked everything.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/mlp_team.h"
#include "dual_rows.h"
#include "grad_dot.h"
#include "lowrank_update.h"
#include "max_pool.h"
#include "mlp_gradient.h"
#include "mlp_retrain.h"
#include "mlp_rows.h"
#include "mlp_sweep.h"
#include "update_dot.h"

#ifdef DIT_FAST_CUDA
#include "cuda/mlp_team.h"
#endif

namespace py = pybind11;

namespace {

using dit_fast::Index;
using dit_fast::Rows;

using Address = std::uintptr_t;
using Three = std::array<Index, 3>;
using Five = std::array<Index, 5>;

// An operand: its address and the strides, in elements, of all its dimensions but the last.
using Operand = std::pair<Address, Three>;
// S; delta [B,R,S,O]; activations [B,S,I]
using SamplesSpec = std::tuple<Index, Operand, Operand>;
// O, I; weight [K,O,I]; bias [K,O]
using DirectionsSpec = std::tuple<std::array<Index, 2>, Operand, Operand>;
// coefficients or dots [K,B,R], B and R
using PerSample = std::pair<Operand, std::array<Index, 2>>;

template <class T>
Rows<T> rows(const Operand& operand, Index num_inner) {
  return {reinterpret_cast<T*>(operand.first), operand.second[0], operand.second[1], num_inner};
}

template <class T>
Rows<T> rows(const PerSample& operand) {
  return rows<T>(operand.first, operand.second[0]);
}

template <class Real>
dit_fast::Samples<Real> samples(const std::array<Index, 2>& n, const SamplesSpec& spec) {
  const auto& [S, delta, activations] = spec;
  const auto& [sample, row, position] = delta.second;
  return {n[0],
          n[1],
          S,
          {reinterpret_cast<const Real*>(delta.first), sample, row, position},
          rows<const Real>(activations, S)};
}

template <class T>
dit_fast::Directions<T> directions(Index K, const DirectionsSpec& spec) {
  const auto& [n, weight, bias] = spec;
  return {K, n[0], n[1], rows<T>(weight, n[0]),
          // one row per column k
          Rows<T>{reinterpret_cast<T*>(bias.first), 0, bias.second[0], K}};
}

template <class Real>
dit_fast::GradDot<Real> grad_dot_args(Index K, const PerSample& dots,
                                      const std::vector<std::pair<SamplesSpec, DirectionsSpec>>& layers) {
  dit_fast::GradDot<Real> args{rows<double>(dots), {}};
  for (const auto& [s, d] : layers)
    args.layers.push_back({samples<Real>(dots.second, s), directions<const Real>(K, d)});
  return args;
}

template <class Real>
dit_fast::LowrankUpdate<Real> lowrank_update_args(Index K, double alpha, const PerSample& coefficients,
                                                  const std::vector<std::pair<SamplesSpec, DirectionsSpec>>& layers) {
  dit_fast::LowrankUpdate<Real> args{alpha, rows<const double>(coefficients), {}};
  for (const auto& [s, d] : layers)
    args.layers.push_back({samples<Real>(coefficients.second, s), directions<Real>(K, d)});
  return args;
}

template <class Real>
dit_fast::UpdateDot<Real> update_dot_args(
    Index K, double alpha, const PerSample& coefficients, const PerSample& dots,
    const std::vector<std::tuple<SamplesSpec, SamplesSpec, DirectionsSpec>>& layers) {
  dit_fast::UpdateDot<Real> args{alpha, rows<const double>(coefficients), rows<double>(dots), {}};
  for (const auto& [update, dot, d] : layers)
    args.layers.push_back(
        {samples<Real>(coefficients.second, update), samples<Real>(dots.second, dot), directions<Real>(K, d)});
  return args;
}

// O, I, position of the weight and of the bias in a row of theta, number of the activation; its slope
using LayerSpec = std::pair<Five, double>;
// numbers of the loss and of the curvature
using Kinds = std::pair<int, int>;
// address and row stride
using Table = std::pair<Address, Index>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class Real>
dit_fast::MlpSweep<Real> mlp_args(const std::vector<LayerSpec>& layers, const Kinds& kinds, double loss_scale,
                                  double l2, const std::array<Index, 3>& sizes, const Table& theta, const Table& x,
                                  Address targets, const std::array<Address, 5>& log) {
  dit_fast::MlpSweep<Real> args{};
  for (const auto& [n, slope] : layers)
    args.layers.push_back({n[0], n[1], n[2], n[3], static_cast<dit_fast::Activation>(n[4]), slope});
  args.loss = static_cast<dit_fast::Loss>(kinds.first);
  args.curvature = static_cast<dit_fast::Curvature>(kinds.second);
  args.loss_scale = loss_scale;
  args.l2 = l2;
  std::tie(args.K, args.C, args.num_steps) = std::tie(sizes[0], sizes[1], sizes[2]);
  args.theta = pointer<const Real>(theta.first);
  args.theta_stride = theta.second;
  args.x = pointer<const Real>(x.first);
  args.x_stride = x.second;
  if (args.loss == dit_fast::Loss::cross_entropy)
    args.classes = pointer<const Index>(targets);
  else
    args.targets = pointer<const Real>(targets);
  args.rows = pointer<const Index>(log[0]);
  args.ids = pointer<const Index>(log[1]);
  args.coefficients = pointer<const double>(log[2]);
  args.offsets = pointer<const Index>(log[3]);
  args.settings = pointer<const dit_fast::Setting>(log[4]);
  return args;
}

// joins, leaves, joining, leaving; the gradients and how many, and their products with the samples; gram and its rows
using SweepVisits = std::tuple<std::array<Address, 4>, Table, Table, Table>;

template <class Real>
Index mlp_sweep(dit_fast::MlpSweep<Real> args, const std::vector<Address>& u, const std::vector<Address>& m,
                const Table& scores, const SweepVisits& visits, int threads) {
  const auto& [columns, gradients, projected, gram] = visits;
  args.visits = {pointer<const Index>(columns[0]),     pointer<const Index>(columns[1]),
                 pointer<const Index>(columns[2]),     pointer<const Index>(columns[3]),
                 pointer<const Real>(gradients.first), gradients.second,
                 pointer<const Real>(projected.first), projected.second};
  args.gram = pointer<const Real>(gram.first);
  args.M = gram.second;
  for (const Address block : u) args.u.push_back(pointer<Real>(block));
  for (const Address block : m) args.m.push_back(pointer<Real>(block));
  args.m.resize(args.u.size());
  args.scores = pointer<double>(scores.first);
  args.scores_stride = scores.second;
  return dit_fast::cpu::mlp_sweep(args, threads);
}

// joins, removed_offsets, removed_models
using Models = std::array<Address, 3>;

template <class Real>
dit_fast::MlpRetrain<Real> retrain_args(dit_fast::MlpSweep<Real> run, const std::vector<Address>& d,
                                        const std::vector<Address>& m, const Models& models) {
  for (const Address block : d) run.u.push_back(pointer<Real>(block));
  for (const Address block : m) run.m.push_back(pointer<Real>(block));
  run.m.resize(run.u.size());
  return {run, pointer<const Index>(models[0]), pointer<const Index>(models[1]), pointer<const Index>(models[2])};
}

template <class Real>
void mlp_retrain(dit_fast::MlpSweep<Real> run, const std::vector<Address>& d, const std::vector<Address>& m,
                 const Models& models, const Table& gram, int threads) {
  run.gram = pointer<const Real>(gram.first);
  run.M = gram.second;
  dit_fast::cpu::mlp_retrain(retrain_args(run, d, m, models), threads);
}

// The net of a call as teams take it: group size, largest batch and bytes of memory are the last three numbers.
using TeamSizes = std::array<Index, 3>;

template <class Real>
dit_fast::team::Net<Real> team_net(dit_fast::team::Task task, const dit_fast::MlpSweep<Real>& args,
                                   const TeamSizes& sizes, bool momentum) {
  return dit_fast::team::plan(task, args, sizes[1], sizes[0], momentum, sizes[2]);
}

// Bytes that a team needs for the smallest group, or those of the given sizes; −1 where the net is too deep.
Index team_bytes(bool twice, bool retrain, const std::vector<LayerSpec>& layers, const Kinds& kinds, double l2,
                 bool momentum, const TeamSizes& sizes) {
  const auto task = retrain ? dit_fast::team::Task::retrain : dit_fast::team::Task::sweep;
  const auto bytes = [&](auto zero) {
    return team_net(task, mlp_args<decltype(zero)>(layers, kinds, 1, l2, {}, {}, {}, {}, {}), sizes, momentum)
        .num_bytes;
  };
  return twice ? bytes(0.0) : bytes(0.0f);
}

bool has_any(const std::vector<Address>& blocks) {
  for (const Address block : blocks)
    if (block) return true;
  return false;
}

// joins, leaves, the step that is not finite; blocks subtracted from the columns that leave
using Visits = std::pair<std::array<Address, 3>, std::vector<Address>>;

template <class Real>
dit_fast::team::Sweep<Real> team_sweep_args(dit_fast::MlpSweep<Real> args, const TeamSizes& sizes,
                                            const std::vector<Address>& u, const std::vector<Address>& m,
                                            const Table& scores, const Visits& visits) {
  for (const Address block : u) args.u.push_back(pointer<Real>(block));
  for (const Address block : m) args.m.push_back(pointer<Real>(block));
  args.m.resize(args.u.size());
  dit_fast::team::Sweep<Real> sweep{run_of(team_net(dit_fast::team::Task::sweep, args, sizes, has_any(m)), args),
                                    pointer<double>(scores.first),
                                    scores.second,
                                    pointer<const Index>(visits.first[0]),
                                    pointer<const Index>(visits.first[1]),
                                    {},
                                    pointer<Index>(visits.first[2])};
  for (std::size_t p = 0; p < visits.second.size(); ++p) sweep.left[p] = pointer<const Real>(visits.second[p]);
  return sweep;
}

template <class Real>
dit_fast::team::Retrain<Real> team_retrain_args(const dit_fast::MlpRetrain<Real>& args, const TeamSizes& sizes,
                                                bool momentum) {
  return {run_of(team_net(dit_fast::team::Task::retrain, args.run, sizes, momentum), args.run), args.joins,
          args.removed_offsets, args.removed_models};
}

// coefficients, targets, z, first, second, probabilities, top, delta, g, dots
template <class Real>
dit_fast::MlpRows<Real> mlp_rows_args(const std::array<Index, 3>& sizes, const std::pair<int, double>& activation,
                                      const std::pair<int, double>& loss, bool weighted,
                                      const std::array<Address, 10>& operands) {
  const auto kind = static_cast<dit_fast::Loss>(loss.first);
  const bool labelled = kind == dit_fast::Loss::cross_entropy;
  return {sizes[0],
          sizes[1],
          sizes[2],
          static_cast<dit_fast::Activation>(activation.first),
          activation.second,
          kind,
          loss.second,
          weighted,
          pointer<const double>(operands[0]),
          labelled ? nullptr : pointer<const Real>(operands[1]),
          labelled ? pointer<const Index>(operands[1]) : nullptr,
          pointer<Real>(operands[2]),
          pointer<Real>(operands[3]),
          pointer<Real>(operands[4]),
          pointer<Real>(operands[5]),
          pointer<Real>(operands[6]),
          pointer<Real>(operands[7]),
          pointer<Real>(operands[8]),
          pointer<double>(operands[9])};
}

// in, out, kernel, stride, padding, dilation
using PoolSpec = std::array<std::array<Index, 2>, 6>;

dit_fast::PoolShape pool_shape(const PoolSpec& spec) {
  dit_fast::PoolShape shape{};
  for (int d = 0; d < 2; ++d) {
    shape.in[d] = spec[0][d];
    shape.out[d] = spec[1][d];
    shape.kernel[d] = spec[2][d];
    shape.stride[d] = spec[3][d];
    shape.padding[d] = spec[4][d];
    shape.dilation[d] = spec[5][d];
  }
  return shape;
}

template <class Real>
dit_fast::MaxPool<Real> max_pool_args(Index num_planes, const PoolSpec& spec, double slope, Address x, Address y,
                                      Address places, bool wide) {
  return {num_planes, pool_shape(spec), slope, pointer<const Real>(x), pointer<Real>(y), {pointer<void>(places), wide}};
}

// y, places, from, to
template <class Real>
dit_fast::PoolColumns<Real> pool_columns_args(const Three& sizes, const PoolSpec& spec, double slope, Address y,
                                              Address places, bool wide, bool transposed, Address from, Address to) {
  return {sizes[0],
          sizes[1],
          sizes[2],
          pool_shape(spec),
          slope,
          pointer<const Real>(y),
          {pointer<void>(places), wide},
          transposed,
          pointer<const Real>(from),
          pointer<Real>(to)};
}

// x, a, b, y, first, second
template <class Real>
dit_fast::ActivationPoints<Real> activation_points(Index size, int activation, const std::array<Address, 6>& operands) {
  return {size,
          static_cast<dit_fast::Activation>(activation),
          pointer<const Real>(operands[0]),
          pointer<const Real>(operands[1]),
          pointer<const Real>(operands[2]),
          pointer<Real>(operands[3]),
          pointer<Real>(operands[4]),
          pointer<Real>(operands[5])};
}

// gate, curve, tangent, from, to
template <class Real>
dit_fast::ActivationColumns<Real> activation_columns_args(const Three& sizes, bool piecewise, double slope,
                                                          const std::array<Address, 5>& operands) {
  return {sizes[0],
          sizes[1],
          sizes[2],
          piecewise,
          slope,
          pointer<const Real>(operands[0]),
          pointer<const Real>(operands[1]),
          pointer<const Real>(operands[2]),
          pointer<const Real>(operands[3]),
          pointer<Real>(operands[4])};
}

// coefficients, probabilities, from, to
template <class Real>
dit_fast::LossColumns<Real> loss_columns_args(const Three& sizes, int loss, double scale,
                                              const std::array<Address, 4>& operands) {
  return {sizes[0],
          sizes[1],
          sizes[2],
          static_cast<dit_fast::Loss>(loss),
          scale,
          pointer<const double>(operands[0]),
          pointer<const Real>(operands[1]),
          pointer<const Real>(operands[2]),
          pointer<Real>(operands[3])};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of dit_fast. Use it through dit_fast.ops, which checks what is handed over.";
  using Free = py::call_guard<py::gil_scoped_release>;
  namespace cpu = dit_fast::cpu;

  m.def(
      "grad_dot_cpu",
      [](bool twice, Index K, const PerSample& dots, const std::vector<std::pair<SamplesSpec, DirectionsSpec>>& layers,
         int threads) {
        if (twice) return cpu::grad_dot(grad_dot_args<double>(K, dots, layers), threads);
        cpu::grad_dot(grad_dot_args<float>(K, dots, layers), threads);
      },
      Free());
  m.def(
      "lowrank_update_cpu",
      [](bool twice, Index K, double alpha, const PerSample& coefficients,
         const std::vector<std::pair<SamplesSpec, DirectionsSpec>>& layers, int threads) {
        if (twice) return cpu::lowrank_update(lowrank_update_args<double>(K, alpha, coefficients, layers), threads);
        cpu::lowrank_update(lowrank_update_args<float>(K, alpha, coefficients, layers), threads);
      },
      Free());
  m.def(
      "update_dot_cpu",
      [](bool twice, Index K, double alpha, const PerSample& coefficients, const PerSample& dots,
         const std::vector<std::tuple<SamplesSpec, SamplesSpec, DirectionsSpec>>& layers, int threads) {
        if (twice) return cpu::update_dot(update_dot_args<double>(K, alpha, coefficients, dots, layers), threads);
        cpu::update_dot(update_dot_args<float>(K, alpha, coefficients, dots, layers), threads);
      },
      Free());
  m.def(
      "mlp_sweep_cpu",
      [](bool twice, const std::vector<LayerSpec>& layers, const Kinds& kinds, double scale, double l2,
         const std::array<Index, 3>& sizes, const Table& theta, const Table& x, Address targets,
         const std::array<Address, 5>& log, const std::vector<Address>& u, const std::vector<Address>& m,
         const Table& scores, const SweepVisits& visits, int threads) {
        if (twice)
          return mlp_sweep(mlp_args<double>(layers, kinds, scale, l2, sizes, theta, x, targets, log), u, m, scores,
                           visits, threads);
        return mlp_sweep(mlp_args<float>(layers, kinds, scale, l2, sizes, theta, x, targets, log), u, m, scores, visits,
                         threads);
      },
      Free());
  m.def(
      "mlp_gradient_cpu",
      [](bool twice, const std::vector<LayerSpec>& layers, const Kinds& kinds, double scale,
         const std::array<Index, 3>& sizes, const Table& theta, const Table& x, Address targets,
         const std::array<Address, 5>& log, const Table& out, int threads) {
        if (twice)
          return cpu::mlp_gradient(mlp_args<double>(layers, kinds, scale, 0, sizes, theta, x, targets, log),
                                   pointer<double>(out.first), out.second, threads);
        cpu::mlp_gradient(mlp_args<float>(layers, kinds, scale, 0, sizes, theta, x, targets, log),
                          pointer<float>(out.first), out.second, threads);
      },
      Free());
  m.def(
      "mlp_retrain_cpu",
      [](bool twice, const std::vector<LayerSpec>& layers, const Kinds& kinds, double scale, double l2,
         const std::array<Index, 3>& sizes, const Table& theta, const Table& x, Address targets,
         const std::array<Address, 5>& log, const std::vector<Address>& d, const std::vector<Address>& m,
         const Models& models, const Table& gram, int threads) {
        if (twice)
          return mlp_retrain(mlp_args<double>(layers, kinds, scale, l2, sizes, theta, x, targets, log), d, m, models,
                             gram, threads);
        mlp_retrain(mlp_args<float>(layers, kinds, scale, l2, sizes, theta, x, targets, log), d, m, models, gram,
                    threads);
      },
      Free());
  m.def(
      "mlp_loss_changes_cpu",
      [](bool twice, const std::vector<LayerSpec>& layers, const Kinds& kinds, double scale,
         const std::array<Index, 3>& sizes, const Table& theta, const Table& x, Address targets,
         const std::array<Address, 5>& log, const std::vector<Address>& d, Address changes, int threads) {
        if (twice)
          return cpu::mlp_loss_changes(
              retrain_args(mlp_args<double>(layers, kinds, scale, 0, sizes, theta, x, targets, log), d, {}, {}),
              pointer<double>(changes), threads);
        cpu::mlp_loss_changes(
            retrain_args(mlp_args<float>(layers, kinds, scale, 0, sizes, theta, x, targets, log), d, {}, {}),
            pointer<double>(changes), threads);
      },
      Free());
  m.def(
      "mlp_rows_cpu",
      [](bool twice, int piece, const std::array<Index, 3>& sizes, const std::pair<int, double>& activation,
         const std::pair<int, double>& loss, bool weighted, const std::array<Address, 10>& operands) {
        if (twice)
          return cpu::mlp_rows(static_cast<dit_fast::Piece>(piece),
                               mlp_rows_args<double>(sizes, activation, loss, weighted, operands));
        cpu::mlp_rows(static_cast<dit_fast::Piece>(piece),
                      mlp_rows_args<float>(sizes, activation, loss, weighted, operands));
      },
      Free());
  m.def(
      "max_pool_cpu",
      [](bool twice, Index num_planes, const PoolSpec& spec, double slope, Address x, Address y, Address places,
         bool wide, int threads) {
        if (twice) return cpu::max_pool(max_pool_args<double>(num_planes, spec, slope, x, y, places, wide), threads);
        cpu::max_pool(max_pool_args<float>(num_planes, spec, slope, x, y, places, wide), threads);
      },
      Free());
  m.def(
      "pool_columns_cpu",
      [](bool twice, const Three& sizes, const PoolSpec& spec, double slope, Address y, Address places, bool wide,
         bool transposed, Address from, Address to, int threads) {
        if (twice)
          return cpu::pool_columns(pool_columns_args<double>(sizes, spec, slope, y, places, wide, transposed, from, to),
                                   threads);
        cpu::pool_columns(pool_columns_args<float>(sizes, spec, slope, y, places, wide, transposed, from, to), threads);
      },
      Free());
  m.def(
      "activation_values_cpu",
      [](bool twice, Index size, int activation, const std::array<Address, 6>& operands, int threads) {
        if (twice) return cpu::activation_values(activation_points<double>(size, activation, operands), threads);
        cpu::activation_values(activation_points<float>(size, activation, operands), threads);
      },
      Free());
  m.def(
      "activation_columns_cpu",
      [](bool twice, const Three& sizes, bool piecewise, double slope, const std::array<Address, 5>& operands,
         int threads) {
        if (twice)
          return cpu::activation_columns(activation_columns_args<double>(sizes, piecewise, slope, operands), threads);
        cpu::activation_columns(activation_columns_args<float>(sizes, piecewise, slope, operands), threads);
      },
      Free());
  m.def(
      "loss_columns_cpu",
      [](bool twice, const Three& sizes, int loss, double scale, const std::array<Address, 4>& operands, int threads) {
        if (twice) return cpu::loss_columns(loss_columns_args<double>(sizes, loss, scale, operands), threads);
        cpu::loss_columns(loss_columns_args<float>(sizes, loss, scale, operands), threads);
      },
      Free());
  m.def("team_bytes", &team_bytes);
  m.def(
      "mlp_sweep_team_cpu",
      [](bool twice, const std::vector<LayerSpec>& layers, const Kinds& kinds, double scale, double l2,
         const std::array<Index, 3>& sizes, const Table& theta, const Table& x, Address targets,
         const std::array<Address, 5>& log, const std::vector<Address>& u, const std::vector<Address>& m,
         const Table& scores, const TeamSizes& team, const Visits& visits, int team_size) {
        if (twice)
          return cpu::team_sweep(
              team_sweep_args(mlp_args<double>(layers, kinds, scale, l2, sizes, theta, x, targets, log), team, u, m,
                              scores, visits),
              team_size);
        cpu::team_sweep(team_sweep_args(mlp_args<float>(layers, kinds, scale, l2, sizes, theta, x, targets, log), team,
                                        u, m, scores, visits),
                        team_size);
      },
      Free());
  m.def(
      "mlp_retrain_team_cpu",
      [](bool twice, const std::vector<LayerSpec>& layers, const Kinds& kinds, double scale, double l2,
         const std::array<Index, 3>& sizes, const Table& theta, const Table& x, Address targets,
         const std::array<Address, 5>& log, const std::vector<Address>& d, const std::vector<Address>& m,
         const Models& models, const TeamSizes& team, int team_size) {
        if (twice)
          return cpu::team_retrain(
              team_retrain_args(
                  retrain_args(mlp_args<double>(layers, kinds, scale, l2, sizes, theta, x, targets, log), d, m, models),
                  team, has_any(m)),
              team_size);
        cpu::team_retrain(
            team_retrain_args(
                retrain_args(mlp_args<float>(layers, kinds, scale, l2, sizes, theta, x, targets, log), d, m, models),
                team, has_any(m)),
            team_size);
      },
      Free());
  m.def("use_blas", &cpu::use_blas, py::arg("allowed"));
  m.def("blas_name", &cpu::blas_name);

  m.attr("version") = DIT_FAST_VERSION;
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif

#ifdef DIT_FAST_CUDA
  namespace cuda = dit_fast::cuda;
  m.attr("cuda_compiled") = true;
  m.attr("cuda_architectures") = DIT_FAST_CUDA_ARCHITECTURES;
  m.attr("cuda_compiler") = "nvcc " DIT_FAST_CUDA_VERSION;
  m.def(
      "grad_dot_cuda",
      [](bool twice, Index K, const PerSample& dots, const std::vector<std::pair<SamplesSpec, DirectionsSpec>>& layers,
         int device, Address stream) {
        if (twice)
          return cuda::grad_dot(grad_dot_args<double>(K, dots, layers), device, reinterpret_cast<void*>(stream));
        cuda::grad_dot(grad_dot_args<float>(K, dots, layers), device, reinterpret_cast<void*>(stream));
      },
      Free());
  m.def(
      "lowrank_update_cuda",
      [](bool twice, Index K, double alpha, const PerSample& coefficients,
         const std::vector<std::pair<SamplesSpec, DirectionsSpec>>& layers, int device, Address stream) {
        if (twice)
          return cuda::lowrank_update(lowrank_update_args<double>(K, alpha, coefficients, layers), device,
                                      reinterpret_cast<void*>(stream));
        cuda::lowrank_update(lowrank_update_args<float>(K, alpha, coefficients, layers), device,
                             reinterpret_cast<void*>(stream));
      },
      Free());
  m.def(
      "update_dot_cuda",
      [](bool twice, Index K, double alpha, const PerSample& coefficients, const PerSample& dots,
         const std::vector<std::tuple<SamplesSpec, SamplesSpec, DirectionsSpec>>& layers, int device, Address stream) {
        if (twice)
          return cuda::update_dot(update_dot_args<double>(K, alpha, coefficients, dots, layers), device,
                                  reinterpret_cast<void*>(stream));
        cuda::update_dot(update_dot_args<float>(K, alpha, coefficients, dots, layers), device,
                         reinterpret_cast<void*>(stream));
      },
      Free());
  m.def(
      "mlp_rows_cuda",
      [](bool twice, int piece, const std::array<Index, 3>& sizes, const std::pair<int, double>& activation,
         const std::pair<int, double>& loss, bool weighted, const std::array<Address, 10>& operands, int device,
         Address stream) {
        if (twice)
          return cuda::mlp_rows(static_cast<dit_fast::Piece>(piece),
                                mlp_rows_args<double>(sizes, activation, loss, weighted, operands), device,
                                reinterpret_cast<void*>(stream));
        cuda::mlp_rows(static_cast<dit_fast::Piece>(piece),
                       mlp_rows_args<float>(sizes, activation, loss, weighted, operands), device,
                       reinterpret_cast<void*>(stream));
      },
      Free());
  m.def(
      "max_pool_cuda",
      [](bool twice, Index num_planes, const PoolSpec& spec, double slope, Address x, Address y, Address places,
         bool wide, int device, Address stream) {
        if (twice)
          return cuda::max_pool(max_pool_args<double>(num_planes, spec, slope, x, y, places, wide), device,
                                reinterpret_cast<void*>(stream));
        cuda::max_pool(max_pool_args<float>(num_planes, spec, slope, x, y, places, wide), device,
                       reinterpret_cast<void*>(stream));
      },
      Free());
  m.def(
      "pool_columns_cuda",
      [](bool twice, const Three& sizes, const PoolSpec& spec, double slope, Address y, Address places, bool wide,
         bool transposed, Address from, Address to, int device, Address stream) {
        if (twice)
          return cuda::pool_columns(
              pool_columns_args<double>(sizes, spec, slope, y, places, wide, transposed, from, to), device,
              reinterpret_cast<void*>(stream));
        cuda::pool_columns(pool_columns_args<float>(sizes, spec, slope, y, places, wide, transposed, from, to), device,
                           reinterpret_cast<void*>(stream));
      },
      Free());
  m.def(
      "activation_values_cuda",
      [](bool twice, Index size, int activation, const std::array<Address, 6>& operands, int device, Address stream) {
        if (twice)
          return cuda::activation_values(activation_points<double>(size, activation, operands), device,
                                         reinterpret_cast<void*>(stream));
        cuda::activation_values(activation_points<float>(size, activation, operands), device,
                                reinterpret_cast<void*>(stream));
      },
      Free());
  m.def(
      "activation_columns_cuda",
      [](bool twice, const Three& sizes, bool piecewise, double slope, const std::array<Address, 5>& operands,
         int device, Address stream) {
        if (twice)
          return cuda::activation_columns(activation_columns_args<double>(sizes, piecewise, slope, operands), device,
                                          reinterpret_cast<void*>(stream));
        cuda::activation_columns(activation_columns_args<float>(sizes, piecewise, slope, operands), device,
                                 reinterpret_cast<void*>(stream));
      },
      Free());
  m.def(
      "loss_columns_cuda",
      [](bool twice, const Three& sizes, int loss, double scale, const std::array<Address, 4>& operands, int device,
         Address stream) {
        if (twice)
          return cuda::loss_columns(loss_columns_args<double>(sizes, loss, scale, operands), device,
                                    reinterpret_cast<void*>(stream));
        cuda::loss_columns(loss_columns_args<float>(sizes, loss, scale, operands), device,
                           reinterpret_cast<void*>(stream));
      },
      Free());
  m.def("device_limits", [](int device) {
    const auto limits = cuda::device_limits(device);
    return std::pair(limits.shared_memory, limits.processors);
  });
  m.def(
      "mlp_sweep_team_cuda",
      [](bool twice, const std::vector<LayerSpec>& layers, const Kinds& kinds, double scale, double l2,
         const std::array<Index, 3>& sizes, const Table& theta, const Table& x, Address targets,
         const std::array<Address, 5>& log, const std::vector<Address>& u, const std::vector<Address>& m,
         const Table& scores, const TeamSizes& team, const Visits& visits, int device, Address stream) {
        if (twice)
          return cuda::team_sweep(
              team_sweep_args(mlp_args<double>(layers, kinds, scale, l2, sizes, theta, x, targets, log), team, u, m,
                              scores, visits),
              device, reinterpret_cast<void*>(stream));
        cuda::team_sweep(team_sweep_args(mlp_args<float>(layers, kinds, scale, l2, sizes, theta, x, targets, log), team,
                                         u, m, scores, visits),
                         device, reinterpret_cast<void*>(stream));
      },
      Free());
  m.def(
      "mlp_retrain_team_cuda",
      [](bool twice, const std::vector<LayerSpec>& layers, const Kinds& kinds, double scale, double l2,
         const std::array<Index, 3>& sizes, const Table& theta, const Table& x, Address targets,
         const std::array<Address, 5>& log, const std::vector<Address>& d, const std::vector<Address>& m,
         const Models& models, const TeamSizes& team, int device, Address stream) {
        if (twice)
          return cuda::team_retrain(
              team_retrain_args(
                  retrain_args(mlp_args<double>(layers, kinds, scale, l2, sizes, theta, x, targets, log), d, m, models),
                  team, has_any(m)),
              device, reinterpret_cast<void*>(stream));
        cuda::team_retrain(
            team_retrain_args(
                retrain_args(mlp_args<float>(layers, kinds, scale, l2, sizes, theta, x, targets, log), d, m, models),
                team, has_any(m)),
            device, reinterpret_cast<void*>(stream));
      },
      Free());
#else
  m.attr("cuda_compiled") = false;
  m.attr("cuda_architectures") = "";
  m.attr("cuda_compiler") = py::none();
#endif
}
