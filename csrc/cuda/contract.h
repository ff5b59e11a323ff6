// The way from a tile of z = U a + v to the dots, shared by grad_dot and update_dot.
#pragma once

#include "cuda/tile.h"

namespace dit_fast::cuda {

// dots[k,b,r] += Σ δ z over the tile's rows (b, s) from m0 and outputs from o0. Adds v to z first where `bias` is not
// null.
template <class Real, int N>
__device__ void contract(const Rows<double>& dots, const Samples<Real>& samples, Index m0, Index k, Index o0, Index O,
                         const Real* bias, Real (&z)[N][N], double (&row_sums)[side * N]) {
  constexpr int tile = side * N;
  const Index S = samples.S, num_rows = samples.B * S;
  const int y = threadIdx.x / side, x = threadIdx.x % side;
  if (bias) {
#pragma unroll
    for (int q = 0; q < N; ++q) {
      const Index o = o0 + place<Real>(x, q);
      const Real v = o < O ? bias[o] : Real(0);
#pragma unroll
      for (int p = 0; p < N; ++p) z[p][q] += v;
    }
  }
  for (Index r = 0; r < samples.R; ++r) {
#pragma unroll
    for (int p = 0; p < N; ++p) {
      const int row = place<Real>(y, p);
      const Index m = m0 + row;
      double sum = 0;
      if (m < num_rows) {
        const Index b = m / S;
        const Real* delta = samples.delta.at(b, r, m - b * S);
#pragma unroll
        for (int q = 0; q < N; q += Vector<Real>::size) {
          const Vector<Real> d = load_vector(delta, o0 + place<Real>(x, q), O);
#pragma unroll
          for (int j = 0; j < Vector<Real>::size; ++j)
            // z of an output beyond the edge belongs to none
            if (o0 + place<Real>(x, q + j) < O) sum += dot_term(d.at[j], z[p][q + j]);
        }
      }
      // the 16 lanes of one row are half a warp
      for (int offset = side / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset, side);
      if (x == 0) row_sums[row] = sum;
    }
    __syncthreads();  // row_sums are complete
    // the first row of a sample within the tile adds up the sample's rows: one atomic per sample and tile
    const Index m = m0 + threadIdx.x;
    if (threadIdx.x < tile && m < num_rows && (threadIdx.x == 0 || m % S == 0)) {
      const Index last = min(min(m0 + tile, num_rows), (m / S + 1) * S);
      double sum = 0;
      for (Index row = m; row < last; ++row) sum += row_sums[row - m0];
      atomicAdd(dots.at(k, m / S) + r, sum);
    }
    __syncthreads();  // row_sums have been read before they are overwritten
  }
}

}  // namespace dit_fast::cuda
