// One step of retraining for a group of counterfactual models, on top of the logged model's own pass.
#pragma once

#include <vector>

#include "cpu/mlp_primal.h"
#include "mlp_retrain.h"

namespace dit_fast::cpu {

template <class Real>
class Models {
 public:
  // For at most `max_models` models at a time.
  Models(const MlpRetrain<Real>& args, Index max_batch, Index max_models);

  // What the models of a step have in common, from the logged model's pass: once before their groups. gradients: for
  // `advance`, which needs the pass backward.
  void share(const Primal<Real>& primal, bool gradients, int threads);

  // d and m of the models k0 … k0 + count through step t.
  void advance(const Primal<Real>& primal, Index t, Index k0, Index count, int threads);

  // changes[k] += Σ_b a_b (ℓ_b(θ + d_k) − ℓ_b(θ)) for the same models.
  void add_loss_changes(const Primal<Real>& primal, Index t, Index k0, Index count, double* changes, int threads);

  // Elements that one model needs for a batch of this size.
  static Index size_of_model(const MlpRetrain<Real>& args, Index max_batch);

 private:
  struct Lost {
    Index model;          // within the group
    double coefficients;  // Σ a_b of the samples it lacks in this batch
  };
  // The elements of d and m that belong to a parameter of the group: `rows` rows of `row` elements, `stride` apart.
  struct Part {
    Real *d, *m;
    Index rows, row, stride;
  };

  void begin(Index k0, Index count);
  void forward_first(const Primal<Real>& primal, int threads);
  void forward(const Primal<Real>& primal, std::size_t l, int threads);
  void differentiate_loss(const Primal<Real>& primal, Index t);
  void remove_samples(const Primal<Real>& primal, Index t);
  void pull_back(const Primal<Real>& primal, std::size_t l, int threads);
  void update_first(const Primal<Real>& primal, const Setting& setting, int threads);
  void update_combinations(const Primal<Real>& primal, const Setting& setting);
  void update_weight(const Primal<Real>& primal, std::size_t l, const Setting& setting, int threads);
  void update_bias(const Primal<Real>& primal, std::size_t l, const Setting& setting);
  Part part(std::size_t parameter) const;
  void apply_rule(const Primal<Real>& primal, std::size_t parameter, const Setting& setting);
  const Real* target(Index t, Index b) const;
  Index label(Index t, Index b) const;

  const MlpRetrain<Real>& args_;
  const MlpSweep<Real>& run_;
  Arena<Real> arena_;
  std::vector<Real*> h_, first_;  // hˡ and φ'(zˡ) [B,K,O]
  std::vector<Real*> weights_;    // Wˡ + d [K,O,I], of all layers but the first
  std::vector<Real*> shared_;     // −Σ_b a_b ∂ℓ_b/∂Wˡ of the logged model [O,I], of the same
  Real *d_, *below_;              // δ of the layer at work and of the one below it [B,K,O]
  Real* gradient_;                // of one parameter of the group
  Real* first_z_;                 // z¹ of the logged model [B,O]
  Real* scaled_;                  // −η x [B,I]
  Real* row_;                     // bias of each model [K,O]
  std::vector<Lost> lost_;
  Index k0_ = 0, K_ = 0;
};

}  // namespace dit_fast::cpu
