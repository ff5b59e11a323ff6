// The update of a tile of one column's U and v, shared by lowrank_update and update_dot.
#pragma once

#include "cuda/launch.h"
#include "cuda/tile.h"

namespace dit_fast::cuda {

// Σ_r c[k,b,r] δ[b,r,s,o] for the 16 bytes of outputs from o, in double and rounded once.
template <class Real>
__device__ __forceinline__ Vector<Real> weighted_vector(const Samples<Real>& samples, const double* c, Index b, Index s,
                                                        Index o, Index O) {
  constexpr int size = Vector<Real>::size;
  double sums[size] = {};
  for (Index r = 0; r < samples.R; ++r) {
    const Vector<Real> delta = load_vector(samples.delta.at(b, r, s), o, O);
#pragma unroll
    for (int j = 0; j < size; ++j) sums[j] += weighted(c[r], delta.at[j]);
  }
  Vector<Real> found;
#pragma unroll
  for (int j = 0; j < size; ++j) found.at[j] = static_cast<Real>(sums[j]);
  return found;
}

// sum[p][q] = Σ_{b,s} a[b,s,i] W[b,s,o] for inputs i from i0 (rows of the tile) and outputs o from o0 (columns).
template <class Real, int N>
__device__ void weighted_sums(const Samples<Real>& samples, const Rows<const double>& coefficients,
                              const Directions<Real>& directions, Index k, Index o0, Index i0, Panel<Real, N>& a_panel,
                              Real (*w_panel)[side * N + padding], Real (&sum)[N][N]) {
  const Index num_rows = samples.B * samples.S;
  const int y = threadIdx.x / side, x = threadIdx.x % side;
  AlongRows<Real, N> a, w;
  const auto load = [&](Index m0) {
#pragma unroll
    for (int pass = 0; pass < AlongRows<Real, N>::count; ++pass) {
      const Index m = m0 + a.row(pass);
      a.kept[pass] = w.kept[pass] = {};
      if (m >= num_rows) continue;
      const Index b = m / samples.S, s = m - b * samples.S;
      a.kept[pass] = load_vector(samples.activations.at(b, s), i0 + a.column(), directions.I);
      w.kept[pass] = weighted_vector(samples, coefficients.at(k, b), b, s, o0 + w.column(), directions.O);
    }
  };
  if (num_rows > 0) load(0);
  for (Index m0 = 0; m0 < num_rows; m0 += depth) {
    a.store(a_panel);
    w.store(*reinterpret_cast<Panel<Real, N>*>(w_panel));
    __syncthreads();  // the panels are complete before any thread reads them
    if (m0 + depth < num_rows) load(m0 + depth);
    multiply_panels<Real, N>(a_panel, w_panel, y, x, sum);
    __syncthreads();  // all have read before the next ones overwrite them
  }
}

// U = alpha U + sum, and sum becomes the new U; 0 beyond its edges.
template <class Real, int N>
__device__ void write_weight(double alpha, const Directions<Real>& directions, Index k, Index o0, Index i0,
                             Real (&sum)[N][N]) {
  constexpr int size = Vector<Real>::size;
  const int y = threadIdx.x / side, x = threadIdx.x % side;
  const Real scale = static_cast<Real>(alpha);
#pragma unroll
  for (int q = 0; q < N; ++q) {
    const Index o = o0 + place<Real>(x, q);
    if (o >= directions.O) continue;
    Real* row = directions.weight.at(k, o);
    // a thread's rows of the tile come in vectors of neighbouring inputs
#pragma unroll
    for (int p = 0; p < N; p += size) {
      const Index i = i0 + place<Real>(y, p);
      if (i >= directions.I) continue;
      Vector<Real> value = {};
      if (alpha != 0) value = load_vector<Real>(row, i, directions.I);
#pragma unroll
      for (int j = 0; j < size; ++j) sum[p + j][q] = value.at[j] = scale * value.at[j] + sum[p + j][q];
      if (i + size <= directions.I && reinterpret_cast<std::uintptr_t>(row + i) % 16 == 0) {
        *reinterpret_cast<Vector<Real>*>(row + i) = value;
      } else {
#pragma unroll
        for (int j = 0; j < size; ++j)
          if (i + j < directions.I) row[i + j] = value.at[j];
      }
    }
  }
}

// v = alpha v + Σ_{b,s,r} c δ for the outputs from o0, in double; `parts` is shared memory.
template <class Real, int N>
__device__ void update_bias(double alpha, const Samples<Real>& samples, const Rows<const double>& coefficients,
                            const Directions<Real>& directions, Index k, Index o0, double (&parts)[num_threads]) {
  constexpr int tile = side * N;
  const Index o = o0 + threadIdx.x % tile;
  double sum = 0;
  // neighbouring threads have neighbouring outputs; 256 / tile of them share out the rows (b, s) of one
  if (o < directions.O)
    for (Index m = threadIdx.x / tile; m < samples.B * samples.S; m += num_threads / tile) {
      const Index b = m / samples.S, s = m - b * samples.S;
      const double* c = coefficients.at(k, b);
      for (Index r = 0; r < samples.R; ++r) sum += weighted(c[r], samples.delta.at(b, r, s)[o]);
    }
  parts[threadIdx.x] = sum;
  __syncthreads();  // all parts are there
  if (threadIdx.x < tile && o < directions.O) {
    for (int t = threadIdx.x + tile; t < num_threads; t += tile) sum += parts[t];
    Real& v = directions.bias.at(0, k)[o];
    v = scale_and_add(alpha, v, sum);
  }
  __syncthreads();  // v is written before the block reads it, and the parts are read before they are written again
}

// Tiles of one layer's U, inputs fastest; at least one over the inputs, which takes care of the bias.
template <class Real, int N>
__host__ __device__ Index num_weight_tiles(const Directions<Real>& directions) {
  const Index over_inputs = directions.I > 0 ? ceil_div(directions.I, side * N) : 1;
  return directions.K * ceil_div(directions.O, side * N) * over_inputs;
}

}  // namespace dit_fast::cuda
