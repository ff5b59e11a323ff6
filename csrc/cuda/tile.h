// The tile both kernels multiply: 256 threads, 16 × 16, own a 64 × 64 tile of the product. Thread (y, x) owns the
// elements (y + 16·p, x + 16·q), p, q < 4, so that neighbouring lanes read and write neighbouring columns.
#pragma once

namespace dit_fast::cuda {

constexpr int side = 16, per_thread = 4, tile = side * per_thread, num_threads = side * side;
// how much of the summed dimension lies in shared memory at a time
constexpr int depth = 16;

// One column more than the tile: threads that store along the summed dimension then hit different banks.
template <class Real>
using Panel = Real[depth][tile + 1];

// sum[p][q] += Σ_l left[l][y + 16·p] right[l][x + 16·q]
template <class Real>
__device__ __forceinline__ void multiply_panels(const Panel<Real>& left, const Panel<Real>& right, int y, int x,
                                                Real (&sum)[per_thread][per_thread]) {
#pragma unroll
  for (int l = 0; l < depth; ++l) {
    Real from_left[per_thread], from_right[per_thread];
#pragma unroll
    for (int p = 0; p < per_thread; ++p) {
      from_left[p] = left[l][y + side * p];
      from_right[p] = right[l][x + side * p];
    }
#pragma unroll
    for (int p = 0; p < per_thread; ++p)
#pragma unroll
      for (int q = 0; q < per_thread; ++q) sum[p][q] += from_left[p] * from_right[q];
  }
}

}  // namespace dit_fast::cuda
