// A team as a block of a CUDA grid, its memory shared memory, and how a kernel of teams is launched.
#pragma once

#include "cuda/launch.h"
#include "team/net.h"

namespace dit_fast::cuda {

constexpr int team_size = 256;

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

template <class Kernel, class Args>
void launch_teams(Kernel kernel, const Args& args, int device, void* stream, const char* what) {
  if (args.run.K == 0 || args.run.num_steps == 0) return;
  const DeviceGuard guard(device, what);
  const int bytes = static_cast<int>(args.run.net.num_bytes);
  // beyond 48 KiB a kernel has to say so
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
  const unsigned num_teams = static_cast<unsigned>(ceil_div(args.run.K, args.run.net.G));
  kernel<<<num_teams, team_size, static_cast<std::size_t>(bytes), static_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError(), what);
}

}  // namespace dit_fast::cuda
