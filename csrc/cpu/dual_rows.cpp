#include "dual_rows.h"

#include <algorithm>

#include "cpu/clones.h"

// `to` is `from` or `tangent` itself or does not touch them, so that elements are independent
#if defined(__GNUC__) && !defined(__clang__)
#define DIT_FAST_INDEPENDENT _Pragma("GCC ivdep")
#else
#define DIT_FAST_INDEPENDENT
#endif

namespace dit_fast::cpu {
namespace {

// Below this many numbers a parallel region costs more than it saves.
constexpr Index parallel_numbers = 1 << 17;
// Numbers of a row that all its columns go through together: gate and curve then stay in the first-level cache.
constexpr Index block = 2048;

template <Activation A, class Real>
[[gnu::always_inline]] inline void values_loop(const ActivationPoints<Real>& args, Index first, Index last) {
  DIT_FAST_INDEPENDENT
  for (Index i = first; i < last; ++i) activation_values_at(A, args, i);
}

template <class Real>
[[gnu::always_inline]] inline void values_any(const ActivationPoints<Real>& args, Index first, Index last) {
  switch (args.activation) {
    case Activation::tanh:
      return values_loop<Activation::tanh>(args, first, last);
    case Activation::sigmoid:
      return values_loop<Activation::sigmoid>(args, first, last);
    case Activation::silu:
      return values_loop<Activation::silu>(args, first, last);
    case Activation::gelu:
      return values_loop<Activation::gelu>(args, first, last);
    case Activation::gelu_tanh:
      return values_loop<Activation::gelu_tanh>(args, first, last);
    default:  // piecewise linear ones need no values
      return;
  }
}

template <bool piecewise, bool curved, class Real>
[[gnu::always_inline]] inline void column_loop(Real slope, Index n, const Real* gate, const Real* curve,
                                               const Real* tangent, const Real* from, Real* to) {
  DIT_FAST_INDEPENDENT
  for (Index i = 0; i < n; ++i) {
    const Real value = gate_factor(piecewise, slope, gate[i]) * from[i];
    to[i] = curved ? value + curve[i] * tangent[i] : value;
  }
}

template <bool piecewise, bool curved, class Real>
[[gnu::always_inline]] inline void rows_loop(const ActivationColumns<Real>& args, Index first, Index last, Index start,
                                             Index end) {
  for (Index r = first; r < last; ++r)
    for (Index k = 0; k < args.K; ++k) {
      const Index row = r * args.n + start, column = (r * args.K + k) * args.n + start;
      column_loop<piecewise, curved>(static_cast<Real>(args.slope), end - start, args.gate + row,
                                     curved ? args.curve + row : nullptr, curved ? args.tangent + column : nullptr,
                                     args.from + column, args.to + column);
    }
}

// Numbers start … end − 1 of rows first … last − 1.
template <class Real>
[[gnu::always_inline]] inline void rows_any(const ActivationColumns<Real>& args, Index first, Index last, Index start,
                                            Index end) {
  if (args.piecewise) return rows_loop<true, false>(args, first, last, start, end);
  if (args.curve) return rows_loop<false, true>(args, first, last, start, end);
  rows_loop<false, false>(args, first, last, start, end);
}

DIT_FAST_CLONES void values_some(const ActivationPoints<float>& args, Index first, Index last) {
  values_any(args, first, last);
}
DIT_FAST_CLONES void values_some(const ActivationPoints<double>& args, Index first, Index last) {
  values_any(args, first, last);
}
DIT_FAST_CLONES void rows_some(const ActivationColumns<float>& args, Index first, Index last, Index start, Index end) {
  rows_any(args, first, last, start, end);
}
DIT_FAST_CLONES void rows_some(const ActivationColumns<double>& args, Index first, Index last, Index start, Index end) {
  rows_any(args, first, last, start, end);
}

}  // namespace

template <class Real>
void activation_values(const ActivationPoints<Real>& args, int threads) {
  if (args.size < parallel_numbers) threads = 1;
#pragma omp parallel for num_threads(threads)
  for (int i = 0; i < threads; ++i) values_some(args, args.size * i / threads, args.size * (i + 1) / threads);
}

template <class Real>
void activation_columns(const ActivationColumns<Real>& args, int threads) {
  if (args.R * args.K * args.n == 0) return;
  if (args.R * args.K * args.n < parallel_numbers) threads = 1;
  // pieces: some short rows, or a part of a long one
  const Index rows = std::max<Index>(1, block / args.n), parts = (args.n + block - 1) / block;
  const Index pieces = (args.R + rows - 1) / rows * parts;
#pragma omp parallel for num_threads(threads)
  for (Index piece = 0; piece < pieces; ++piece) {
    const Index first = piece / parts * rows, start = piece % parts * block;
    rows_some(args, first, std::min(first + rows, args.R), start, std::min(start + block, args.n));
  }
}

template <class Real>
void loss_columns(const LossColumns<Real>& args, int threads) {
  if (args.B * args.K * args.O < parallel_numbers) threads = 1;
#pragma omp parallel for num_threads(threads)
  for (Index row = 0; row < args.B * args.K; ++row) loss_column_at(args, row);
}

template void activation_values(const ActivationPoints<float>&, int);
template void activation_values(const ActivationPoints<double>&, int);
template void activation_columns(const ActivationColumns<float>&, int);
template void activation_columns(const ActivationColumns<double>&, int);
template void loss_columns(const LossColumns<float>&, int);
template void loss_columns(const LossColumns<double>&, int);

}  // namespace dit_fast::cpu
