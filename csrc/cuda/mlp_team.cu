#include "cuda/mlp_team.h"

#include "cuda/launch.h"

namespace dit_fast::cuda {
namespace {

constexpr int num_threads = 256;

struct Block {
  int rank, size;

  __host__ __device__ void sync() const {
#ifdef __CUDA_ARCH__
    __syncthreads();
#endif
  }
  __host__ __device__ void add(double* at, double value) const {
#ifdef __CUDA_ARCH__
    atomicAdd(at, value);
#endif
  }
  __host__ __device__ void raise(Index* at, Index value) const {
#ifdef __CUDA_ARCH__
    atomicMax(reinterpret_cast<long long*>(at), static_cast<long long>(value));
#endif
  }
};

extern __shared__ double shared_memory[];

template <class Real>
__global__ void __launch_bounds__(num_threads) sweep_kernel(const __grid_constant__ team::Sweep<Real> args) {
  team::sweep_columns(Block{static_cast<int>(threadIdx.x), num_threads}, args, blockIdx.x, shared_memory);
}

template <class Real>
__global__ void __launch_bounds__(num_threads) retrain_kernel(const __grid_constant__ team::Retrain<Real> args) {
  team::retrain_models(Block{static_cast<int>(threadIdx.x), num_threads}, args, blockIdx.x, shared_memory);
}

template <class Kernel, class Args>
void launch(Kernel kernel, const Args& args, int device, void* stream, const char* what) {
  if (args.run.K == 0 || args.run.num_steps == 0) return;
  const DeviceGuard guard(device, what);
  const int bytes = static_cast<int>(args.run.net.num_bytes);
  // beyond 48 KiB a kernel has to say so
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
  const unsigned num_teams = static_cast<unsigned>(ceil_div(args.run.K, args.run.net.G));
  kernel<<<num_teams, num_threads, static_cast<std::size_t>(bytes), static_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError(), what);
}

}  // namespace

DeviceLimits device_limits(int device) {
  int bytes = 0, processors = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device_limits");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device_limits");
  return {bytes, processors};
}

template <class Real>
void team_sweep(const team::Sweep<Real>& args, int device, void* stream) {
  launch(sweep_kernel<Real>, args, device, stream, "mlp_sweep");
}

template <class Real>
void team_retrain(const team::Retrain<Real>& args, int device, void* stream) {
  launch(retrain_kernel<Real>, args, device, stream, "mlp_retrain");
}

template void team_sweep(const team::Sweep<float>&, int, void*);
template void team_sweep(const team::Sweep<double>&, int, void*);
template void team_retrain(const team::Retrain<float>&, int, void*);
template void team_retrain(const team::Retrain<double>&, int, void*);

}  // namespace dit_fast::cuda
