// General matrix product on the CPU, all matrices row-major, with leading dimensions:
//
//   C[m,n] = Σ_k op(A)[m,k] op(B)[k,n] + beta C[m,n],   op(X) = X or Xᵀ
//
// C must not overlap A or B. beta = 0 overwrites C whatever it held; k = 0 leaves beta·C.
// The work goes to the sgemm_/dgemm_ that torch has already loaded (they obey torch.set_num_threads) or, where there is
// none, where it is switched off, or where a size does not fit its 32 bits, to a blocked product of our own.
#pragma once

#include "layer.h"

namespace dit_fast::cpu {

enum class Op { none, transpose };

template <class Real>
void gemm(Op op_a, Op op_b, Index m, Index n, Index k, const Real* a, Index lda, const Real* b, Index ldb, Real beta,
          Real* c, Index ldc, int threads);

// While it lives, products asked for in this thread run in this thread alone: torch's BLAS is told so, or not used
// where it cannot be told (a BLAS inside a parallel region would start threads of its own).
class SerialBlas {
 public:
  SerialBlas();
  ~SerialBlas();
  SerialBlas(const SerialBlas&) = delete;
  SerialBlas& operator=(const SerialBlas&) = delete;

 private:
  int before_ = 0;
};

// Forces the built-in product (false) or allows torch's (true, the default); says whether torch's is now in use.
bool use_blas(bool allowed);

// Where sgemm_/dgemm_ come from: "libtorch_cpu.so sgemm_/dgemm_", "process sgemm_/dgemm_" or "built-in".
const char* blas_name();

}  // namespace dit_fast::cpu
