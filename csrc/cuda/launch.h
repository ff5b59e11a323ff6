// What every launcher needs: the right device, a grid of any number of tiles, an error with a name.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "layer.h"

namespace dit_fast::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": CUDA error: " + cudaGetErrorString(error));
}

// Makes `device` current and puts the caller's back: torch remembers which one it left current.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* what) {
    check(cudaGetDevice(&previous_), what);
    check(cudaSetDevice(device), what);
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

__host__ __device__ __forceinline__ Index ceil_div(Index number, Index divisor) {
  return (number + divisor - 1) / divisor;
}

// Blocks stride over the tiles, so that any 64-bit number of them fits the grid.
inline unsigned num_blocks(Index num_tiles) {
  return static_cast<unsigned>(std::min<Index>(num_tiles, 1 << 30));
}

}  // namespace dit_fast::cuda
