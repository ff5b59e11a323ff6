// One adjoint step for a group of columns, in dual numbers on top of the shared pass.
#pragma once

#include <vector>

#include "cpu/mlp_primal.h"

namespace dit_fast::cpu {

template <class Real>
class Columns {
 public:
  // For at most `max_columns` columns at a time.
  Columns(const MlpSweep<Real>& args, Index max_batch, Index max_columns);

  // Step t for the columns k0 … k0 + count: scores and blocks. Whether all dots were finite.
  bool step(const Primal<Real>& primal, Index t, Index k0, Index count, int threads);

  // Column k becomes the row `row` of the visits' gradients, or that is subtracted from it.
  void join(Index k, Index row);
  void leave(Index k, Index row);

  // Elements that one column needs for a batch of this size.
  static Index size_of_column(const MlpSweep<Real>& args, Index max_batch);

 private:
  // c = scale · data for a parameter of the columns at work; u is multiplied by `keep` when H c is added to it. Both
  // lie in `rows` rows of `row` elements; of the strides only the first layer's weight makes use.
  struct Direction {
    const Real* data;
    Real scale, keep;
    Real* u;
    Index rows, row, data_stride, u_stride;
  };

  template <class Change>
  void visit(Index k, Index row, Change change);
  void first_products(const Primal<Real>& primal, int threads);
  Direction direction(std::size_t parameter, const Setting& setting, double ridge);
  void start_dots(const Primal<Real>& primal);
  void forward(const Primal<Real>& primal, int threads);
  void first_order_dots(const Primal<Real>& primal, int threads);
  bool add_scores(const Primal<Real>& primal, Index t);
  void differentiate_loss(const Primal<Real>& primal);
  void backward(const Primal<Real>& primal, int threads);
  void pull_back(const Primal<Real>& primal, std::size_t l, int threads);
  void update(const Primal<Real>& primal, std::size_t l, int threads);

  const MlpSweep<Real>& args_;
  Arena<Real> arena_;
  std::vector<Real*> z_, h_;  // żˡ, ḣˡ [B,K,O]; the same memory where φ is piecewise linear
  std::vector<Real*> c_;      // cotangents of the parameters with momentum
  Real *d_, *below_;          // δ̇ of the layer at work and of the one below it [B,K,O]
  Real* scaled_;              // a shared row block times a scalar
  Real* turned_;              // [O,K,I] of a small layer
  std::vector<double> dots_;  // [B,K]
  std::vector<double> sums_;  // [K,O] of the first layer
  std::vector<Direction> directions_;
  Index k0_ = 0, K_ = 0;
};

}  // namespace dit_fast::cpu
