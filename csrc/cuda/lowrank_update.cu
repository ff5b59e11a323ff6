#include "lowrank_update.h"

#include "cuda/launch.h"
#include "cuda/tile.h"
#include "cuda/update_tile.h"

namespace dit_fast::cuda {
namespace {

template <class Real, int N>
struct Layer {
  LowrankUpdateLayer<Real> data;

  __host__ __device__ Index num_tiles() const { return num_weight_tiles<Real, N>(data.directions); }
};

// A block owns a tile of outputs × inputs of one column's weight and adds all rows (b, s) to it, in order; those at the
// first inputs own the outputs' biases too.
template <class Real, int N>
__global__ void __launch_bounds__(num_threads)
    lowrank_update_kernel(const __grid_constant__ Group<Layer<Real, N>> group, double alpha,
                          Rows<const double> coefficients) {
  __shared__ alignas(16) Panel<Real, N> a_panel, w_panel;
  __shared__ double parts[num_threads];
  for (Index t = blockIdx.x; t < group.num_tiles; t += gridDim.x) {
    Index in_layer = t;
    const auto& [samples, directions] = group.find(in_layer).data;
    const Index input_tiles = max(ceil_div(directions.I, side * N), Index(1));
    const Index i0 = in_layer % input_tiles * (side * N);
    in_layer /= input_tiles;
    const Index output_tiles = ceil_div(directions.O, side * N);
    const Index o0 = in_layer % output_tiles * (side * N), k = in_layer / output_tiles;
    if (directions.I > 0) {
      Real sum[N][N] = {};
      weighted_sums<Real, N>(samples, coefficients, directions, k, o0, i0, a_panel, w_panel, sum);
      write_weight<Real, N>(alpha, directions, k, o0, i0, sum);
    }
    if (i0 == 0 && directions.bias.data) update_bias<Real, N>(alpha, samples, coefficients, directions, k, o0, parts);
  }
}

template <class Real, int N>
Index launch(const LowrankUpdate<Real>& args, Index at_least, cudaStream_t stream) {
  std::vector<Layer<Real, N>> layers;
  Index num_tiles = 0;
  for (const auto& layer : args.layers) {
    layers.push_back({layer});
    num_tiles += layers.back().num_tiles();
  }
  if (num_tiles < at_least) return 0;
  launch_groups(
      layers,
      [&](const Group<Layer<Real, N>>& group) {
        lowrank_update_kernel<Real, N>
            <<<num_blocks(group.num_tiles), num_threads, 0, stream>>>(group, args.alpha, args.coefficients);
      },
      "lowrank_update");
  return num_tiles;
}

}  // namespace

template <class Real>
void lowrank_update(const LowrankUpdate<Real>& args, int device, void* stream) {
  const DeviceGuard guard(device, "lowrank_update");
  const auto queue = static_cast<cudaStream_t>(stream);
  // large tiles read shared memory half as often; small ones leave fewer processors idle
  if constexpr (sizeof(Real) == 4)
    if (launch<Real, 8>(args, num_processors(device, "lowrank_update"), queue)) return;
  launch<Real, 4>(args, 0, queue);
}

template void lowrank_update(const LowrankUpdate<float>&, int, void*);
template void lowrank_update(const LowrankUpdate<double>&, int, void*);

}  // namespace dit_fast::cuda
