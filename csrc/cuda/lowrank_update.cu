#include "lowrank_update.h"

#include "cuda/launch.h"
#include "cuda/tile.h"

namespace dit_fast::cuda {
namespace {

// Fetches rows m0 … m0 + 15 of W = c[k,b] δ[b,s,o] (outputs from o0) and of a[b,s,i] (inputs from i0).
template <class Real>
__device__ void fetch(const LowrankUpdate<Real>& args, Index m0, Index k, Index o0, Index i0, Panel<Real>& w_panel,
                      Panel<Real>& a_panel) {
  const Index S = args.sizes.S, num_rows = args.sizes.B * S;
  // 64 neighbouring threads fetch one row; each thread fetches every fourth row
  const int column = threadIdx.x % tile;
  const Index o = o0 + column, i = i0 + column;
#pragma unroll
  for (int l = threadIdx.x / tile; l < depth; l += num_threads / tile) {
    const Index m = m0 + l, b = m / S, s = m - b * S;
    const bool inside = m < num_rows;
    w_panel[l][column] =
        inside && o < args.sizes.O ? weighted_delta(args.coefficients.row(k)[b], args.delta.at(b, s)[o]) : Real(0);
    a_panel[l][column] = inside && i < args.sizes.I ? args.activations.at(b, s)[i] : Real(0);
  }
}

// A block owns the 64 outputs × 64 inputs of one column's weight and adds all rows (b, s) to them, in order.
template <class Real>
__global__ void __launch_bounds__(num_threads) weight_kernel(LowrankUpdate<Real> args, Index num_tiles) {
  __shared__ Panel<Real> w_panel, a_panel;
  const Index num_rows = args.sizes.B * args.sizes.S, O = args.sizes.O, I = args.sizes.I;
  const Index input_tiles = ceil_div(I, tile), output_tiles = ceil_div(O, tile);
  const int y = threadIdx.x / side, x = threadIdx.x % side;
  for (Index t = blockIdx.x; t < num_tiles; t += gridDim.x) {
    const Index i0 = t % input_tiles * tile, o0 = t / input_tiles % output_tiles * tile;
    const Index k = t / input_tiles / output_tiles;
    Real sum[per_thread][per_thread] = {};
    for (Index m0 = 0; m0 < num_rows; m0 += depth) {
      fetch<Real>(args, m0, k, o0, i0, w_panel, a_panel);
      __syncthreads();  // the panels are complete before any thread reads them
      multiply_panels<Real>(w_panel, a_panel, y, x, sum);
      __syncthreads();  // all have read before the next ones overwrite them
    }
#pragma unroll
    for (int p = 0; p < per_thread; ++p) {
#pragma unroll
      for (int q = 0; q < per_thread; ++q) {
        const Index o = o0 + y + side * p, i = i0 + x + side * q;
        if (o < O && i < I) args.weight.at(k, o)[i] += sum[p][q];
      }
    }
  }
}

constexpr int warp = 32, num_warps = num_threads / warp;

// A block owns 32 outputs of one column's bias; warp w adds the rows w, w + 8, …, lane l those of output l.
template <class Real>
__global__ void __launch_bounds__(num_threads) bias_kernel(LowrankUpdate<Real> args, Index num_tiles) {
  __shared__ double sums[num_warps][warp];
  const Index S = args.sizes.S, num_rows = args.sizes.B * S, O = args.sizes.O, output_tiles = ceil_div(O, warp);
  const int lane = threadIdx.x % warp, first = threadIdx.x / warp;
  for (Index t = blockIdx.x; t < num_tiles; t += gridDim.x) {
    const Index o = t % output_tiles * warp + lane, k = t / output_tiles;
    double sum = 0;
    if (o < O)
      for (Index m = first; m < num_rows; m += num_warps)
        sum += args.coefficients.row(k)[m / S] * static_cast<double>(args.delta.row(m)[o]);
    sums[first][lane] = sum;
    __syncthreads();  // all warps have left their sums
    if (first == 0 && o < O) {
      for (int w = 1; w < num_warps; ++w) sum += sums[w][lane];
      args.bias.row(k)[o] += static_cast<Real>(sum);
    }
    __syncthreads();  // the sums have been read before the next tile overwrites them
  }
}

}  // namespace

template <class Real>
void lowrank_update(const LowrankUpdate<Real>& args, int device, void* stream) {
  const Sizes& n = args.sizes;
  if (n.K * n.B * n.S * n.O == 0) return;
  const DeviceGuard guard(device, "lowrank_update");
  const auto queue = static_cast<cudaStream_t>(stream);
  if (n.I > 0) {
    const Index num_tiles = ceil_div(n.O, tile) * ceil_div(n.I, tile) * n.K;
    weight_kernel<Real><<<num_blocks(num_tiles), num_threads, 0, queue>>>(args, num_tiles);
    check(cudaGetLastError(), "lowrank_update (weight)");
  }
  if (args.bias.data) {
    const Index num_tiles = ceil_div(n.O, warp) * n.K;
    bias_kernel<Real><<<num_blocks(num_tiles), num_threads, 0, queue>>>(args, num_tiles);
    check(cudaGetLastError(), "lowrank_update (bias)");
  }
}

template void lowrank_update(const LowrankUpdate<float>&, int, void*);
template void lowrank_update(const LowrankUpdate<double>&, int, void*);

}  // namespace dit_fast::cuda
