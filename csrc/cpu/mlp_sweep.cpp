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

// 6F per column and step.
template <class Real>
double work(const MlpSweep<Real>& args) {
  double weights = 0;
  for (const MlpLayer& layer : args.layers) weights += static_cast<double>(layer.O * layer.I);
  return 12 * static_cast<double>(args.offsets[args.num_steps] - args.offsets[0]) * weights *
         static_cast<double>(args.K);
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
      primal.run(t, weighted, backward, threads);
      for (Index k = first; k < last; k += group)
        if (!columns.step(primal, t, k, std::min(group, last - k), threads)) return t;
    }
    return -1;
  }
};

}  // namespace

template <class Real>
Index mlp_sweep(const MlpSweep<Real>& args, int threads) {
  if (args.K == 0 || args.num_steps == 0) return -1;
  Index max_batch = 0;
  for (Index t = 0; t < args.num_steps; ++t) max_batch = std::max(max_batch, args.offsets[t + 1] - args.offsets[t]);
  // columns are independent: each thread takes a share of them through all steps and repeats the shared pass
  if (work(args) < parallel_flops) threads = 1;
  const Index num_shares = std::min<Index>(threads, args.K);
  std::vector<std::unique_ptr<Share<Real>>> shares;
  for (Index i = 0; i < num_shares; ++i)
    shares.push_back(
        std::make_unique<Share<Real>>(args, args.K * i / num_shares, args.K * (i + 1) / num_shares, max_batch));
  if (num_shares == 1) return shares[0]->run(threads);
  std::vector<Index> stopped(shares.size(), -1);
#pragma omp parallel for num_threads(static_cast<int>(num_shares)) schedule(static, 1)
  for (std::size_t i = 0; i < shares.size(); ++i) {
    const SerialBlas serial;
    stopped[i] = shares[i]->run(1);
  }
  return *std::max_element(stopped.begin(), stopped.end());
}

template Index mlp_sweep(const MlpSweep<float>&, int);
template Index mlp_sweep(const MlpSweep<double>&, int);

}  // namespace dit_fast::cpu
