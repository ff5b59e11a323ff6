#include "cpu/small_gemm.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace dit_fast::cpu {
namespace {

// A 64-byte line of elements; the compiler splits it where the machine's registers are narrower.
template <class Real>
struct Line {
  typedef Real type __attribute__((vector_size(64)));
  static constexpr Index size = 64 / sizeof(Real);
};

// A as op(A)[y,l] = a[y·row + l·step]
template <class Real>
struct Left {
  const Real* a;
  Index row, step;
};

// C[R, V lines] = op(A) B + beta C, the sums in registers over all of k.
template <class Real, Index R, Index V>
[[gnu::always_inline]] inline void tile(Index k, Left<Real> left, const Real* b, Index ldb, Real beta, Real* c,
                                        Index ldc) {
  using Vector = typename Line<Real>::type;
  constexpr Index width = Line<Real>::size;
  Vector sum[R][V] = {};
  const Real* a = left.a;
  for (Index l = 0; l < k; ++l, a += left.step, b += ldb) {
    Vector line[V];
#pragma GCC unroll 4
    for (Index v = 0; v < V; ++v) std::memcpy(&line[v], b + v * width, sizeof(Vector));
#pragma GCC unroll 8
    for (Index y = 0; y < R; ++y) {
      const Real s = a[y * left.row];
#pragma GCC unroll 4
      for (Index v = 0; v < V; ++v) sum[y][v] += s * line[v];
    }
  }
#pragma GCC unroll 8
  for (Index y = 0; y < R; ++y)
#pragma GCC unroll 4
    for (Index v = 0; v < V; ++v) {
      Real* to = c + y * ldc + v * width;
      if (beta != 0) {
        Vector before;
        std::memcpy(&before, to, sizeof(Vector));
        sum[y][v] += beta * before;
      }
      std::memcpy(to, &sum[y][v], sizeof(Vector));
    }
}

// V lines of columns, all m rows.
template <class Real, Index R, Index V>
[[gnu::always_inline]] inline void strip(Index m, Index k, Left<Real> left, const Real* b, Index ldb, Real beta,
                                         Real* c, Index ldc) {
  Index y = 0;
  const auto at = [&](Index row) { return Left<Real>{left.a + row * left.row, left.row, left.step}; };
  for (; y + R <= m; y += R) tile<Real, R, V>(k, at(y), b, ldb, beta, c + y * ldc, ldc);
  if constexpr (R > 4)
    for (; y + 4 <= m; y += 4) tile<Real, 4, V>(k, at(y), b, ldb, beta, c + y * ldc, ldc);
  for (; y + 2 <= m; y += 2) tile<Real, 2, V>(k, at(y), b, ldb, beta, c + y * ldc, ldc);
  for (; y < m; ++y) tile<Real, 1, V>(k, at(y), b, ldb, beta, c + y * ldc, ldc);
}

// Whole lines of columns; n is a multiple of the line. R × V tiles leave room in the machine's registers.
template <class Real, Index R, Index V>
[[gnu::always_inline]] inline void multiply_lines(Index m, Index n, Index k, Left<Real> left, const Real* b, Index ldb,
                                                  Real beta, Real* c, Index ldc) {
  constexpr Index width = Line<Real>::size;
  Index j = 0;
  for (; j + V * width <= n; j += V * width) strip<Real, R, V>(m, k, left, b + j, ldb, beta, c + j, ldc);
  if constexpr (V > 2)
    for (; j + 2 * width <= n; j += 2 * width) strip<Real, R, 2>(m, k, left, b + j, ldb, beta, c + j, ldc);
  for (; j < n; j += width) strip<Real, R, 1>(m, k, left, b + j, ldb, beta, c + j, ldc);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DIT_FAST_LEVELS
#define DIT_FAST_V4 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#define DIT_FAST_V3 __attribute__((target("arch=x86-64-v3")))
#else
#define DIT_FAST_V4
#define DIT_FAST_V3
#endif

// The same for the machine's level: 32 registers of a line, 16 of half a line, anything.
template <class Real>
DIT_FAST_V4 void multiply_v4(Index m, Index n, Index k, Left<Real> left, const Real* b, Index ldb, Real beta, Real* c,
                             Index ldc) {
  multiply_lines<Real, 8, 3>(m, n, k, left, b, ldb, beta, c, ldc);
}

template <class Real>
DIT_FAST_V3 void multiply_v3(Index m, Index n, Index k, Left<Real> left, const Real* b, Index ldb, Real beta, Real* c,
                             Index ldc) {
  multiply_lines<Real, 6, 1>(m, n, k, left, b, ldb, beta, c, ldc);
}

template <class Real>
void multiply_any(Index m, Index n, Index k, Left<Real> left, const Real* b, Index ldb, Real beta, Real* c, Index ldc) {
  multiply_lines<Real, 2, 1>(m, n, k, left, b, ldb, beta, c, ldc);
}

int level() {
#ifdef DIT_FAST_LEVELS
  static const int found = __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
  return found;
#else
  return 1;
#endif
}

template <class Real>
void multiply(Index m, Index n, Index k, Left<Real> left, const Real* b, Index ldb, Real beta, Real* c, Index ldc) {
  if (level() == 4) return multiply_v4(m, n, k, left, b, ldb, beta, c, ldc);
  if (level() == 3) return multiply_v3(m, n, k, left, b, ldb, beta, c, ldc);
  multiply_any(m, n, k, left, b, ldb, beta, c, ldc);
}

template <class Real>
Real* buffer(Index size) {
  thread_local std::vector<Real> memory;
  if (memory.size() < static_cast<std::size_t>(size)) memory.resize(static_cast<std::size_t>(size));
  return memory.data();
}

}  // namespace

template <class Real>
void small_gemm(Op op_a, Op op_b, Index m, Index n, Index k, const Real* a, Index lda, const Real* b, Index ldb,
                Real beta, Real* c, Index ldc) {
  constexpr Index width = Line<Real>::size;
  const Left<Real> left = op_a == Op::none ? Left<Real>{a, lda, 1} : Left<Real>{a, 1, lda};
  const Index whole = n / width * width, rest = n - whole, padded = (n + width - 1) / width * width;
  if (op_b == Op::transpose) {
    // Bᵀ is made once, [k, padded]
    Real* turned = buffer<Real>(k * padded + m * width);
    for (Index j = 0; j < n; ++j)
      for (Index l = 0; l < k; ++l) turned[l * padded + j] = b[j * ldb + l];
    for (Index l = 0; l < k; ++l) std::fill_n(turned + l * padded + n, padded - n, Real(0));
    b = turned;
    ldb = padded;
  }
  if (whole) multiply(m, whole, k, left, b, ldb, beta, c, ldc);
  if (!rest) return;
  // the columns beyond the last whole line, in lines of their own
  Real *last = buffer<Real>((op_b == Op::transpose ? k * padded : k * width) + m * width), *sums;
  const Real* columns;
  if (op_b == Op::transpose) {
    columns = b + whole;
    sums = last + k * padded;
  } else {
    for (Index l = 0; l < k; ++l) {
      std::copy_n(b + l * ldb + whole, rest, last + l * width);
      std::fill_n(last + l * width + rest, width - rest, Real(0));
    }
    columns = last;
    ldb = width;
    sums = last + k * width;
  }
  multiply(m, width, k, left, columns, ldb, Real(0), sums, width);
  for (Index y = 0; y < m; ++y)
    for (Index j = 0; j < rest; ++j) {
      Real& to = c[y * ldc + whole + j];
      to = (beta == 0 ? 0 : beta * to) + sums[y * width + j];
    }
}

template void small_gemm(Op, Op, Index, Index, Index, const float*, Index, const float*, Index, float, float*, Index);
template void small_gemm(Op, Op, Index, Index, Index, const double*, Index, const double*, Index, double, double*,
                         Index);

}  // namespace dit_fast::cpu
