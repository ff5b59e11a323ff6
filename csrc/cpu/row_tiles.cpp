#include "cpu/row_tiles.h"

#include <algorithm>
#include <vector>

#include "cpu/clones.h"
#include "cpu/small_gemm.h"

namespace dit_fast::cpu {
namespace {

// Kept from call to call: a megabyte from the system costs its page faults each time.
template <class T, int use>
T* scratch(Index size) {
  thread_local std::vector<T> memory;
  if (memory.size() < static_cast<std::size_t>(size)) memory.resize(static_cast<std::size_t>(size));
  return memory.data();
}

// small_gemm stays in this thread, so that large products are left to the BLAS where there are threads.
template <class Real>
void multiply(Op op_a, Op op_b, Index m, Index n, Index k, const Real* a, Index lda, const Real* b, Index ldb,
              Real beta, Real* c, Index ldc, int threads) {
  if (threads > 1 && m * n * k > Index(1) << 19)
    gemm(op_a, op_b, m, n, k, a, lda, b, ldb, beta, c, ldc, threads);
  else
    product(op_a, op_b, m, n, k, a, lda, b, ldb, beta, c, ldc, threads);
}

// Sample rows m0 … m0 + num_m against columns r0 … r0 + num_r of (k, o); data[(m − m0) ld + r − r0].
template <class T>
struct Panel {
  T* data;
  Index ld, m0, num_m, r0, num_r;
};

constexpr Index chunk = 64;

// w[o] = Σ_r c[r] δ_r[o] rounded once, sums[o] += the same unrounded; rows of δ lie `stride` apart.
template <class Real>
[[gnu::always_inline]] inline void weigh_outputs(Index n, Index R, const double* c, const Real* delta, Index stride,
                                                 Real* w, double* sums) {
  if (R == 1) {
    for (Index o = 0; o < n; ++o) {
      const double x = weighted(c[0], delta[o]);
      w[o] = static_cast<Real>(x);
      sums[o] += x;
    }
    return;
  }
  for (Index o0 = 0; o0 < n; o0 += chunk) {
    const Index num = std::min(chunk, n - o0);
    double x[chunk] = {};
    for (Index r = 0; r < R; ++r)
      for (Index o = 0; o < num; ++o) x[o] += weighted(c[r], delta[r * stride + o0 + o]);
    for (Index o = 0; o < num; ++o) {
      w[o0 + o] = static_cast<Real>(x[o]);
      sums[o0 + o] += x[o];
    }
  }
}

// W[m,(k,o)] = Σ_r c[k,b,r] δ[b,r,s,o], and sums[(k,o)] += Σ_m of it.
template <class Real>
[[gnu::always_inline]] inline void weigh_panel(const Rows<const double>& coefficients, const Samples<Real>& samples,
                                               Index O, const Panel<Real>& w, double* sums) {
  for (Index m = w.m0; m < w.m0 + w.num_m; ++m) {
    const Index b = m / samples.S, s = m - b * samples.S;
    const Real* delta = samples.delta.at(b, 0, s);
    Real* to = w.data + (m - w.m0) * w.ld;
    for (Index r = w.r0, end = w.r0 + w.num_r, k = r / O; r < end; ++k) {
      const Index last = std::min(end, (k + 1) * O);
      weigh_outputs(last - r, samples.R, coefficients.at(k, b), delta + r - k * O, samples.delta.row_stride,
                    to + r - w.r0, sums + r - w.r0);
      r = last;
    }
  }
}

DIT_FAST_CLONES void weigh(const Rows<const double>& coefficients, const Samples<float>& samples, Index O,
                           const Panel<float>& w, double* sums) {
  weigh_panel(coefficients, samples, O, w, sums);
}

DIT_FAST_CLONES void weigh(const Rows<const double>& coefficients, const Samples<double>& samples, Index O,
                           const Panel<double>& w, double* sums) {
  weigh_panel(coefficients, samples, O, w, sums);
}

// Σ_o δ_o (z_o + v_o) in double. Partial sums vectorise without leave to reorder additions (-ffast-math).
template <bool has_bias, class Real>
[[gnu::always_inline]] inline double sum_terms(Index n, const Real* delta, const Real* z, const Real* v) {
  constexpr Index lanes = 16;
  const auto term = [&](Index o) { return dot_term(delta[o], has_bias ? z[o] + v[o] : z[o]); };
  double sum = 0;
  Index o = 0;
  if (n >= lanes) {
    double sums[lanes] = {};
    for (; o + lanes <= n; o += lanes)
      for (Index l = 0; l < lanes; ++l) sums[l] += term(o + l);
    for (Index half = lanes / 2; half > 0; half /= 2)
      for (Index l = 0; l < half; ++l) sums[l] += sums[l + half];
    sum = sums[0];
  }
  for (; o < n; ++o) sum += term(o);
  return sum;
}

// dots[k,b,r] += Σ_{s,o} δ[b,r,s,o] (z + v) for one sample and the columns of the panel.
template <bool has_bias, class Real>
[[gnu::always_inline]] inline void contract_panel(const Rows<double>& dots, const Samples<Real>& samples, Index b,
                                                  const Directions<const Real>& of, const Panel<const Real>& z) {
  const Index S = samples.S, O = of.O, R = samples.R, end = z.r0 + z.num_r;
  for (Index m = std::max(z.m0, b * S); m < std::min(z.m0 + z.num_m, (b + 1) * S); ++m) {
    const Real* delta = samples.delta.at(b, 0, m - b * S);
    const Real* from = z.data + (m - z.m0) * z.ld;
    for (Index r = z.r0, k = r / O; r < end; ++k) {
      const Index last = std::min(end, (k + 1) * O), o = r - k * O;
      const Real* v = has_bias ? of.bias.at(0, k) + o : nullptr;
      double* to = dots.at(k, b);
      for (Index row = 0; row < R; ++row)
        to[row] += sum_terms<has_bias>(last - r, delta + row * samples.delta.row_stride + o, from + r - z.r0, v);
      r = last;
    }
  }
}

DIT_FAST_CLONES void contract_sample(const Rows<double>& dots, const Samples<float>& samples, Index b,
                                     const Directions<const float>& of, const Panel<const float>& z) {
  if (of.bias.data) return contract_panel<true>(dots, samples, b, of, z);
  contract_panel<false>(dots, samples, b, of, z);
}

DIT_FAST_CLONES void contract_sample(const Rows<double>& dots, const Samples<double>& samples, Index b,
                                     const Directions<const double>& of, const Panel<const double>& z) {
  if (of.bias.data) return contract_panel<true>(dots, samples, b, of, z);
  contract_panel<false>(dots, samples, b, of, z);
}

template <class Real>
void contract(const Rows<double>& dots, const Samples<Real>& samples, const Directions<const Real>& of,
              const Panel<const Real>& z, int threads) {
  const Index b0 = z.m0 / samples.S, num_b = (z.m0 + z.num_m - 1) / samples.S - b0 + 1;
  const Index k0 = z.r0 / of.O, num_k = (z.r0 + z.num_r - 1) / of.O - k0 + 1;
  if (threads == 1 || num_b * num_k == 1 || z.num_m * z.num_r * samples.R <= parallel_from) {
    for (Index b = b0; b < b0 + num_b; ++b) contract_sample(dots, samples, b, of, z);
    return;
  }
  // each pair (k, b) is one thread's: the sum's order does not depend on the number of threads
#pragma omp parallel for collapse(2) num_threads(threads)
  for (Index b = b0; b < b0 + num_b; ++b) {
    for (Index k = k0; k < k0 + num_k; ++k) {
      const Index first = std::max(z.r0, k * of.O), last = std::min(z.r0 + z.num_r, (k + 1) * of.O);
      contract_sample(dots, samples, b, of, {z.data + first - z.r0, z.ld, z.m0, z.num_m, first, last - first});
    }
  }
}

template <class Real>
void weigh(const Rows<const double>& coefficients, const Samples<Real>& samples, Index O, const Panel<Real>& w,
           double* sums, int threads) {
  if (threads == 1 || w.num_m * w.num_r * samples.R <= parallel_from) return weigh(coefficients, samples, O, w, sums);
  // pieces of columns, so that each sum over m is one thread's
  const Index num_pieces = (w.num_r + chunk - 1) / chunk;
#pragma omp parallel for num_threads(threads)
  for (Index piece = 0; piece < num_pieces; ++piece) {
    const Index at = piece * chunk;
    weigh(coefficients, samples, O, {w.data + at, w.ld, w.m0, w.num_m, w.r0 + at, std::min(chunk, w.num_r - at)},
          sums + at);
  }
}

template <class Real>
void scale_rows(double alpha, const RowTile<Real>& tile) {
  for (Index r = 0; r < tile.count; ++r) {
    Real* row = tile.weight.data + r * tile.weight.leading;
    for (Index i = 0; i < tile.of.I; ++i) row[i] = scale_and_add(alpha, row[i], 0.0);
  }
}

}  // namespace

template <class Real>
void update_tile(double alpha, const Rows<const double>& coefficients, const Samples<Real>& samples,
                 const Matrix<const Real>& a, const RowTile<Real>& tile, int threads) {
  const Index num_rows = samples.B * samples.S, step = std::min(num_rows, max_sample_rows);
  const auto& [K, O, I, weight, bias] = tile.of;
  double* sums = scratch<double, 0>(tile.count);
  std::fill_n(sums, tile.count, 0.0);
  if (num_rows == 0 && alpha != 1) scale_rows(alpha, tile);
  Real* w = scratch<Real, 1>(step * tile.count);
  for (Index m0 = 0; m0 < num_rows; m0 += step) {
    const Index rows = std::min(step, num_rows - m0);
    weigh(coefficients, samples, O, Panel<Real>{w, tile.count, m0, rows, tile.first, tile.count}, sums, threads);
    // U[(k,o),i] = alpha U[(k,o),i] + Σ_m W[m,(k,o)] a[m,i]
    multiply<Real>(Op::transpose, Op::none, tile.count, I, rows, w, tile.count, a.data + m0 * a.leading, a.leading,
                   m0 == 0 ? static_cast<Real>(alpha) : Real(1), tile.weight.data, tile.weight.leading, threads);
  }
  if (!bias.data) return;
  for (Index r = 0; r < tile.count; ++r) {
    const Index k = (tile.first + r) / O;
    Real& v = bias.at(0, k)[tile.first + r - k * O];
    v = scale_and_add(alpha, v, sums[r]);
  }
}

template <class Real>
void dot_tile(const Rows<double>& dots, const Samples<Real>& samples, const Matrix<const Real>& a,
              const RowTile<const Real>& tile, int threads) {
  const Index num_rows = samples.B * samples.S, step = std::min(num_rows, max_sample_rows), I = tile.of.I;
  Real* z = scratch<Real, 2>(step * tile.count);
  for (Index m0 = 0; m0 < num_rows; m0 += step) {
    const Index rows = std::min(step, num_rows - m0);
    // Z[m,(k,o)] = Σ_i a[m,i] U[k,o,i]
    multiply<Real>(Op::none, Op::transpose, rows, tile.count, I, a.data + m0 * a.leading, a.leading, tile.weight.data,
                   tile.weight.leading, Real(0), z, tile.count, threads);
    contract(dots, samples, tile.of, Panel<const Real>{z, tile.count, m0, rows, tile.first, tile.count}, threads);
  }
}

template void update_tile(double, const Rows<const double>&, const Samples<float>&, const Matrix<const float>&,
                          const RowTile<float>&, int);
template void update_tile(double, const Rows<const double>&, const Samples<double>&, const Matrix<const double>&,
                          const RowTile<double>&, int);
template void dot_tile(const Rows<double>&, const Samples<float>&, const Matrix<const float>&,
                       const RowTile<const float>&, int);
template void dot_tile(const Rows<double>&, const Samples<double>&, const Matrix<const double>&,
                       const RowTile<const double>&, int);

}  // namespace dit_fast::cpu
