// mlp_retrain: n steps, first to last, of K counterfactual models of a feed-forward net, each without its own samples.
//
// Carried is d_j = θ_{−j} − θ[t]. For each step t, every model j that has joined, with w_jb = 0 where j lacks sample
// ids_b and else 1:
//
//   g_j = Σ_b w_jb a_b ∇ℓ_b(θ + d_j) − Σ_b a_b ∇ℓ_b(θ)      ℓ_b includes ½ l2 ‖θ‖²
//   g̃ = g_j + wd d_j
//   m_j = μ m_j + (1 − τ) g̃  (the first time g̃)            without momentum g̃ takes its place
//   d_j −= η m_j              (Nesterov η (g̃ + μ m_j))
//
// run      net, loss, l2, log and data as in mlp_sweep.h; u holds d and m the difference of the momentum buffers, laid
//          out as there: [K,O,I] of the first weight in memory [I,C,O], all else contiguous. Both are overwritten.
//          curvature, scores and visits are not used. With gram, the samples' inner products, and l2 of 0 the first
//          weight's block is [K,O,M] and holds A, d = A x, in place of d: a step adds combinations of samples to d.
// joins    [K] rising: model j is left alone in the steps t < joins[j], where it cannot differ.
// removed  the models removed_models[removed_offsets[i] … removed_offsets[i+1]) lack sample i, each named once.
// Empty: K or n of 0 does nothing; a step without samples is the optimizer's own part.
//
// mlp_loss_changes: changes[j] += Σ_t Σ_b a_b (ℓ_b(θ[t] + d_j) − ℓ_b(θ[t])) without the l2 part, all in Real; joins,
// removed and settings are not used.
// Python faces dit_fast.ops.MlpRetrain and mlp_loss_changes, plain-torch twins of these names in dit_fast.ops_torch.
#pragma once

#include "mlp_sweep.h"

namespace dit_fast {

template <class Real>
struct MlpRetrain {
  MlpSweep<Real> run;
  const Index* joins;
  const Index* removed_offsets;
  const Index* removed_models;
};

namespace cpu {

template <class Real>
void mlp_retrain(const MlpRetrain<Real>& args, int threads);

template <class Real>
void mlp_loss_changes(const MlpRetrain<Real>& args, double* changes, int threads);

}  // namespace cpu

}  // namespace dit_fast
