#include "update_dot.h"

#include "cuda/contract.h"
#include "cuda/launch.h"
#include "cuda/tile.h"
#include "cuda/update_tile.h"

namespace dit_fast::cuda {
namespace {

constexpr int N = 4, tile = side * N;

template <class Real>
struct Layer {
  UpdateDotLayer<Real> data;

  __host__ __device__ Index num_tiles() const { return num_weight_tiles<Real, N>(data.directions); }
};

// The tile of the new U, [input][output]: what the update leaves is what the dots multiply.
template <class Real>
using Weight = Real[tile][tile + padding];

// The tile's share of the dots of all samples: z over its inputs alone, as dots are linear in U.
template <class Real>
__device__ void take_dots(const Rows<double>& dots, const Samples<Real>& samples, const Directions<Real>& directions,
                          Index k, Index o0, Index i0, Panel<Real, N>& a_panel, const Weight<Real>& u,
                          double (&row_sums)[tile]) {
  const int y = threadIdx.x / side, x = threadIdx.x % side;
  const Index num_rows = samples.B * samples.S, i1 = min(i0 + tile, directions.I);
  const Real* bias = directions.bias.data && i0 == 0 ? directions.bias.at(0, k) : nullptr;
  AcrossRows<Real, N> a;
  for (Index m0 = 0; m0 < num_rows; m0 += tile) {
    const Index m = m0 + a.row();
    const Real* row = m < num_rows ? samples.activations.row(m) : nullptr;
    Real z[N][N] = {};
    a.load(row, i0, i1);
    for (Index i = i0; i < i1; i += depth) {
      a.store(a_panel);
      __syncthreads();  // the panel is complete before any thread reads it
      a.load(row, i + depth, i1);
      multiply_panels<Real, N>(a_panel, u + (i - i0), y, x, z);
      __syncthreads();  // all have read before the next one overwrites it
    }
    contract<Real, N>(dots, samples, m0, k, o0, directions.O, bias, z, row_sums);
  }
}

// A block owns 64 outputs × 64 inputs of one column's weight: it reads and writes them once.
template <class Real>
__global__ void __launch_bounds__(num_threads)
    update_dot_kernel(const __grid_constant__ Group<Layer<Real>> group, double alpha, Rows<const double> coefficients,
                      Rows<double> dots) {
  __shared__ alignas(16) Panel<Real, N> a_panel;
  // its first rows are the update's panel of W until U is complete
  __shared__ alignas(16) Weight<Real> u;
  __shared__ double parts[num_threads], row_sums[tile];
  const int y = threadIdx.x / side, x = threadIdx.x % side;
  for (Index t = blockIdx.x; t < group.num_tiles; t += gridDim.x) {
    Index in_layer = t;
    const auto& [update, dot, directions] = group.find(in_layer).data;
    const Index input_tiles = max(ceil_div(directions.I, tile), Index(1));
    const Index i0 = in_layer % input_tiles * tile;
    in_layer /= input_tiles;
    const Index output_tiles = ceil_div(directions.O, tile);
    const Index o0 = in_layer % output_tiles * tile, k = in_layer / output_tiles;
    Real sum[N][N] = {};
    if (directions.I > 0) {
      weighted_sums<Real, N>(update, coefficients, directions, k, o0, i0, a_panel, u, sum);
      write_weight<Real, N>(alpha, directions, k, o0, i0, sum);
    }
#pragma unroll
    for (int p = 0; p < N; ++p)
#pragma unroll
      for (int q = 0; q < N; q += Vector<Real>::size) {
        Vector<Real> outputs;
#pragma unroll
        for (int j = 0; j < Vector<Real>::size; ++j) outputs.at[j] = sum[p][q + j];
        *reinterpret_cast<Vector<Real>*>(&u[place<Real>(y, p)][place<Real>(x, q)]) = outputs;
      }
    if (i0 == 0 && directions.bias.data) update_bias<Real, N>(alpha, update, coefficients, directions, k, o0, parts);
    take_dots(dots, dot, directions, k, o0, i0, a_panel, u, row_sums);
    __syncthreads();  // all have read U before the next tile overwrites it
  }
}

}  // namespace

template <class Real>
void update_dot(const UpdateDot<Real>& args, int device, void* stream) {
  const DeviceGuard guard(device, "update_dot");
  const auto queue = static_cast<cudaStream_t>(stream);
  std::vector<Layer<Real>> layers;
  for (const auto& layer : args.layers) layers.push_back({layer});
  launch_groups(
      layers,
      [&](const Group<Layer<Real>>& group) {
        update_dot_kernel<Real>
            <<<num_blocks(group.num_tiles), num_threads, 0, queue>>>(group, args.alpha, args.coefficients, args.dots);
      },
      "update_dot");
}

template void update_dot(const UpdateDot<float>&, int, void*);
template void update_dot(const UpdateDot<double>&, int, void*);

}  // namespace dit_fast::cuda
