#include "mlp_sweep.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/mlp_columns.h"
#include "cpu/mlp_primal.h"

namespace dit_fast::cpu {
namespace {

// Columns travel through a step in groups whose tangents stay in the second-level cache.
constexpr Index group_bytes = 1 << 20;

// Below this much work a parallel region costs more than it saves, much more where the cores are busy.
constexpr double parallel_flops = 1e8;

// Bytes of a row that the products take as a whole.
constexpr Index line_bytes = 32;

// Columns that take part in step t.
template <class Real>
Index num_active(const MlpSweep<Real>& args, Index t) {
  if (!args.visits.joins) return args.K;
  return std::partition_point(args.visits.joins, args.visits.joins + args.K, [t](Index join) { return join > t; }) -
         args.visits.joins;
}

// As many columns as fit the lines that these take of the first layer; those added are zero.
template <class Real>
Index padded(const MlpSweep<Real>& args, Index columns) {
  const Index O = args.layers.front().O, line = line_bytes / static_cast<Index>(sizeof(Real));
  if (line % O || columns * O == 1) return columns;
  return std::min((columns * O + line - 1) / line * line / O, args.C);
}

// 6F per column and step for the columns before k.
template <class Real>
std::vector<double> work(const MlpSweep<Real>& args) {
  double weights = 0;
  for (const MlpLayer& layer : args.layers) weights += static_cast<double>(layer.O * layer.I);
  std::vector<double> sums(1, 0.0);
  for (Index k = 0; k < args.K; ++k) {
    const Index steps = args.visits.joins ? std::clamp<Index>(args.visits.joins[k], 0, args.num_steps) : args.num_steps;
    sums.push_back(sums.back() + 12 * static_cast<double>(args.offsets[steps] - args.offsets[0]) * weights);
  }
  return sums;
}

// A share of the columns and the memory to take it through all steps.
template <class Real>
struct Share {
  const MlpSweep<Real>& args;
  Index first, last, group;
  Primal<Real> primal;
  Columns<Real> columns;

  Share(const MlpSweep<Real>& args, Index first, Index last, Index max_batch)
      : args(args),
        first(first),
        last(last),
        group(group_size(args, last - first, max_batch)),
        primal(args, max_batch),
        columns(args, max_batch, group) {}

  static Index group_size(const MlpSweep<Real>& args, Index num_columns, Index max_batch) {
    const Index size = Columns<Real>::size_of_column(args, max_batch) * static_cast<Index>(sizeof(Real));
    return std::clamp<Index>(group_bytes / std::max<Index>(size, 1), 1, num_columns);
  }

  // The step that was not finite, or −1.
  Index run(int threads) {
    const bool weighted = args.curvature != Curvature::none, backward = args.curvature != Curvature::ggn;
    for (Index t = args.num_steps; t-- > 0;) {
      visit(t + 1);
      const Index end = std::min(last, padded(args, num_active(args, t)));
      if (end <= first) continue;
      primal.run(t, weighted, backward, threads);
      for (Index k = first; k < end; k += group)
        if (!columns.step(primal, t, k, std::min(group, end - k), threads)) return t;
    }
    return -1;
  }

  // The steps from t on are done.
  void visit(Index t) {
    const Visits<Real>& visits = args.visits;
    for (Index k = first; visits.joins && k < std::min(last, args.K); ++k) {
      if (visits.joins[k] == t) columns.join(k, visits.joining[k]);
      if (visits.leaves[k] == t) columns.leave(k, visits.leaving[k]);
    }
  }
};

}  // namespace

template <class Real>
Index mlp_sweep(const MlpSweep<Real>& args, int threads) {
  if (args.K == 0 || args.num_steps == 0) return -1;
  Index max_batch = 0;
  for (Index t = 0; t < args.num_steps; ++t) max_batch = std::max(max_batch, args.offsets[t + 1] - args.offsets[t]);
  // columns are independent: each thread takes a share of them through all steps and repeats the shared pass
  const std::vector<double> flops = work(args);
  if (flops.back() < parallel_flops) threads = 1;
  const Index num_shares = std::min<Index>(threads, args.K);
  std::vector<std::unique_ptr<Share<Real>>> shares;
  for (Index i = 0, first = 0; i < num_shares; ++i) {
    const double until = flops.back() * static_cast<double>(i + 1) / static_cast<double>(num_shares);
    const Index last = i + 1 == num_shares ? padded(args, args.K)
                                           : std::lower_bound(flops.begin(), flops.end(), until) - flops.begin();
    if (last > first) shares.push_back(std::make_unique<Share<Real>>(args, first, last, max_batch));
    first = std::max(first, last);
  }
  if (shares.size() == 1) return shares[0]->run(threads);
  std::vector<Index> stopped(shares.size(), -1);
#pragma omp parallel for num_threads(static_cast<int>(shares.size())) schedule(static, 1)
  for (std::size_t i = 0; i < shares.size(); ++i) {
    const SerialBlas serial;
    stopped[i] = shares[i]->run(1);
  }
  return *std::max_element(stopped.begin(), stopped.end());
}

template Index mlp_sweep(const MlpSweep<float>&, int);
template Index mlp_sweep(const MlpSweep<double>&, int);

}  // namespace dit_fast::cpu
