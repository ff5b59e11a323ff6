#include "cpu/model_rows.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/clones.h"

namespace dit_fast::cpu {
namespace {

// A width that is known to the compiler where it is a usual one, so that the inner loops become vectors.
template <class Loop>
[[gnu::always_inline]] inline void with_width(Index width, Loop loop) {
  switch (width) {
    case 1:
      return loop([] { return Index(1); });
    case 8:
      return loop([] { return Index(8); });
    case 16:
      return loop([] { return Index(16); });
    default:
      return loop([width] { return width; });
  }
}

template <class Real>
[[gnu::always_inline]] inline void fill_loop(Index B, Index K, Index O, const Real* row, const Real* shift,
                                             Real* __restrict z) {
  with_width(O, [&](auto width) __attribute__((always_inline)) {
    for (Index b = 0; b < B; ++b)
      for (Index k = 0; k < K; ++k)
        for (Index o = 0; o < width(); ++o)
          z[(b * K + k) * width() + o] = row[b * width() + o] + (shift ? shift[k * width() + o] : 0);
  });
}

template <class Real>
[[gnu::always_inline]] inline void add_loop(Index B, Index K, Index O, const Real* row, const Real* shift,
                                            Real* __restrict z) {
  for (Index b = 0; shift && b < B; ++b)
    for (Index j = 0; j < K * O; ++j) z[b * K * O + j] += shift[j];
  with_width(O, [=](auto width) __attribute__((always_inline)) {
    Real* __restrict to = z;
    for (Index b = 0; b < B; ++b)
      for (Index k = 0; k < K; ++k)
        for (Index o = 0; o < width(); ++o) to[(b * K + k) * width() + o] += row[b * width() + o];
  });
}

template <class Real>
[[gnu::always_inline]] inline void subtract_loop(Index B, Index K, Index O, const Real* row, Real* __restrict z) {
  with_width(O, [&](auto width) __attribute__((always_inline)) {
    for (Index b = 0; b < B; ++b)
      for (Index k = 0; k < K; ++k)
        for (Index o = 0; o < width(); ++o) z[(b * K + k) * width() + o] -= row[b * width() + o];
  });
}

// What exp needs of a type: bits of its integer twin, size of the mantissa, where results stay normal numbers.
template <class Real>
struct ExpOf;
template <>
struct ExpOf<float> {
  using Bits = std::uint32_t;
  static constexpr int mantissa = 23, degree = 7;
  static constexpr float magic = 12582912.0f, largest = 87, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct ExpOf<double> {
  using Bits = std::uint64_t;
  static constexpr int mantissa = 52, degree = 13;
  static constexpr double magic = 6755399441055744.0, largest = 708, ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
};

// exp for loops that are to become vectors, to a few units in the last place; beyond ±largest that of ±largest.
template <class Real>
[[gnu::always_inline]] inline Real vector_exp(Real x) {
  using Of = ExpOf<Real>;
  x = x > Of::largest ? Of::largest : x;
  x = x < -Of::largest ? -Of::largest : x;
  // x = n ln 2 + r; adding and taking away 1.5 · 2^mantissa rounds to an integer, which then stands in the low bits
  const Real shifted = x * Real(1.44269504088896340736) + Of::magic, n = shifted - Of::magic;
  const Real r = (x - n * Of::ln2_high) - n * Of::ln2_low;
  Real p = 1;
#pragma GCC unroll 16
  for (int i = Of::degree; i > 0; --i) p = p * r * (Real(1) / Real(i)) + 1;
  typename Of::Bits exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << Of::mantissa;
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

template <class Real>
[[gnu::always_inline]] inline void bce_loop(Index K, Index O, Real scale, const Real* y, const Real* target,
                                            Real* __restrict d) {
  with_width(O, [&](auto width) __attribute__((always_inline)) {
    for (Index k = 0; k < K; ++k)
      for (Index o = 0; o < width(); ++o)
        d[k * width() + o] = scale * (1 / (1 + vector_exp(-y[k * width() + o])) - target[o]);
  });
}

template <class Real>
[[gnu::always_inline]] inline void multiply_loop(Index n, const Real* y, Real* __restrict x) {
  for (Index i = 0; i < n; ++i) x[i] *= y[i];
}

// Eight elements; the compiler splits them where the machine's registers are narrower.
template <class Real>
struct Eight {
  typedef Real type __attribute__((vector_size(8 * sizeof(Real))));
};

template <class Vector, class Real>
[[gnu::always_inline]] inline void load(const Real* from, Vector& value) {
  std::memcpy(&value, from, sizeof value);
}

template <class Real>
[[gnu::always_inline]] inline void forward_loop(Index B, Index K, Index O, Index inputs, const Real* h, const Real* w,
                                                Real* z) {
  using Vector = typename Eight<Real>::type;
  with_width(inputs, [=](auto width) mutable __attribute__((always_inline)) {
    const Index I = width();
    for (Index b = 0; b < B; ++b)
      for (Index k = 0; k < K; ++k, h += I)
        for (Index o = 0; o < O; ++o, ++z) {
          const Real* weight = w + (k * O + o) * I;
          Real sum = 0;
          Index i = 0;
          if (I >= 8) {
            Vector sums = {}, x, y;
            for (; i + 8 <= I; i += 8) {
              load(h + i, x);
              load(weight + i, y);
              sums += x * y;
            }
            sums += __builtin_shufflevector(sums, sums, 4, 5, 6, 7, 0, 1, 2, 3);
            sums += __builtin_shufflevector(sums, sums, 2, 3, 0, 1, 6, 7, 4, 5);
            sum = sums[0] + sums[1];
          }
          for (; i < I; ++i) sum += h[i] * weight[i];
          *z += sum;
        }
  });
}

// to[i] += scale from[i], i < n, or = without Keep
template <bool Keep, class Real>
[[gnu::always_inline]] inline void add_row(Index n, Real scale, const Real* from, Real* to) {
  using Vector = typename Eight<Real>::type;
  Index i = 0;
  for (; i + 8 <= n; i += 8) {
    Vector x, sum = {};
    load(from + i, x);
    if (Keep) load(to + i, sum);
    sum += scale * x;
    std::memcpy(to + i, &sum, sizeof sum);
  }
  for (; i < n; ++i) to[i] = (Keep ? to[i] : 0) + scale * from[i];
}

template <class Real>
[[gnu::always_inline]] inline void backward_loop(Index B, Index K, Index O, Index inputs, const Real* d, const Real* w,
                                                 Real* below) {
  with_width(inputs, [=](auto width) mutable __attribute__((always_inline)) {
    const Index I = width();
    for (Index b = 0; b < B; ++b)
      for (Index k = 0; k < K; ++k, below += I, d += O) {
        add_row<false>(I, d[0], w + k * O * I, below);
        for (Index o = 1; o < O; ++o) add_row<true>(I, d[o], w + (k * O + o) * I, below);
      }
  });
}

template <class Real>
[[gnu::always_inline]] inline void gradient_loop(Index B, Index K, Index O, Index inputs, const Real* d, const Real* h,
                                                 Real* g) {
  with_width(inputs, [=](auto width) mutable __attribute__((always_inline)) {
    const Index I = width();
    for (Index b = 0; b < B; ++b)
      for (Index k = 0; k < K; ++k, h += I, d += O)
        for (Index o = 0; o < O; ++o) add_row<true>(I, d[o], h, g + (k * O + o) * I);
  });
}

template <class Real>
[[gnu::always_inline]] inline void sgd_loop(Index n, const SgdRule<Real>& rule, const Real* g, Real* m,
                                            Real* __restrict d) {
  if (!m) {
    for (Index i = 0; i < n; ++i) sgd_step(rule, g[i], d[i]);
    return;
  }
  for (Index i = 0; i < n; ++i) momentum_step(rule, g[i], m[i], d[i]);
}

}  // namespace

// target_clones works on plain functions alone, so that each loop is named once per type.
#define DIT_FAST_FOR_EACH_REAL(Real)                                                                                \
  namespace {                                                                                                       \
  DIT_FAST_CLONES void fill_clones(Index B, Index K, Index O, const Real* row, const Real* shift, Real* z) {        \
    fill_loop(B, K, O, row, shift, z);                                                                              \
  }                                                                                                                 \
  DIT_FAST_CLONES void add_clones(Index B, Index K, Index O, const Real* row, const Real* shift, Real* z) {         \
    add_loop(B, K, O, row, shift, z);                                                                               \
  }                                                                                                                 \
  DIT_FAST_CLONES void subtract_clones(Index B, Index K, Index O, const Real* row, Real* z) {                       \
    subtract_loop(B, K, O, row, z);                                                                                 \
  }                                                                                                                 \
  DIT_FAST_CLONES void bce_clones(Index K, Index O, Real scale, const Real* y, const Real* target, Real* d) {       \
    bce_loop(K, O, scale, y, target, d);                                                                            \
  }                                                                                                                 \
  DIT_FAST_CLONES void multiply_clones(Index n, const Real* y, Real* x) {                                           \
    multiply_loop(n, y, x);                                                                                         \
  }                                                                                                                 \
  DIT_FAST_CLONES void forward_clones(Index B, Index K, Index O, Index I, const Real* h, const Real* w, Real* z) {  \
    forward_loop(B, K, O, I, h, w, z);                                                                              \
  }                                                                                                                 \
  DIT_FAST_CLONES void backward_clones(Index B, Index K, Index O, Index I, const Real* d, const Real* w, Real* z) { \
    backward_loop(B, K, O, I, d, w, z);                                                                             \
  }                                                                                                                 \
  DIT_FAST_CLONES void gradient_clones(Index B, Index K, Index O, Index I, const Real* d, const Real* h, Real* g) { \
    gradient_loop(B, K, O, I, d, h, g);                                                                             \
  }                                                                                                                 \
  DIT_FAST_CLONES void sgd_clones(Index n, const SgdRule<Real>& rule, const Real* g, Real* m, Real* d) {            \
    sgd_loop(n, rule, g, m, d);                                                                                     \
  }                                                                                                                 \
  }

DIT_FAST_FOR_EACH_REAL(float)
DIT_FAST_FOR_EACH_REAL(double)
#undef DIT_FAST_FOR_EACH_REAL

template <class Real>
void fill_rows(Index B, Index K, Index O, const Real* row, const Real* shift, Real* z) {
  fill_clones(B, K, O, row, shift, z);
}

template <class Real>
void add_rows(Index B, Index K, Index O, const Real* row, const Real* shift, Real* z) {
  add_clones(B, K, O, row, shift, z);
}

template <class Real>
void subtract_rows(Index B, Index K, Index O, const Real* row, Real* z) {
  subtract_clones(B, K, O, row, z);
}

template <class Real>
void bce_gradients(Index K, Index O, Real scale, const Real* y, const Real* target, Real* d) {
  bce_clones(K, O, scale, y, target, d);
}

template <class Real>
void multiply_all(Index n, const Real* y, Real* x) {
  multiply_clones(n, y, x);
}

template <class Real>
void layer_forward(Index B, Index K, Index O, Index I, const Real* h, const Real* w, Real* z) {
  forward_clones(B, K, O, I, h, w, z);
}

template <class Real>
void layer_backward(Index B, Index K, Index O, Index I, const Real* d, const Real* w, Real* below) {
  backward_clones(B, K, O, I, d, w, below);
}

template <class Real>
void layer_gradient(Index B, Index K, Index O, Index I, const Real* d, const Real* h, Real* g) {
  gradient_clones(B, K, O, I, d, h, g);
}

template <class Real>
void apply_sgd(Index n, const SgdRule<Real>& rule, const Real* g, Real* m, Real* d) {
  sgd_clones(n, rule, g, m, d);
}

#define DIT_FAST_INSTANTIATE(Real)                                                           \
  template void fill_rows(Index, Index, Index, const Real*, const Real*, Real*);             \
  template void add_rows(Index, Index, Index, const Real*, const Real*, Real*);              \
  template void subtract_rows(Index, Index, Index, const Real*, Real*);                      \
  template void bce_gradients(Index, Index, Real, const Real*, const Real*, Real*);          \
  template void multiply_all(Index, const Real*, Real*);                                     \
  template void layer_forward(Index, Index, Index, Index, const Real*, const Real*, Real*);  \
  template void layer_backward(Index, Index, Index, Index, const Real*, const Real*, Real*); \
  template void layer_gradient(Index, Index, Index, Index, const Real*, const Real*, Real*); \
  template void apply_sgd(Index, const SgdRule<Real>&, const Real*, Real*, Real*);

DIT_FAST_INSTANTIATE(float)
DIT_FAST_INSTANTIATE(double)
#undef DIT_FAST_INSTANTIATE

}  // namespace dit_fast::cpu
