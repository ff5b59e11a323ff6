#include "cuda/block.h"
#include "cuda/mlp_team.h"

namespace dit_fast::cuda {
namespace {

template <class Real>
__global__ void __launch_bounds__(team_size) retrain_kernel(const __grid_constant__ team::Retrain<Real> args) {
  team::retrain_models(Block{static_cast<int>(threadIdx.x), team_size}, args, blockIdx.x, shared_memory);
}

}  // namespace

template <class Real>
void team_retrain(const team::Retrain<Real>& args, int device, void* stream) {
  launch_teams(retrain_kernel<Real>, args, device, stream, "mlp_retrain");
}

template void team_retrain(const team::Retrain<float>&, int, void*);
template void team_retrain(const team::Retrain<double>&, int, void*);

}  // namespace dit_fast::cuda
