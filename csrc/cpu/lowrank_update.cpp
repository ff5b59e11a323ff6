#include "lowrank_update.h"

#include <algorithm>
#include <vector>

#include "cpu/clones.h"
#include "cpu/gemm.h"
#include "cpu/matrix.h"

namespace dit_fast::cpu {
namespace {

// W = c·δ is formed tile by tile; a tile of 512 rows (b, s) and 1024 columns (k, o) is 2 to 4 MiB.
constexpr Index max_rows = 512, max_columns = 1024;

template <class Real>
[[gnu::always_inline]] inline void scale_elements(Index n, double coefficient, const Real* delta, Real* w) {
  for (Index o = 0; o < n; ++o) w[o] = weighted_delta(coefficient, delta[o]);
}

DIT_FAST_CLONES void scale(Index n, double coefficient, const float* delta, float* w) {
  scale_elements(n, coefficient, delta, w);
}

DIT_FAST_CLONES void scale(Index n, double coefficient, const double* delta, double* w) {
  scale_elements(n, coefficient, delta, w);
}

// W[m,(k,o)] = c[k,b] δ[b,s,o] for rows m0 … m0 + rows and columns r0 … r0 + columns.
template <class Real>
void weigh(const LowrankUpdate<Real>& args, Index m0, Index rows, Index r0, Index columns, Real* w, int threads) {
  const Index S = args.sizes.S, O = args.sizes.O;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns > parallel_from)
  for (Index m = m0; m < m0 + rows; ++m) {
    const Real* delta = args.delta.row(m);
    for (Index r = r0; r < r0 + columns;) {
      const Index k = r / O, last = std::min(r0 + columns, (k + 1) * O);
      scale(last - r, args.coefficients.row(k)[m / S], delta + r - k * O, w + (m - m0) * columns + r - r0);
      r = last;
    }
  }
}

// v[k,o] += Σ_b c[k,b] Σ_s δ[b,s,o], summed in double. The sums over s serve all columns k.
template <class Real>
void update_bias(const LowrankUpdate<Real>& args, int threads) {
  const Index K = args.sizes.K, B = args.sizes.B, S = args.sizes.S, O = args.sizes.O;
  std::vector<double> over_positions(static_cast<std::size_t>(B * O));
#pragma omp parallel for num_threads(threads) if (threads > 1 && B * S * O > parallel_from)
  for (Index b = 0; b < B; ++b) {
    double* to = over_positions.data() + b * O;
    for (Index s = 0; s < S; ++s) {
      const Real* delta = args.delta.at(b, s);
      for (Index o = 0; o < O; ++o) to[o] += static_cast<double>(delta[o]);
    }
  }
  std::vector<double> sums(static_cast<std::size_t>(K * O));
#pragma omp parallel for num_threads(threads) if (threads > 1 && K * B * O > parallel_from)
  for (Index k = 0; k < K; ++k) {
    double* sum = sums.data() + k * O;
    for (Index b = 0; b < B; ++b) {
      const double coefficient = args.coefficients.row(k)[b];
      for (Index o = 0; o < O; ++o) sum[o] += coefficient * over_positions[static_cast<std::size_t>(b * O + o)];
    }
    Real* bias = args.bias.row(k);
    for (Index o = 0; o < O; ++o) bias[o] += static_cast<Real>(sum[o]);
  }
}

}  // namespace

template <class Real>
void lowrank_update(const LowrankUpdate<Real>& args, int threads) {
  const auto [K, B, S, O, I] = args.sizes;
  if (K * B * S * O == 0) return;
  if (args.bias.data) update_bias(args, threads);
  if (I == 0) return;
  const Index num_rows = B * S, tile_rows = std::min(num_rows, max_rows);
  const Blocks<Real> weight(args.weight, K, O, I);
  const Index tile_columns = std::min(weight.rows_per_block, max_columns);
  std::vector<Real> w(static_cast<std::size_t>(tile_rows * tile_columns));
  Packed<Real> packed;
  for (Index m0 = 0; m0 < num_rows; m0 += tile_rows) {
    const Index rows = std::min(tile_rows, num_rows - m0);
    const Matrix<const Real> a = packed.matrix(args.activations, B, I, m0, rows, threads);
    for (Index block = 0; block < weight.num_blocks; ++block) {
      for (Index r = 0; r < weight.rows_per_block; r += tile_columns) {
        const Index columns = std::min(tile_columns, weight.rows_per_block - r);
        weigh(args, m0, rows, block * weight.rows_per_block + r, columns, w.data(), threads);
        // U[(k,o),i] += Σ_m W[m,(k,o)] a[m,i]
        const Matrix<Real> u = weight.rows_from(block, r);
        gemm<Real>(Op::transpose, Op::none, columns, I, rows, w.data(), columns, a.data, a.leading, 1, u.data,
                   u.leading, threads);
      }
    }
  }
}

template void lowrank_update(const LowrankUpdate<float>&, int);
template void lowrank_update(const LowrankUpdate<double>&, int);

}  // namespace dit_fast::cpu
