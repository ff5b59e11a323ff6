#include "cpu/small_gemm.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace dit_fast::cpu {
namespace {

// A line of elements, 64 bytes or half of that; the compiler splits it where the machine's registers are narrower.
template <class Real, int Bytes>
struct Line {
  typedef Real type __attribute__((vector_size(Bytes)));
  static constexpr Index size = Bytes / sizeof(Real);
};

// A as op(A)[y,l] = a[y·row + l·step]
template <class Real>
struct Left {
  const Real* a;
  Index row, step;
};

// C[R, V lines] = op(A) B + beta C, the sums in registers over all of k.
template <class Real, int Bytes, Index R, Index V>
[[gnu::always_inline]] inline void tile(Index k, Left<Real> left, const Real* b, Index ldb, Real beta, Real* c,
                                        Index ldc) {
  using Vector = typename Line<Real, Bytes>::type;
  constexpr Index width = Line<Real, Bytes>::size;
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
template <class Real, int Bytes, Index R, Index V>
[[gnu::always_inline]] inline void strip(Index m, Index k, Left<Real> left, const Real* b, Index ldb, Real beta,
                                         Real* c, Index ldc) {
  Index y = 0;
  const auto at = [&](Index row) { return Left<Real>{left.a + row * left.row, left.row, left.step}; };
  for (; y + R <= m; y += R) tile<Real, Bytes, R, V>(k, at(y), b, ldb, beta, c + y * ldc, ldc);
  if constexpr (R > 4)
    for (; y + 4 <= m; y += 4) tile<Real, Bytes, 4, V>(k, at(y), b, ldb, beta, c + y * ldc, ldc);
  for (; y + 2 <= m; y += 2) tile<Real, Bytes, 2, V>(k, at(y), b, ldb, beta, c + y * ldc, ldc);
  for (; y < m; ++y) tile<Real, Bytes, 1, V>(k, at(y), b, ldb, beta, c + y * ldc, ldc);
}

// Columns that fill lines and at most one half of a line. R × V tiles leave room in the machine's registers.
template <class Real, Index R, Index V>
[[gnu::always_inline]] inline void multiply_lines(Index m, Index n, Index k, Left<Real> left, const Real* b, Index ldb,
                                                  Real beta, Real* c, Index ldc) {
  constexpr Index width = Line<Real, 64>::size;
  Index j = 0;
  for (; j + V * width <= n; j += V * width) strip<Real, 64, R, V>(m, k, left, b + j, ldb, beta, c + j, ldc);
  if constexpr (V > 2)
    for (; j + 2 * width <= n; j += 2 * width) strip<Real, 64, R, 2>(m, k, left, b + j, ldb, beta, c + j, ldc);
  for (; j + width <= n; j += width) strip<Real, 64, R, 1>(m, k, left, b + j, ldb, beta, c + j, ldc);
  if (j < n) strip<Real, 32, R, 1>(m, k, left, b + j, ldb, beta, c + j, ldc);
}

// C[R, n] = beta C + A Bᵀ for rows of A given one by one; each sum in a line, then over it.
template <class Real, Index R, Index N>
[[gnu::always_inline]] inline void row_tile(Index k, const Real* const* a, const Real* b, Index ldb, Real beta, Real* c,
                                            Index ldc) {
  using Vector = typename Line<Real, 64>::type;
  constexpr Index width = Line<Real, 64>::size;
  Vector sum[R][N] = {};
  Index l = 0;
  for (; l + width <= k; l += width) {
    Vector left[R];
#pragma GCC unroll 4
    for (Index y = 0; y < R; ++y) std::memcpy(&left[y], a[y] + l, sizeof(Vector));
#pragma GCC unroll 4
    for (Index j = 0; j < N; ++j) {
      Vector right;
      std::memcpy(&right, b + j * ldb + l, sizeof(Vector));
#pragma GCC unroll 4
      for (Index y = 0; y < R; ++y) sum[y][j] += left[y] * right;
    }
  }
  for (Index y = 0; y < R; ++y)
    for (Index j = 0; j < N; ++j) {
      Real total = 0;
      for (Index i = 0; i < width; ++i) total += sum[y][j][i];
      for (Index i = l; i < k; ++i) total += a[y][i] * b[j * ldb + i];
      Real& to = c[y * ldc + j];
      to = (beta == 0 ? 0 : beta * to) + total;
    }
}

template <class Real>
[[gnu::always_inline]] inline void row_products_loop(Index m, Index n, Index k, const Real* a, Index lda,
                                                     const Index* rows, const Real* b, Index ldb, Real beta, Real* c) {
  Index y = 0;
  for (; y + 4 <= m; y += 4) {
    const Real* left[4] = {a + rows[y] * lda, a + rows[y + 1] * lda, a + rows[y + 2] * lda, a + rows[y + 3] * lda};
    Index j = 0;
    for (; j + 4 <= n; j += 4) row_tile<Real, 4, 4>(k, left, b + j * ldb, ldb, beta, c + y * n + j, n);
    for (; j < n; ++j) row_tile<Real, 4, 1>(k, left, b + j * ldb, ldb, beta, c + y * n + j, n);
  }
  for (; y < m; ++y) {
    const Real* left = a + rows[y] * lda;
    Index j = 0;
    for (; j + 4 <= n; j += 4) row_tile<Real, 1, 4>(k, &left, b + j * ldb, ldb, beta, c + y * n + j, n);
    for (; j < n; ++j) row_tile<Real, 1, 1>(k, &left, b + j * ldb, ldb, beta, c + y * n + j, n);
  }
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
DIT_FAST_V4 void row_products_v4(Index m, Index n, Index k, const Real* a, Index lda, const Index* rows, const Real* b,
                                 Index ldb, Real beta, Real* c) {
  row_products_loop(m, n, k, a, lda, rows, b, ldb, beta, c);
}

template <class Real>
DIT_FAST_V3 void row_products_v3(Index m, Index n, Index k, const Real* a, Index lda, const Index* rows, const Real* b,
                                 Index ldb, Real beta, Real* c) {
  row_products_loop(m, n, k, a, lda, rows, b, ldb, beta, c);
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
  constexpr Index half = Line<Real, 32>::size;
  const Left<Real> left = op_a == Op::none ? Left<Real>{a, lda, 1} : Left<Real>{a, 1, lda};
  const Index whole = n / half * half, rest = n - whole, padded = whole + (rest ? half : 0);
  const bool turn = op_b == Op::transpose;
  Real* copied = buffer<Real>((turn ? k * padded : k * half) + m * half);
  if (turn) {
    // Bᵀ is made once, [k, padded]
    for (Index j = 0; j < n; ++j)
      for (Index l = 0; l < k; ++l) copied[l * padded + j] = b[j * ldb + l];
    for (Index l = 0; rest && l < k; ++l) std::fill_n(copied + l * padded + n, padded - n, Real(0));
    b = copied;
    ldb = padded;
  }
  if (whole) multiply(m, whole, k, left, b, ldb, beta, c, ldc);
  if (!rest) return;
  // the columns beyond the last whole half of a line, filled up with zeros, and their sums aside
  if (turn) {
    b += whole;
  } else {
    for (Index l = 0; l < k; ++l) {
      for (Index j = 0; j < rest; ++j) copied[l * half + j] = b[l * ldb + whole + j];
      for (Index j = rest; j < half; ++j) copied[l * half + j] = 0;
    }
    b = copied;
    ldb = half;
  }
  Real* sums = copied + (turn ? k * padded : k * half);
  multiply(m, half, k, left, b, ldb, Real(0), sums, half);
  for (Index y = 0; y < m; ++y)
    for (Index j = 0; j < rest; ++j) {
      Real& to = c[y * ldc + whole + j];
      to = (beta == 0 ? 0 : beta * to) + sums[y * half + j];
    }
}

template <class Real>
void row_products(Index m, Index n, Index k, const Real* a, Index lda, const Index* rows, const Real* b, Index ldb,
                  Real beta, Real* c) {
  if (level() == 4) return row_products_v4(m, n, k, a, lda, rows, b, ldb, beta, c);
  if (level() == 3) return row_products_v3(m, n, k, a, lda, rows, b, ldb, beta, c);
  row_products_loop(m, n, k, a, lda, rows, b, ldb, beta, c);
}

template void row_products(Index, Index, Index, const float*, Index, const Index*, const float*, Index, float, float*);
template void row_products(Index, Index, Index, const double*, Index, const Index*, const double*, Index, double,
                           double*);
template void small_gemm(Op, Op, Index, Index, Index, const float*, Index, const float*, Index, float, float*, Index);
template void small_gemm(Op, Op, Index, Index, Index, const double*, Index, const double*, Index, double, double*,
                         Index);

}  // namespace dit_fast::cpu
