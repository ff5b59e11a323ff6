#include "mlp_rows.h"

#include "cuda/launch.h"

namespace dit_fast::cuda {
namespace {

constexpr int num_threads = 256;

// A thread owns elements, or rows, one grid apart.
template <Piece piece, class Real>
__global__ void __launch_bounds__(num_threads) rows_kernel(const __grid_constant__ MlpRows<Real> args, Index size) {
  const Index stride = static_cast<Index>(gridDim.x) * num_threads;
  for (Index i = static_cast<Index>(blockIdx.x) * num_threads + threadIdx.x; i < size; i += stride)
    piece_at(piece, args, i);
}

template <Piece piece, class Real>
void launch(const MlpRows<Real>& args, int device, void* stream) {
  const Index size = piece_size(piece, args);
  if (size == 0) return;
  const DeviceGuard guard(device, "mlp_rows");
  rows_kernel<piece>
      <<<num_blocks(ceil_div(size, num_threads)), num_threads, 0, static_cast<cudaStream_t>(stream)>>>(args, size);
  check(cudaGetLastError(), "mlp_rows");
}

}  // namespace

template <class Real>
void mlp_rows(Piece piece, const MlpRows<Real>& args, int device, void* stream) {
  switch (piece) {
    case Piece::activate:
      return launch<Piece::activate>(args, device, stream);
    case Piece::combine:
      return launch<Piece::combine>(args, device, stream);
    case Piece::loss_rows:
      return launch<Piece::loss_rows>(args, device, stream);
    case Piece::loss_columns:
      return launch<Piece::loss_columns>(args, device, stream);
  }
}

template void mlp_rows(Piece, const MlpRows<float>&, int, void*);
template void mlp_rows(Piece, const MlpRows<double>&, int, void*);

}  // namespace dit_fast::cuda
