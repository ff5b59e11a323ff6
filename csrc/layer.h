// The data of one linear layer as every op sees it, and the arithmetic that CPU and GPU share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DIT_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DIT_FAST_HOST_DEVICE inline
#endif

namespace dit_fast {

using Index = std::int64_t;

// K adjoint columns, B samples, S positions in a sequence, O output and I input features.
struct Sizes {
  Index K, B, S, O, I;
};

// A matrix whose rows are numbered by a pair (outer, inner): row outer·num_inner + inner. Samples and positions (b, s)
// of activations and output gradients, columns and outputs (k, o) of a weight. Strides count elements; within a row
// elements are contiguous.
template <class T>
struct Rows {
  T* data;
  Index outer_stride, inner_stride, num_inner;

  DIT_FAST_HOST_DEVICE T* at(Index outer, Index inner) const {
    return data + outer * outer_stride + inner * inner_stride;
  }
  DIT_FAST_HOST_DEVICE T* row(Index number) const { return at(number / num_inner, number % num_inner); }
};

// One sample's share of a dot product, per position and output: δ·z with z = Σ_i U a + v, in double whatever the dtype.
template <class Real>
DIT_FAST_HOST_DEVICE double dot_term(Real delta, Real z) {
  return static_cast<double>(delta) * static_cast<double>(z);
}

// The coefficient is applied in double and rounded once: c·δ.
template <class Real>
DIT_FAST_HOST_DEVICE Real weighted_delta(double coefficient, Real delta) {
  return static_cast<Real>(coefficient * static_cast<double>(delta));
}

}  // namespace dit_fast
