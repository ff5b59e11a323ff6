// mlp_sweep: n steps of the adjoint sweep, last to first, for K columns of a feed-forward net.
//
// The net: h⁰ = x, zˡ = hˡ⁻¹ Wˡᵀ + bˡ, hˡ = φˡ(zˡ), ℓ_b = loss(hᴸ_b) + ½ l2 ‖θ‖². For each step t, every column k:
//
//   c from (u, m)               the optimizer's adjoint rule, per parameter (Setting): r = −η u;
//                               without momentum c = r, else b̂ = m + r (Nesterov m + μ r),
//                               c = (1 − τ) b̂ (Nesterov + r; first step b̂), m = μ b̂
//   dots[k,b] = ⟨c_k, ∇ℓ_b⟩     in double: the tangent of ℓ_b along c_k (dual numbers)
//   scores[k, ids_b] −= a_b dots[k,b]
//   u = u + wd c + H c          H = Σ_b a_b ∇²ℓ_b (exact) or its Gauss–Newton part (ggn), both with
//                               l2·Σ_b a_b·I; or 0 (none)
//
// u, m     one block [K,O,I] per weight, [K,O] per bias, contiguous; both are overwritten. m: null pointers (or an
//          empty list) where no step has momentum.
// scores   [K, N] double, accumulated into; an id that occurs twice in a batch counts twice.
// theta    [n, P] rows of flat parameters, θ before each step. x [M, I], targets [M, O] or classes [M]: the data, of
//          which step t takes rows[offsets[t] … offsets[t+1]).
// visits   columns that join and leave on the way. gram: the samples' inner products x xᵀ [M, M]; the first weight's
//          block is then [K,O,M] and holds X u (V below) in place of u, with l2 of 0: a step reads X u and adds to u
//          combinations of samples, so that u itself is never needed. Cheaper where M is below 2 I.
// Returns the step (0 … n − 1) whose dots hold NaN or infinity, where it stops; −1 where all went well.
// Empty: K or n of 0 does nothing; so does a step without samples, but for the optimizer's own part.
// Python face dit_fast.ops.mlp_sweep, plain-torch twin dit_fast.ops_torch.mlp_sweep.
#pragma once

#include <cstddef>
#include <vector>

#include "activation.h"
#include "layer.h"
#include "loss.h"

namespace dit_fast {

enum class Curvature { exact, ggn, none };

// weight, bias: positions in a row of theta; bias −1 for a layer without.
struct MlpLayer {
  Index O, I, weight, bias;
  Activation activation;
  double slope;
};

// Of one parameter in one step; nesterov and first are 0 or 1. first: this step made the momentum buffer, so that torch
// took it without dampening.
struct Setting {
  double lr, weight_decay, momentum, dampening, nesterov, first;
};

// Column k takes part in the steps t < joins[k]. Once the steps from joins[k] on are done it becomes row joining[k] of
// `gradients`; row leaving[k] is subtracted from it once those from leaves[k] on are (0 or less: never). Columns that
// have not joined must be zero: some are taken along where they fill a line.
template <class Real>
struct Visits {
  const Index *joins, *leaves, *joining, *leaving;  // [K], joins falling; null: all K columns in all steps
  const Real* gradients;                            // rows [n, P] laid out as theta
  Index stride;
  const Real* projected;  // with gram: X times the rows' first weight, [M, n, O]
  Index num_rows;         // n
};

template <class Real>
struct MlpSweep {
  std::vector<MlpLayer> layers;
  Loss loss;
  double loss_scale;
  Curvature curvature;
  double l2;
  Index K, C, num_steps;
  const Real* theta;
  Index theta_stride;
  const Real* x;
  Index x_stride;
  const Real* targets;   // for bce_logits and squared_error
  const Index* classes;  // for cross_entropy
  const Index* rows;
  const Index* ids;
  const double* coefficients;
  const Index* offsets;     // [n+1]
  const Setting* settings;  // [n, 2L]: weight and bias of each layer
  std::vector<Real*> u, m;  // [2L], null for an absent bias
  double* scores;
  Index scores_stride;
  Visits<Real> visits;
  const Real* gram;  // null: none
  Index M;           // with gram: its rows

  // Rows of the first weight's block [rows, C, O].
  Index first_rows() const { return gram ? M : layers.front().I; }

  // Elements that a column has of a parameter.
  Index parameter_size(std::size_t p) const {
    const MlpLayer& layer = layers[p / 2];
    return p % 2 ? layer.O : layer.O * (p == 0 ? first_rows() : layer.I);
  }
};

namespace cpu {
template <class Real>
Index mlp_sweep(const MlpSweep<Real>& args, int threads);
}

}  // namespace dit_fast
