// What every launcher needs: the right device, a grid of any number of tiles, many layers in one launch, an error with
// a name.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

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

inline int num_processors(int device, const char* what) {
  int number = 0;
  check(cudaDeviceGetAttribute(&number, cudaDevAttrMultiProcessorCount, device), what);
  return number;
}

// Blocks stride over the tiles, so that any 64-bit number of them fits the grid.
inline unsigned num_blocks(Index num_tiles) {
  return static_cast<unsigned>(std::min<Index>(num_tiles, 1 << 30));
}

// Layers that one launch takes as a kernel parameter, whose tiles are numbered across them. Parameters end at 4 KiB.
template <class Layer>
struct Group {
  static constexpr int capacity = 3800 / static_cast<int>(sizeof(Layer));
  Layer layers[capacity];
  int count;
  Index num_tiles;

  // The layer of tile `number`, which becomes the number within it.
  __device__ __forceinline__ const Layer& find(Index& number) const {
    int at = 0;
    for (; at + 1 < count && number >= layers[at].num_tiles(); ++at) number -= layers[at].num_tiles();
    return layers[at];
  }
};

// Calls launch(group) with as many layers at a time as a group holds; layers without tiles are left out.
template <class Layer, class Launch>
void launch_groups(const std::vector<Layer>& layers, Launch launch, const char* what) {
  Group<Layer> group;
  group.count = 0;
  group.num_tiles = 0;
  const auto flush = [&] {
    if (group.count) {
      launch(group);
      check(cudaGetLastError(), what);
    }
    group.count = 0;
    group.num_tiles = 0;
  };
  for (const Layer& layer : layers) {
    if (layer.num_tiles() == 0) continue;
    group.layers[group.count++] = layer;
    group.num_tiles += layer.num_tiles();
    if (group.count == Group<Layer>::capacity) flush();
  }
  flush();
}

}  // namespace dit_fast::cuda
