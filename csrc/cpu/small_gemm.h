// The product of gemm.h for operands that fit the caches: tiles in registers, nothing copied but the last columns of B
// and a transposed B. A BLAS call costs more than its arithmetic here.
#pragma once

#include "cpu/gemm.h"

namespace dit_fast::cpu {

template <class Real>
void small_gemm(Op op_a, Op op_b, Index m, Index n, Index k, const Real* a, Index lda, const Real* b, Index ldb,
                Real beta, Real* c, Index ldc);

// Whether small_gemm is the faster one. Measured on a Zen 4 core against MKL 2024: where B lies ready it is, up to the
// size of the second-level cache; a Bᵀ that has to be turned first pays for small products and for few columns alone.
inline bool is_small_gemm(Op op_a, Op op_b, Index m, Index n, Index k) {
  if (n < 2 || (op_a == Op::transpose && op_b == Op::transpose)) return false;
  if (op_b == Op::none) return m * n * k <= Index(1) << 24;
  return m >= 4 && (m * n * k <= Index(1) << 19 || (n <= 16 && m >= 32));
}

// C[m,n] = beta C + A Bᵀ, A the rows a + rows[y]·lda, all rows contiguous: nothing is copied. For few n and long k.
template <class Real>
void row_products(Index m, Index n, Index k, const Real* a, Index lda, const Index* rows, const Real* b, Index ldb,
                  Real beta, Real* c);

// The product by whichever is faster.
template <class Real>
void product(Op op_a, Op op_b, Index m, Index n, Index k, const Real* a, Index lda, const Real* b, Index ldb, Real beta,
             Real* c, Index ldc, int threads) {
  if (is_small_gemm(op_a, op_b, m, n, k))
    small_gemm(op_a, op_b, m, n, k, a, lda, b, ldb, beta, c, ldc);
  else
    gemm(op_a, op_b, m, n, k, a, lda, b, ldb, beta, c, ldc, threads);
}

}  // namespace dit_fast::cpu
