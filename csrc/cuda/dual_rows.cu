#include "dual_rows.h"

#include "cuda/launch.h"

namespace dit_fast::cuda {
namespace {

constexpr int num_threads = 256;

// A thread owns numbers or rows, one grid apart.
__device__ __forceinline__ Index first_of_thread() {
  return static_cast<Index>(blockIdx.x) * num_threads + threadIdx.x;
}
__device__ __forceinline__ Index grid_stride() {
  return static_cast<Index>(gridDim.x) * num_threads;
}

template <class Real>
__global__ void __launch_bounds__(num_threads) values_kernel(const __grid_constant__ ActivationPoints<Real> args) {
  for (Index i = first_of_thread(); i < args.size; i += grid_stride()) activation_values_at(args.activation, args, i);
}

template <class Real>
__global__ void __launch_bounds__(num_threads) columns_kernel(const __grid_constant__ ActivationColumns<Real> args) {
  const Real slope = static_cast<Real>(args.slope);
  for (Index i = first_of_thread(); i < args.R * args.K * args.n; i += grid_stride()) {
    const Index shared = i / (args.K * args.n) * args.n + i % args.n;
    const Real value = gate_factor(args.piecewise, slope, args.gate[shared]) * args.from[i];
    args.to[i] = args.curve ? value + args.curve[shared] * args.tangent[i] : value;
  }
}

template <class Real>
__global__ void __launch_bounds__(num_threads) loss_kernel(const __grid_constant__ LossColumns<Real> args) {
  for (Index row = first_of_thread(); row < args.B * args.K; row += grid_stride()) loss_column_at(args, row);
}

template <class Args>
void launch(void (*kernel)(Args), const Args& args, Index size, const char* what, int device, void* stream) {
  if (size == 0) return;
  const DeviceGuard guard(device, what);
  kernel<<<num_blocks(ceil_div(size, num_threads)), num_threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError(), what);
}

}  // namespace

template <class Real>
void activation_values(const ActivationPoints<Real>& args, int device, void* stream) {
  launch<ActivationPoints<Real>>(values_kernel<Real>, args, args.size, "activation_values", device, stream);
}

template <class Real>
void activation_columns(const ActivationColumns<Real>& args, int device, void* stream) {
  launch<ActivationColumns<Real>>(columns_kernel<Real>, args, args.R * args.K * args.n, "activation_columns", device,
                                  stream);
}

template <class Real>
void loss_columns(const LossColumns<Real>& args, int device, void* stream) {
  launch<LossColumns<Real>>(loss_kernel<Real>, args, args.B * args.K, "loss_columns", device, stream);
}

template void activation_values(const ActivationPoints<float>&, int, void*);
template void activation_values(const ActivationPoints<double>&, int, void*);
template void activation_columns(const ActivationColumns<float>&, int, void*);
template void activation_columns(const ActivationColumns<double>&, int, void*);
template void loss_columns(const LossColumns<float>&, int, void*);
template void loss_columns(const LossColumns<double>&, int, void*);

}  // namespace dit_fast::cuda
