#include "grad_dot.h"

#include <algorithm>
#include <vector>

#include "cpu/clones.h"
#include "cpu/gemm.h"
#include "cpu/matrix.h"

namespace dit_fast::cpu {
namespace {

// Z = A Uᵀ + v is formed tile by tile; a tile of 512 rows (b, s) and 1024 columns (k, o) is 2 to 4 MiB.
constexpr Index max_rows = 512, max_columns = 1024;

// Σ_o δ_o z_o in double. Eight partial sums vectorise without leave to reorder additions (-ffast-math).
template <class Real>
[[gnu::always_inline]] inline double sum_terms(Index n, const Real* delta, const Real* z) {
  double sums[8] = {};
  Index o = 0;
  for (; o + 8 <= n; o += 8)
    for (int l = 0; l < 8; ++l) sums[l] += dot_term(delta[o + l], z[o + l]);
  double rest = 0;
  for (; o < n; ++o) rest += dot_term(delta[o], z[o]);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7])) + rest;
}

DIT_FAST_CLONES double dot(Index n, const float* delta, const float* z) {
  return sum_terms(n, delta, z);
}

DIT_FAST_CLONES double dot(Index n, const double* delta, const double* z) {
  return sum_terms(n, delta, z);
}

// Z = v for the columns first … first + columns of (k, o).
template <class Real>
void broadcast_bias(const GradDot<Real>& args, Index rows, Index first, Index columns, Real* z) {
  const Index O = args.sizes.O;
  for (Index r = 0; r < columns; ++r) z[r] = args.bias.row((first + r) / O)[(first + r) % O];
  for (Index m = 1; m < rows; ++m) std::copy_n(z, columns, z + m * columns);
}

// dots[k,b] += Σ_{s,o} δ z for the tile of Z that covers rows m0 … m0 + rows and columns r0 … r0 + columns.
template <class Real>
void contract(const GradDot<Real>& args, Index m0, Index rows, Index r0, Index columns, const Real* z, int threads) {
  const Index S = args.sizes.S, O = args.sizes.O;
  const Index b0 = m0 / S, num_b = (m0 + rows - 1) / S - b0 + 1;
  const Index k0 = r0 / O, num_k = (r0 + columns - 1) / O - k0 + 1;
  // each pair (k, b) is one thread's: the sum's order does not depend on the number of threads
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1 && rows * columns > parallel_from)
  for (Index b = b0; b < b0 + num_b; ++b) {
    for (Index k = k0; k < k0 + num_k; ++k) {
      const Index first = std::max(r0, k * O), last = std::min(r0 + columns, (k + 1) * O);
      double sum = 0;
      for (Index m = std::max(m0, b * S); m < std::min(m0 + rows, (b + 1) * S); ++m)
        sum += dot(last - first, args.delta.row(m) + first - k * O, z + (m - m0) * columns + first - r0);
      args.dots.row(k)[b] += sum;
    }
  }
}

}  // namespace

template <class Real>
void grad_dot(const GradDot<Real>& args, int threads) {
  const auto [K, B, S, O, I] = args.sizes;
  const bool has_bias = args.bias.data != nullptr;
  if (K * B * S * O == 0 || (I == 0 && !has_bias)) return;
  const Index num_rows = B * S, tile_rows = std::min(num_rows, max_rows);
  const Blocks<const Real> weight(args.weight, K, O, I);
  const Index tile_columns = std::min(weight.rows_per_block, max_columns);
  std::vector<Real> z(static_cast<std::size_t>(tile_rows * tile_columns));
  Packed<Real> packed;
  for (Index m0 = 0; m0 < num_rows; m0 += tile_rows) {
    const Index rows = std::min(tile_rows, num_rows - m0);
    const Matrix<const Real> a = packed.matrix(args.activations, B, I, m0, rows, threads);
    for (Index block = 0; block < weight.num_blocks; ++block) {
      for (Index r = 0; r < weight.rows_per_block; r += tile_columns) {
        const Index columns = std::min(tile_columns, weight.rows_per_block - r);
        const Index r0 = block * weight.rows_per_block + r;
        // Z[m,(k,o)] = v[k,o] + Σ_i a[m,i] U[k,o,i]
        if (has_bias) broadcast_bias(args, rows, r0, columns, z.data());
        const Matrix<const Real> u = weight.rows_from(block, r);
        gemm<Real>(Op::none, Op::transpose, rows, columns, I, a.data, a.leading, u.data, u.leading, has_bias, z.data(),
                   columns, threads);
        contract(args, m0, rows, r0, columns, z.data(), threads);
      }
    }
  }
}

template void grad_dot(const GradDot<float>&, int);
template void grad_dot(const GradDot<double>&, int);

}  // namespace dit_fast::cpu
