#include "grad_dot.h"

#include "cuda/launch.h"
#include "cuda/tile.h"

namespace dit_fast::cuda {
namespace {

// z = Σ_i U[k,o,i] a[b,s,i] for the block's rows m0 … m0 + 63 of (b, s) and outputs o0 … o0 + 63 of column k.
template <class Real>
__device__ void multiply(const GradDot<Real>& args, Index m0, Index k, Index o0, Panel<Real>& a_panel,
                         Panel<Real>& u_panel, Real (&z)[per_thread][per_thread]) {
  const Index num_rows = args.sizes.B * args.sizes.S, O = args.sizes.O, I = args.sizes.I;
  const int y = threadIdx.x / side, x = threadIdx.x % side;
  // thread (y, x) fetches element x of the rows and outputs y + 16·p; null beyond the edge
  const Real *a_rows[per_thread], *u_rows[per_thread];
#pragma unroll
  for (int p = 0; p < per_thread; ++p) {
    const Index m = m0 + y + side * p, o = o0 + y + side * p;
    a_rows[p] = m < num_rows ? args.activations.row(m) : nullptr;
    u_rows[p] = o < O ? args.weight.at(k, o) : nullptr;
  }
  for (Index i0 = 0; i0 < I; i0 += depth) {
    const Index i = i0 + x;
#pragma unroll
    for (int p = 0; p < per_thread; ++p) {
      a_panel[x][y + side * p] = a_rows[p] && i < I ? a_rows[p][i] : Real(0);
      u_panel[x][y + side * p] = u_rows[p] && i < I ? u_rows[p][i] : Real(0);
    }
    __syncthreads();  // the panels are complete before any thread reads them
    multiply_panels<Real>(a_panel, u_panel, y, x, z);
    __syncthreads();  // all have read before the next ones overwrite them
  }
}

// row_sums[r] = Σ_o δ[b,s,o] (z + v[k,o]) over the block's outputs, for each of its rows.
template <class Real>
__device__ void contract(const GradDot<Real>& args, Index m0, Index k, Index o0,
                         const Real (&z)[per_thread][per_thread], double (&row_sums)[tile]) {
  const Index num_rows = args.sizes.B * args.sizes.S, O = args.sizes.O;
  const int y = threadIdx.x / side, x = threadIdx.x % side;
#pragma unroll
  for (int p = 0; p < per_thread; ++p) {
    const Index m = m0 + y + side * p;
    double sum = 0;
    if (m < num_rows) {
      const Real* delta = args.delta.row(m);
#pragma unroll
      for (int q = 0; q < per_thread; ++q) {
        const Index o = o0 + x + side * q;
        if (o < O) sum += dot_term(delta[o], args.bias.data ? z[p][q] + args.bias.row(k)[o] : z[p][q]);
      }
    }
    // the 16 lanes of one row are half a warp
    for (int offset = side / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset, side);
    if (x == 0) row_sums[y + side * p] = sum;
  }
}

// A block owns 64 rows (b, s) × 64 outputs of one column k and adds its share to the dots of the samples in it.
template <class Real>
__global__ void __launch_bounds__(num_threads) grad_dot_kernel(GradDot<Real> args, Index row_tiles, Index num_tiles) {
  __shared__ Panel<Real> a_panel, u_panel;
  __shared__ double row_sums[tile];
  const Index S = args.sizes.S, num_rows = args.sizes.B * S, output_tiles = ceil_div(args.sizes.O, tile);
  for (Index t = blockIdx.x; t < num_tiles; t += gridDim.x) {
    const Index m0 = t % row_tiles * tile, o0 = t / row_tiles % output_tiles * tile;
    const Index k = t / row_tiles / output_tiles;
    Real z[per_thread][per_thread] = {};
    multiply<Real>(args, m0, k, o0, a_panel, u_panel, z);
    contract<Real>(args, m0, k, o0, z, row_sums);
    __syncthreads();  // row_sums are complete
    // the first row of a sample within the tile adds up the sample's rows: one atomic per sample and tile
    const Index m = m0 + threadIdx.x;
    if (threadIdx.x < tile && m < num_rows && (threadIdx.x == 0 || m % S == 0)) {
      const Index last = min(min(m0 + tile, num_rows), (m / S + 1) * S);
      double sum = 0;
      for (Index r = m; r < last; ++r) sum += row_sums[r - m0];
      atomicAdd(args.dots.row(k) + m / S, sum);
    }
    __syncthreads();  // row_sums have been read before the next tile overwrites them
  }
}

}  // namespace

template <class Real>
void grad_dot(const GradDot<Real>& args, int device, void* stream) {
  const Sizes& n = args.sizes;
  if (n.K * n.B * n.S * n.O == 0 || (n.I == 0 && !args.bias.data)) return;
  const DeviceGuard guard(device, "grad_dot");
  const Index row_tiles = ceil_div(n.B * n.S, tile), num_tiles = row_tiles * ceil_div(n.O, tile) * n.K;
  grad_dot_kernel<Real>
      <<<num_blocks(num_tiles), num_threads, 0, static_cast<cudaStream_t>(stream)>>>(args, row_tiles, num_tiles);
  check(cudaGetLastError(), "grad_dot");
}

template void grad_dot(const GradDot<float>&, int, void*);
template void grad_dot(const GradDot<double>&, int, void*);

}  // namespace dit_fast::cuda
