#include "max_pool.h"

#include "cuda/launch.h"

namespace dit_fast::cuda {
namespace {

constexpr int num_threads = 256;

// A thread owns outputs, one grid apart.
template <class Real>
__global__ void __launch_bounds__(num_threads) max_pool_kernel(const __grid_constant__ MaxPool<Real> args) {
  const PoolShape& s = args.shape;
  const Index stride = static_cast<Index>(gridDim.x) * num_threads, size = args.num_planes * s.num_out();
  for (Index i = static_cast<Index>(blockIdx.x) * num_threads + threadIdx.x; i < size; i += stride) {
    Index place;
    const Real largest = largest_at(s, args.x + i / s.num_out() * s.num_in(), i % s.num_out(), &place);
    args.y[i] = pool_activation(static_cast<Real>(args.slope), largest);
    args.places.set(i, place);
  }
}

// What the windows that hold an element give it; no atomics, so that the order of the sum is fixed. at: the first
// output of its plane in places and y, from: the same of the column.
template <class Real>
__device__ Real gather_windows(const PoolColumns<Real>& args, Index at, const Real* from, Index element) {
  const PoolShape& s = args.shape;
  const Index h = element / s.in[1] + s.padding[0], w = element % s.in[1] + s.padding[1];
  Real sum = 0;
  // windows in rising order, which the last number of a window meets first
  for (Index kh = s.kernel[0]; kh-- > 0;) {
    const Index row = h - kh * s.dilation[0];
    if (row < 0 || row % s.stride[0] || row / s.stride[0] >= s.out[0]) continue;
    for (Index kw = s.kernel[1]; kw-- > 0;) {
      const Index column = w - kw * s.dilation[1];
      if (column < 0 || column % s.stride[1] || column / s.stride[1] >= s.out[1]) continue;
      const Index o = row / s.stride[0] * s.out[1] + column / s.stride[1];
      if (args.places.get(at + o) == kh * s.kernel[1] + kw)
        sum += pool_factor(static_cast<Real>(args.slope), args.y, at + o) * from[o];
    }
  }
  return sum;
}

// A thread owns elements of `to`, one grid apart.
template <bool transposed, class Real>
__global__ void __launch_bounds__(num_threads) columns_kernel(const __grid_constant__ PoolColumns<Real> args) {
  const PoolShape& s = args.shape;
  const Index stride = static_cast<Index>(gridDim.x) * num_threads, to_size = transposed ? s.num_in() : s.num_out();
  const Index from_size = transposed ? s.num_out() : s.num_in(), size = args.B * args.K * args.C * to_size;
  for (Index i = static_cast<Index>(blockIdx.x) * num_threads + threadIdx.x; i < size; i += stride) {
    const Index plane = i / to_size, within = i % to_size;
    const Index at = (plane / (args.K * args.C) * args.C + plane % args.C) * s.num_out();
    const Real* from = args.from + plane * from_size;
    args.to[i] = transposed ? gather_windows(args, at, from, within)
                            : pool_factor(static_cast<Real>(args.slope), args.y, at + within) *
                                  from[s.element(within, args.places.get(at + within))];
  }
}

}  // namespace

template <class Real>
void max_pool(const MaxPool<Real>& args, int device, void* stream) {
  const Index size = args.num_planes * args.shape.num_out();
  if (size == 0) return;
  const DeviceGuard guard(device, "max_pool");
  max_pool_kernel<<<num_blocks(ceil_div(size, num_threads)), num_threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError(), "max_pool");
}

template <class Real>
void pool_columns(const PoolColumns<Real>& args, int device, void* stream) {
  const Index size = args.B * args.K * args.C * (args.transposed ? args.shape.num_in() : args.shape.num_out());
  if (size == 0) return;
  const DeviceGuard guard(device, "pool_columns");
  const auto blocks = num_blocks(ceil_div(size, num_threads));
  const auto on = static_cast<cudaStream_t>(stream);
  if (args.transposed)
    columns_kernel<true><<<blocks, num_threads, 0, on>>>(args);
  else
    columns_kernel<false><<<blocks, num_threads, 0, on>>>(args);
  check(cudaGetLastError(), "pool_columns");
}

template void max_pool(const MaxPool<float>&, int, void*);
template void max_pool(const MaxPool<double>&, int, void*);
template void pool_columns(const PoolColumns<float>&, int, void*);
template void pool_columns(const PoolColumns<double>&, int, void*);

}  // namespace dit_fast::cuda
