#include "mlp_retrain.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/mlp_models.h"
#include "cpu/mlp_primal.h"

namespace dit_fast::cpu {
namespace {

// Models travel through a step in groups whose activations stay in the second-level cache.
constexpr Index group_bytes = 1 << 20;

// Below this much work a parallel region costs more than it saves, much more where the cores are busy.
constexpr double parallel_flops = 1e8;

// A share of the models and the memory to take it through all steps.
template <class Real>
struct Share {
  Index first, last, group;
  Primal<Real> primal;
  Models<Real> models;

  Share(const MlpRetrain<Real>& args, Index first, Index last, Index max_batch)
      : first(first),
        last(last),
        group(group_size(args, last - first, max_batch)),
        primal(args.run, max_batch),
        models(args, max_batch, group) {}

  static Index group_size(const MlpRetrain<Real>& args, Index num_models, Index max_batch) {
    const Index size = Models<Real>::size_of_model(args, max_batch) * static_cast<Index>(sizeof(Real));
    return std::clamp<Index>(group_bytes / std::max<Index>(size, 1), 1, num_models);
  }

  // work(k0, count) for each group of the models before `end`.
  template <class Work>
  void for_each_group(Index end, Work work) {
    for (Index k = first; k < std::min(last, end); k += group) work(k, std::min({group, last - k, end - k}));
  }
};

// work(share, threads) for shares of the models, which are independent: each thread takes its own through all steps and
// repeats the logged model's pass.
template <class Real, class Work>
void share_models(const MlpRetrain<Real>& args, int threads, Work work) {
  const auto& run = args.run;
  if (run.K == 0 || run.num_steps == 0) return;
  Index max_batch = 0;
  for (Index t = 0; t < run.num_steps; ++t) max_batch = std::max(max_batch, run.offsets[t + 1] - run.offsets[t]);
  double weights = 0;
  for (const MlpLayer& layer : run.layers) weights += static_cast<double>(layer.O * layer.I);
  const double samples = static_cast<double>(run.offsets[run.num_steps] - run.offsets[0]);
  if (6 * samples * weights * static_cast<double>(run.K) < parallel_flops) threads = 1;
  const Index num_shares = std::min<Index>(threads, run.K);
  std::vector<std::unique_ptr<Share<Real>>> shares;
  for (Index i = 0; i < num_shares; ++i)
    shares.push_back(
        std::make_unique<Share<Real>>(args, run.K * i / num_shares, run.K * (i + 1) / num_shares, max_batch));
  if (num_shares == 1) return work(*shares[0], threads);
#pragma omp parallel for num_threads(static_cast<int>(num_shares)) schedule(static, 1)
  for (std::size_t i = 0; i < shares.size(); ++i) {
    const SerialBlas serial;
    work(*shares[i], 1);
  }
}

}  // namespace

template <class Real>
void mlp_retrain(const MlpRetrain<Real>& args, int threads) {
  share_models(args, threads, [&](Share<Real>& share, int own_threads) {
    for (Index t = 0; t < args.run.num_steps; ++t) {
      const Index joined = std::upper_bound(args.joins, args.joins + args.run.K, t) - args.joins;
      if (joined <= share.first) continue;
      share.primal.run(t, true, true, own_threads);
      share.models.share(share.primal, true, own_threads);
      share.for_each_group(joined,
                           [&](Index k, Index count) { share.models.advance(share.primal, t, k, count, own_threads); });
    }
  });
}

template <class Real>
void mlp_loss_changes(const MlpRetrain<Real>& args, double* changes, int threads) {
  share_models(args, threads, [&](Share<Real>& share, int own_threads) {
    for (Index t = 0; t < args.run.num_steps; ++t) {
      share.primal.run(t, true, false, own_threads);
      share.models.share(share.primal, false, own_threads);
      share.for_each_group(args.run.K, [&](Index k, Index count) {
        share.models.add_loss_changes(share.primal, t, k, count, changes, own_threads);
      });
    }
  });
}

template void mlp_retrain(const MlpRetrain<float>&, int);
template void mlp_retrain(const MlpRetrain<double>&, int);
template void mlp_loss_changes(const MlpRetrain<float>&, double*, int);
template void mlp_loss_changes(const MlpRetrain<double>&, double*, int);

}  // namespace dit_fast::cpu
