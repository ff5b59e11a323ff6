#include "cpu/elementwise.h"

#include <algorithm>
#include <cstring>

#include "cpu/clones.h"

namespace dit_fast::cpu {
namespace {

// Rows of fewer outputs than this are repeated for all columns, so that the inner loop is long enough to vectorise.
constexpr Index long_row = 32, pattern_size = 1024;

template <Activation A, class Real>
[[gnu::always_inline]] inline void activate_loop(Real slope, Index n, Real* z, Real* first, Real* second) {
  for (Index i = 0; i < n; ++i) {
    const ActivationValues<Real> at = activate(A, slope, z[i]);
    z[i] = at.value;
    first[i] = at.first;
    if (!piecewise_linear(A)) second[i] = at.second;
  }
}

template <class Real>
[[gnu::always_inline]] inline void activate_any(Activation activation, Real slope, Index n, Real* z, Real* first,
                                                Real* second) {
  switch (activation) {
    case Activation::identity:
      return activate_loop<Activation::identity>(slope, n, z, first, second);
    case Activation::relu:
      return activate_loop<Activation::relu>(slope, n, z, first, second);
    case Activation::leaky_relu:
      return activate_loop<Activation::leaky_relu>(slope, n, z, first, second);
    case Activation::tanh:
      return activate_loop<Activation::tanh>(slope, n, z, first, second);
    case Activation::sigmoid:
      return activate_loop<Activation::sigmoid>(slope, n, z, first, second);
    case Activation::silu:
      return activate_loop<Activation::silu>(slope, n, z, first, second);
    case Activation::gelu:
      return activate_loop<Activation::gelu>(slope, n, z, first, second);
    case Activation::gelu_tanh:
      return activate_loop<Activation::gelu_tanh>(slope, n, z, first, second);
  }
}

// row [O] repeated `times` times, by doubling.
template <class Real>
[[gnu::always_inline]] inline void repeat(Index O, Index times, const Real* row, Real* pattern) {
  std::copy_n(row, O, pattern);
  for (Index have = 1; have < times;) {
    const Index more = std::min(have, times - have);
    std::copy_n(pattern, more * O, pattern + have * O);
    have += more;
  }
}

// Rows of exactly O outputs, each in one vector.
template <Index O, class Real>
struct Row {
  typedef Real type __attribute__((vector_size(O * sizeof(Real))));
};

template <class Vector, class Real>
[[gnu::always_inline]] inline void load(const Real* from, Vector& value) {
  std::memcpy(&value, from, sizeof value);
}

template <Index O, class Real>
[[gnu::always_inline]] inline void multiply_rows_of(Index B, Index K, const Real* row, const Real* z, Real* out) {
  using Vector = typename Row<O, Real>::type;
  for (Index b = 0; b < B; ++b, row += O) {
    Vector r, product;
    load(row, r);
    for (Index k = 0; k < K; ++k, z += O, out += O) {
      load(z, product);
      product *= r;
      std::memcpy(out, &product, sizeof product);
    }
  }
}

template <Index O, class Real>
[[gnu::always_inline]] inline void combine_rows_of(Index B, Index K, const Real* first, const Real* curve,
                                                   const Real* z, Real* g) {
  using Vector = typename Row<O, Real>::type;
  for (Index b = 0; b < B; ++b, first += O, curve += O) {
    Vector f, c, sum, tangent;
    load(first, f);
    load(curve, c);
    for (Index k = 0; k < K; ++k, z += O, g += O) {
      load(g, sum);
      load(z, tangent);
      sum = f * sum + c * tangent;
      std::memcpy(g, &sum, sizeof sum);
    }
  }
}

template <class Real>
[[gnu::always_inline]] inline void multiply_rows_loop(Index B, Index K, Index O, const Real* row, const Real* z,
                                                      Real* out) {
  if (K == 1) {
    for (Index i = 0; i < B * O; ++i) out[i] = row[i] * z[i];
    return;
  }
  if (O == 8) return multiply_rows_of<8>(B, K, row, z, out);
  if (O == 16) return multiply_rows_of<16>(B, K, row, z, out);
  Real pattern[pattern_size];
  const Index times = std::min(K, pattern_size / O + (O > pattern_size));
  for (Index b = 0; b < B; ++b, row += O, z += K * O, out += K * O) {
    if (O == 1) {
      const Real r = row[0];
      for (Index k = 0; k < K; ++k) out[k] = r * z[k];
    } else if (O >= long_row) {
      for (Index k = 0; k < K; ++k)
        for (Index o = 0; o < O; ++o) out[k * O + o] = row[o] * z[k * O + o];
    } else {
      repeat(O, times, row, pattern);
      for (Index k = 0; k < K; k += times) {
        const Index n = std::min(times, K - k) * O;
        for (Index j = 0; j < n; ++j) out[k * O + j] = pattern[j] * z[k * O + j];
      }
    }
  }
}

template <class Real>
[[gnu::always_inline]] inline void combine_rows_loop(Index B, Index K, Index O, const Real* first, const Real* curve,
                                                     const Real* z, Real* g) {
  if (K == 1) {
    for (Index i = 0; i < B * O; ++i) g[i] = first[i] * g[i] + curve[i] * z[i];
    return;
  }
  if (O == 8) return combine_rows_of<8>(B, K, first, curve, z, g);
  if (O == 16) return combine_rows_of<16>(B, K, first, curve, z, g);
  Real first_pattern[pattern_size], curve_pattern[pattern_size];
  const Index times = std::min(K, pattern_size / O + (O > pattern_size));
  for (Index b = 0; b < B; ++b, first += O, curve += O, z += K * O, g += K * O) {
    if (O == 1) {
      const Real f = first[0], c = curve[0];
      for (Index k = 0; k < K; ++k) g[k] = f * g[k] + c * z[k];
    } else if (O >= long_row) {
      for (Index k = 0; k < K; ++k)
        for (Index o = 0; o < O; ++o) g[k * O + o] = first[o] * g[k * O + o] + curve[o] * z[k * O + o];
    } else {
      repeat(O, times, first, first_pattern);
      repeat(O, times, curve, curve_pattern);
      for (Index k = 0; k < K; k += times) {
        const Index n = std::min(times, K - k) * O;
        for (Index j = 0; j < n; ++j) g[k * O + j] = first_pattern[j] * g[k * O + j] + curve_pattern[j] * z[k * O + j];
      }
    }
  }
}

template <class Real>
[[gnu::always_inline]] inline void shift_loop(Index B, Index n, Real scale, Real bias_scale, const Real* bias,
                                              Real* z) {
  for (Index b = 0; b < B; ++b, z += n) {
    if (bias)
      for (Index j = 0; j < n; ++j) z[j] = scale * z[j] + bias_scale * bias[j];
    else if (scale != 1)
      for (Index j = 0; j < n; ++j) z[j] *= scale;
  }
}

template <class Real>
[[gnu::always_inline]] inline void row_sums_loop(Index B, Index n, Real keep, const Real* d, Real* out) {
  for (Index j = 0; j < n; ++j) out[j] *= keep;
  for (Index b = 0; b < B; ++b, d += n)
    for (Index j = 0; j < n; ++j) out[j] += d[j];
}

template <class Real>
[[gnu::always_inline]] inline double inner_loop(Index n, const Real* x, const Real* y) {
  // eight partial sums vectorise without leave to reorder additions (-ffast-math)
  double sums[8] = {}, rest = 0;
  Index i = 0;
  for (; i + 8 <= n; i += 8)
    for (int l = 0; l < 8; ++l) sums[l] += dot_term(x[i + l], y[i + l]);
  for (; i < n; ++i) rest += dot_term(x[i], y[i]);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7])) + rest;
}

template <class Real>
[[gnu::always_inline]] inline void products_loop(Index I, Index K, Index O, const Real* u, Index stride, const Real* w,
                                                 double* sums) {
  Real row[pattern_size];
  for (Index o0 = 0; o0 < O; o0 += pattern_size) {
    const Index count = std::min(pattern_size, O - o0);
    for (Index i = 0; i < I; ++i) {
      for (Index o = 0; o < count; ++o) row[o] = w[(o0 + o) * I + i];
      for (Index k = 0; k < K; ++k)
        for (Index o = 0; o < count; ++o) sums[k * O + o0 + o] += dot_term(u[i * stride + k * O + o0 + o], row[o]);
    }
  }
}

template <class Real>
[[gnu::always_inline]] inline void row_dots_loop(Index B, Index K, Index O, const Real* row, const Real* z,
                                                 double* dots) {
  for (Index b = 0; b < B; ++b, row += O, z += K * O, dots += K) {
    if (O == 1) {
      for (Index k = 0; k < K; ++k) dots[k] += dot_term(row[0], z[k]);
    } else if (O < 8) {
      for (Index k = 0; k < K; ++k)
        for (Index o = 0; o < O; ++o) dots[k] += dot_term(row[o], z[k * O + o]);
    } else {
      for (Index k = 0; k < K; ++k) dots[k] += inner_loop(O, row, z + k * O);
    }
  }
}

template <class Real>
[[gnu::always_inline]] inline void momentum_loop(Index n, const SgdRule<Real>& rule, Real* u, Real* m, Real* c) {
  for (Index i = 0; i < n; ++i) c[i] = adjoint_step(rule, u[i], m[i]);
}

template <class Real>
[[gnu::always_inline]] inline void add_loop(Index n, Real scale, const Real* x, Real* y) {
  for (Index i = 0; i < n; ++i) y[i] += scale * x[i];
}

template <class Real>
[[gnu::always_inline]] inline void scale_loop(Index n, Real scale, const Real* x, Real* y) {
  for (Index i = 0; i < n; ++i) y[i] = scale * x[i];
}

}  // namespace

// target_clones works on plain functions alone, so that each loop is named once per type.
#define DIT_FAST_FOR_EACH_REAL(Real)                                                                                  \
  namespace {                                                                                                         \
  DIT_FAST_CLONES void activate_clones(Activation a, Real slope, Index n, Real* z, Real* first, Real* second) {       \
    activate_any(a, slope, n, z, first, second);                                                                      \
  }                                                                                                                   \
  DIT_FAST_CLONES void multiply_clones(Index B, Index K, Index O, const Real* row, const Real* z, Real* out) {        \
    multiply_rows_loop(B, K, O, row, z, out);                                                                         \
  }                                                                                                                   \
  DIT_FAST_CLONES void combine_clones(Index B, Index K, Index O, const Real* first, const Real* curve, const Real* z, \
                                      Real* g) {                                                                      \
    combine_rows_loop(B, K, O, first, curve, z, g);                                                                   \
  }                                                                                                                   \
  DIT_FAST_CLONES void shift_clones(Index B, Index n, Real scale, Real bias_scale, const Real* bias, Real* z) {       \
    shift_loop(B, n, scale, bias_scale, bias, z);                                                                     \
  }                                                                                                                   \
  DIT_FAST_CLONES void row_sums_clones(Index B, Index n, Real keep, const Real* d, Real* out) {                       \
    row_sums_loop(B, n, keep, d, out);                                                                                \
  }                                                                                                                   \
  DIT_FAST_CLONES double inner_clones(Index n, const Real* x, const Real* y) {                                        \
    return inner_loop(n, x, y);                                                                                       \
  }                                                                                                                   \
  DIT_FAST_CLONES void products_clones(Index I, Index K, Index O, const Real* u, Index stride, const Real* w,         \
                                       double* sums) {                                                                \
    products_loop(I, K, O, u, stride, w, sums);                                                                       \
  }                                                                                                                   \
  DIT_FAST_CLONES void row_dots_clones(Index B, Index K, Index O, const Real* row, const Real* z, double* dots) {     \
    row_dots_loop(B, K, O, row, z, dots);                                                                             \
  }                                                                                                                   \
  DIT_FAST_CLONES void momentum_clones(Index n, const SgdRule<Real>& rule, Real* u, Real* m, Real* c) {               \
    momentum_loop(n, rule, u, m, c);                                                                                  \
  }                                                                                                                   \
  DIT_FAST_CLONES void add_clones(Index n, Real scale, const Real* x, Real* y) {                                      \
    add_loop(n, scale, x, y);                                                                                         \
  }                                                                                                                   \
  DIT_FAST_CLONES void scale_clones(Index n, Real scale, const Real* x, Real* y) {                                    \
    scale_loop(n, scale, x, y);                                                                                       \
  }                                                                                                                   \
  }

DIT_FAST_FOR_EACH_REAL(float)
DIT_FAST_FOR_EACH_REAL(double)
#undef DIT_FAST_FOR_EACH_REAL

template <class Real>
void activate_all(Activation activation, Real slope, Index n, Real* z, Real* first, Real* second) {
  activate_clones(activation, slope, n, z, first, second);
}

template <class Real>
void multiply_rows(Index B, Index K, Index O, const Real* row, const Real* z, Real* out) {
  multiply_clones(B, K, O, row, z, out);
}

template <class Real>
void combine_rows(Index B, Index K, Index O, const Real* first, const Real* curve, const Real* z, Real* g) {
  combine_clones(B, K, O, first, curve, z, g);
}

template <class Real>
void scale_and_shift(Index B, Index n, Real scale, Real bias_scale, const Real* bias, Real* z) {
  shift_clones(B, n, scale, bias_scale, bias, z);
}

template <class Real>
void add_row_sums(Index B, Index n, Real keep, const Real* d, Real* out) {
  row_sums_clones(B, n, keep, d, out);
}

template <class Real>
void add_scaled(Index n, Real scale, const Real* x, Real* y) {
  add_clones(n, scale, x, y);
}

template <class Real>
void scale_to(Index n, Real scale, const Real* x, Real* y) {
  scale_clones(n, scale, x, y);
}

template <class Real>
double inner(Index n, const Real* x, const Real* y) {
  return inner_clones(n, x, y);
}

template <class Real>
void accumulate_products(Index I, Index K, Index O, const Real* u, Index stride, const Real* w, double* sums) {
  products_clones(I, K, O, u, stride, w, sums);
}

template <class Real>
void add_row_dots(Index B, Index K, Index O, const Real* row, const Real* z, double* dots) {
  row_dots_clones(B, K, O, row, z, dots);
}

template <class Real>
void apply_momentum(Index n, const SgdRule<Real>& rule, Real* u, Real* m, Real* c) {
  momentum_clones(n, rule, u, m, c);
}

#define DIT_FAST_INSTANTIATE(Real)                                                                  \
  template void activate_all(Activation, Real, Index, Real*, Real*, Real*);                         \
  template void multiply_rows(Index, Index, Index, const Real*, const Real*, Real*);                \
  template void combine_rows(Index, Index, Index, const Real*, const Real*, const Real*, Real*);    \
  template void scale_and_shift(Index, Index, Real, Real, const Real*, Real*);                      \
  template void add_row_sums(Index, Index, Real, const Real*, Real*);                               \
  template void add_scaled(Index, Real, const Real*, Real*);                                        \
  template void scale_to(Index, Real, const Real*, Real*);                                          \
  template double inner(Index, const Real*, const Real*);                                           \
  template void accumulate_products(Index, Index, Index, const Real*, Index, const Real*, double*); \
  template void add_row_dots(Index, Index, Index, const Real*, const Real*, double*);               \
  template void apply_momentum(Index, const SgdRule<Real>&, Real*, Real*, Real*);

DIT_FAST_INSTANTIATE(float)
DIT_FAST_INSTANTIATE(double)
#undef DIT_FAST_INSTANTIATE

}  // namespace dit_fast::cpu
