// The part of an adjoint step that all columns share: one batch through the net and back.
#pragma once

#include <cstdint>
#include <vector>

#include "mlp_sweep.h"

namespace dit_fast::cpu {

// One block of memory handed out in pieces that begin on a cache line.
template <class Real>
class Arena {
 public:
  explicit Arena(Index size = 0) : memory_(static_cast<std::size_t>(size + 2 * line)) {
    const auto past = reinterpret_cast<std::uintptr_t>(memory_.data()) % 64 / sizeof(Real);
    used_ = past ? line - static_cast<Index>(past) : 0;
  }
  Real* take(Index size) {
    Real* piece = memory_.data() + used_;
    used_ += rounded(size);
    return piece;
  }
  static Index rounded(Index size) { return (size + line - 1) / line * line; }

 private:
  static constexpr Index line = 64 / sizeof(Real);
  std::vector<Real> memory_;
  Index used_ = 0;
};

template <class Real>
struct Primal {
  // δˡ = a_b ∂ℓ_b/∂zˡ and everything else that contains a gradient carries the coefficient a_b.
  struct Layer {
    const Real *weight, *bias;  // Wˡ [O,I], bˡ [O] in this step's row of theta
    Real* input;                // hˡ⁻¹ [B,I]; with gram the first layer's is the samples' rows of gram [B,M]
    Real* first;                // φ'(zˡ) [B,O]
    Real* second;               // φ''(zˡ), then the curve a_b ∂ℓ_b/∂hˡ φ''(zˡ) [B,O]
    Real* delta;                // δˡ [B,O]
  };

  const MlpSweep<Real>& args;
  std::vector<Layer> layers;
  Real* output;         // hᴸ [B,O]
  Real* probabilities;  // of the loss [B,O]
  Real* top;            // ∂ℓ_b/∂zᴸ, without a_b [B,O]
  Real*
      top_curve;  // the diagonal a_b ∂²ℓ_b/∂zᴸ², of the Gauss–Newton part alone where asked [B,O]; not of cross_entropy
  Index B = 0;
  const Index* rows = nullptr;  // of the data [B]
  const double* coefficients = nullptr;
  double coefficient_sum = 0;

  Primal(const MlpSweep<Real>& args, Index max_batch);

  // z¹ of the batch [B,O].
  void first_products(Real* z, int threads) const;

  // The batch of step t of the call; weighted false: a_b = 1 in all that is left here.
  void run(Index t, bool weighted, bool backward, int threads);

 private:
  Arena<Real> arena_;

  static Index size(const MlpSweep<Real>& args, Index max_batch);
  void gather();
  void forward(int threads);
  void differentiate_loss(bool weighted);
};

}  // namespace dit_fast::cpu
