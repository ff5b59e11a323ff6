// The tile that the kernels multiply: 256 threads, 16 × 16, own a square of side × N rows and columns. Thread (y, x)
// owns N × N of it in groups of 16 bytes, so that shared and global memory are read 16 bytes at a time.
#pragma once

#include <cstdint>

#include "layer.h"

namespace dit_fast::cuda {

constexpr int side = 16, num_threads = side * side;
// how much of the summed dimension lies in shared memory at a time
constexpr int depth = 16;
// Added to each row of a panel: rows stay aligned to 16 bytes, and threads that store along the summed dimension (pairs
// of vectors of 16 neighbouring rows) hit different banks.
constexpr int padding = 4;

template <class Real>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(Real);
  Real at[size];
};

template <class Real, int N>
constexpr int tile_of = side * N;

template <class Real, int N>
using Panel = Real[depth][side * N + padding];

// The row (column) within the tile of element p of thread y (x).
template <class Real>
__device__ __forceinline__ int place(int thread, int p) {
  constexpr int size = Vector<Real>::size;
  return p / size * side * size + thread * size + p % size;
}

// Elements at … at + 15 bytes of a row of `length`; zeros beyond its end, and for a null row.
template <class Real>
__device__ __forceinline__ Vector<Real> load_vector(const Real* row, Index at, Index length) {
  constexpr int size = Vector<Real>::size;
  Vector<Real> found = {};
  if (!row || at >= length) return found;
  const Real* from = row + at;
  if (at + size <= length && reinterpret_cast<std::uintptr_t>(from) % 16 == 0)
    return *reinterpret_cast<const Vector<Real>*>(from);
#pragma unroll
  for (int j = 0; j < size; ++j)
    if (at + j < length) found.at[j] = from[j];
  return found;
}

// sum[p][q] += Σ_l left[l][row p of y] right[l][column q of x]
template <class Real, int N>
__device__ __forceinline__ void multiply_panels(const Real (*left)[side * N + padding],
                                                const Real (*right)[side * N + padding], int y, int x,
                                                Real (&sum)[N][N]) {
  constexpr int size = Vector<Real>::size;
#pragma unroll
  for (int l = 0; l < depth; ++l) {
    Vector<Real> from_left[N / size], from_right[N / size];
#pragma unroll
    for (int g = 0; g < N / size; ++g) {
      from_left[g] = *reinterpret_cast<const Vector<Real>*>(&left[l][place<Real>(y, g * size)]);
      from_right[g] = *reinterpret_cast<const Vector<Real>*>(&right[l][place<Real>(x, g * size)]);
    }
#pragma unroll
    for (int p = 0; p < N; ++p)
#pragma unroll
      for (int q = 0; q < N; ++q) sum[p][q] += from_left[p / size].at[p % size] * from_right[q / size].at[q % size];
  }
}

// A panel whose summed dimension runs along the rows in memory: the thread fetches vectors of one row of the tile,
// keeps them in registers while the panel before is multiplied, and stores them transposed.
template <class Real, int N>
struct AcrossRows {
  static constexpr int size = Vector<Real>::size, tile = side * N;
  static constexpr int count = tile * depth / size / num_threads;
  Vector<Real> kept[count];

  // which row of the tile is this thread's
  static __device__ __forceinline__ int row() { return threadIdx.x / 2 % tile; }
  static __device__ __forceinline__ int offset(int pass) {
    return ((static_cast<int>(threadIdx.x) / 2 / tile + pass * (num_threads / 2 / tile)) * 2 + threadIdx.x % 2) * size;
  }
  __device__ __forceinline__ void load(const Real* row, Index first, Index length) {
#pragma unroll
    for (int pass = 0; pass < count; ++pass) kept[pass] = load_vector(row, first + offset(pass), length);
  }
  __device__ __forceinline__ void store(Panel<Real, N>& panel) const {
#pragma unroll
    for (int pass = 0; pass < count; ++pass)
#pragma unroll
      for (int j = 0; j < size; ++j) panel[offset(pass) + j][row()] = kept[pass].at[j];
  }
};

// A panel whose rows lie in memory as they do in shared memory.
template <class Real, int N>
struct AlongRows {
  static constexpr int size = Vector<Real>::size, vectors = side * N / size;
  static constexpr int count = vectors * depth / num_threads;
  Vector<Real> kept[count];

  static __device__ __forceinline__ int row(int pass) {
    return (static_cast<int>(threadIdx.x) + pass * num_threads) / vectors;
  }
  static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x) % vectors * size; }
  __device__ __forceinline__ void store(Panel<Real, N>& panel) const {
#pragma unroll
    for (int pass = 0; pass < count; ++pass) *reinterpret_cast<Vector<Real>*>(&panel[row(pass)][column()]) = kept[pass];
  }
};

}  // namespace dit_fast::cuda
