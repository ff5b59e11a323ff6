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

// Output gradients δ[b,r,s,·]: sample b, row r of its R, position s; elements are contiguous.
template <class T>
struct Deltas {
  T* data;
  Index sample_stride, row_stride, position_stride;

  DIT_FAST_HOST_DEVICE T* at(Index b, Index r, Index s) const {
    return data + b * sample_stride + r * row_stride + s * position_stride;
  }
};

// B samples of one layer, each with R rows J_br = Σ_s δ[b,r,s] ⊗ a[b,s] (bias: Σ_s δ[b,r,s]) over S positions.
template <class Real>
struct Samples {
  Index B, R, S;
  Deltas<const Real> delta;
  Rows<const Real> activations;  // rows (b, s)
};

// K directions of one layer with O output and I input features.
template <class T>
struct Directions {
  Index K, O, I;
  Rows<T> weight;  // rows (k, o)
  Rows<T> bias;    // rows k: inner_stride is the stride of k, num_inner is K; data is null for a layer without bias
};

// Whether grad_dot has anything to add up.
template <class Real, class T>
bool has_terms(const Samples<Real>& samples, const Directions<T>& directions) {
  return directions.K * directions.O * samples.B * samples.R * samples.S > 0 &&
         (directions.I > 0 || directions.bias.data);
}

// One position's and output's share of a dot product: δ·z with z = Σ_i U a + v, in double whatever the dtype.
template <class Real>
DIT_FAST_HOST_DEVICE double dot_term(Real delta, Real z) {
  return static_cast<double>(delta) * static_cast<double>(z);
}

// c·δ, in double; a sum of them over r is rounded once.
template <class Real>
DIT_FAST_HOST_DEVICE double weighted(double coefficient, Real delta) {
  return coefficient * static_cast<double>(delta);
}

// alpha·v + sum; alpha of 0 overwrites, whatever v held.
template <class Real>
DIT_FAST_HOST_DEVICE Real scale_and_add(double alpha, Real value, double sum) {
  return static_cast<Real>(alpha == 0 ? sum : alpha * static_cast<double>(value) + sum);
}

}  // namespace dit_fast
