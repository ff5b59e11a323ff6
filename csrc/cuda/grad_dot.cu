#include "grad_dot.h"

#include "cuda/contract.h"
#include "cuda/launch.h"
#include "cuda/tile.h"

namespace dit_fast::cuda {
namespace {

template <class Real>
struct Layer {
  GradDotLayer<Real> data;
  // the inputs are split in pieces of `piece`, whose shares of the dots add up, so that small batches fill the GPU
  Index row_tiles, output_tiles, piece, num_pieces;

  __host__ __device__ Index num_tiles() const { return row_tiles * output_tiles * num_pieces * data.directions.K; }
};

// z = Σ_i U[k,o,i] a[b,s,i] for rows (b, s) from m0, outputs o from o0 and inputs i0 … i1.
template <class Real, int N>
__device__ void multiply(const GradDotLayer<Real>& layer, Index m0, Index k, Index o0, Index i0, Index i1,
                         Panel<Real, N>& a_panel, Panel<Real, N>& u_panel, Real (&z)[N][N]) {
  const auto& [samples, directions] = layer;
  const int y = threadIdx.x / side, x = threadIdx.x % side;
  AcrossRows<Real, N> a, u;
  const Index m = m0 + a.row(), o = o0 + u.row();
  const Real* a_row = m < samples.B * samples.S ? samples.activations.row(m) : nullptr;
  const Real* u_row = o < directions.O ? directions.weight.at(k, o) : nullptr;
  a.load(a_row, i0, i1);
  u.load(u_row, i0, i1);
  for (Index i = i0; i < i1; i += depth) {
    a.store(a_panel);
    u.store(u_panel);
    __syncthreads();  // the panels are complete before any thread reads them
    a.load(a_row, i + depth, i1);
    u.load(u_row, i + depth, i1);
    multiply_panels<Real, N>(a_panel, u_panel, y, x, z);
    __syncthreads();  // all have read before the next ones overwrite them
  }
}

// A block owns a tile of rows (b, s) × outputs of one column k and a piece of the inputs, and adds its share to the
// dots of the samples in it.
template <class Real, int N>
__global__ void __launch_bounds__(num_threads)
    grad_dot_kernel(const __grid_constant__ Group<Layer<Real>> group, Rows<double> dots) {
  __shared__ alignas(16) Panel<Real, N> a_panel, u_panel;
  __shared__ double row_sums[side * N];
  for (Index t = blockIdx.x; t < group.num_tiles; t += gridDim.x) {
    Index in_layer = t;
    const Layer<Real>& layer = group.find(in_layer);
    const auto& [samples, directions] = layer.data;
    const Index m0 = in_layer % layer.row_tiles * (side * N);
    in_layer /= layer.row_tiles;
    const Index i0 = in_layer % layer.num_pieces * layer.piece;
    in_layer /= layer.num_pieces;
    const Index o0 = in_layer % layer.output_tiles * (side * N), k = in_layer / layer.output_tiles;
    Real z[N][N] = {};
    multiply<Real, N>(layer.data, m0, k, o0, i0, min(i0 + layer.piece, directions.I), a_panel, u_panel, z);
    const Real* bias = directions.bias.data && i0 == 0 ? directions.bias.at(0, k) : nullptr;
    contract<Real, N>(dots, samples, m0, k, o0, directions.O, bias, z, row_sums);
  }
}

template <class Real, int N>
Layer<Real> whole(const GradDotLayer<Real>& layer) {
  const auto& [samples, directions] = layer;
  constexpr Index tile = side * N;
  const Index I = std::max<Index>(directions.I, 1);
  return {layer, ceil_div(samples.B * samples.S, tile), ceil_div(directions.O, tile), I, 1};
}

template <class Real, int N>
void launch(const GradDot<Real>& args, int num_processors, cudaStream_t stream) {
  Index num_tiles = 0;
  for (const auto& layer : args.layers) num_tiles += whole<Real, N>(layer).num_tiles();
  std::vector<Layer<Real>> layers;
  for (const auto& layer : args.layers) {
    if (!has_terms(layer.samples, layer.directions)) continue;
    Layer<Real> cut = whole<Real, N>(layer);
    // two blocks for each processor, but no piece below four panels
    const Index pieces =
        std::min(ceil_div(2 * num_processors, std::max<Index>(num_tiles, 1)), ceil_div(cut.piece, 4 * depth));
    cut.piece = ceil_div(ceil_div(cut.piece, pieces), depth) * depth;
    cut.num_pieces = ceil_div(std::max<Index>(layer.directions.I, 1), cut.piece);
    layers.push_back(cut);
  }
  launch_groups(
      layers,
      [&](const Group<Layer<Real>>& group) {
        grad_dot_kernel<Real, N><<<num_blocks(group.num_tiles), num_threads, 0, stream>>>(group, args.dots);
      },
      "grad_dot");
}

}  // namespace

template <class Real>
void grad_dot(const GradDot<Real>& args, int device, void* stream) {
  const DeviceGuard guard(device, "grad_dot");
  const int processors = num_processors(device, "grad_dot");
  const auto queue = static_cast<cudaStream_t>(stream);
  if constexpr (sizeof(Real) == 4) {
    // large tiles read shared memory half as often; small ones leave fewer processors idle
    Index num_large = 0;
    for (const auto& layer : args.layers) num_large += whole<Real, 8>(layer).num_tiles();
    if (num_large >= processors) return launch<Real, 8>(args, processors, queue);
  }
  launch<Real, 4>(args, processors, queue);
}

template void grad_dot(const GradDot<float>&, int, void*);
template void grad_dot(const GradDot<double>&, int, void*);

}  // namespace dit_fast::cuda
