#include "cuda/block.h"
#include "cuda/mlp_team.h"

namespace dit_fast::cuda {
namespace {

template <class Real>
__global__ void __launch_bounds__(team_size) sweep_kernel(const __grid_constant__ team::Sweep<Real> args) {
  team::sweep_columns(Block{static_cast<int>(threadIdx.x), team_size}, args, blockIdx.x, shared_memory);
}

}  // namespace

template <class Real>
void team_sweep(const team::Sweep<Real>& args, int device, void* stream) {
  launch_teams(sweep_kernel<Real>, args, device, stream, "mlp_sweep");
}

template void team_sweep(const team::Sweep<float>&, int, void*);
template void team_sweep(const team::Sweep<double>&, int, void*);

DeviceLimits device_limits(int device) {
  int bytes = 0, processors = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device_limits");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device_limits");
  return {bytes, processors};
}

}  // namespace dit_fast::cuda
