#include "cpu/gemm.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/clones.h"

namespace dit_fast::cpu {
namespace {

// Fortran's sgemm_/dgemm_. Integers travel as 64-bit variables that hold 32-bit values: a library built for either
// width reads the same number (little-endian machines).
template <class Real>
using Gemm = void (*)(const char* op_a, const char* op_b, const Index* m, const Index* n, const Index* k,
                      const Real* alpha, const Real* a, const Index* lda, const Real* b, const Index* ldb,
                      const Real* beta, Real* c, const Index* ldc);

// The export is undocumented: a 2×2 product shows that the symbol is what its name says.
template <class Real>
bool works(Gemm<Real> gemm) {
  const Real a[] = {1, 2, 3, 4}, b[] = {5, 6, 7, 8}, one = 1;
  Real c[] = {1, 1, 1, 1};
  const Index two = 2;
  gemm("T", "N", &two, &two, &two, &one, a, &two, b, &two, &one, c, &two);
  // column-major Aᵀ B + C
  return c[0] == 18 && c[1] == 40 && c[2] == 24 && c[3] == 54;
}

struct Blas {
  Gemm<float> single = nullptr;
  Gemm<double> twice = nullptr;
  // MKL's; sets the number of threads of the calling thread (0: as the process has it) and returns the one before
  int (*set_local_threads)(int) = nullptr;
  const char* name = "built-in";

  Blas() {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch && take(torch)) {
      name = "libtorch_cpu.so sgemm_/dgemm_";
      set_local_threads = reinterpret_cast<int (*)(int)>(dlsym(torch, "MKL_Set_Num_Threads_Local"));
    } else if (take(RTLD_DEFAULT)) {
      name = "process sgemm_/dgemm_";
    }
#endif
  }

  bool take(void* library) {
    single = reinterpret_cast<Gemm<float>>(dlsym(library, "sgemm_"));
    twice = reinterpret_cast<Gemm<double>>(dlsym(library, "dgemm_"));
    if (single && twice && works(single) && works(twice)) return true;
    single = nullptr;
    twice = nullptr;
    return false;
  }

  Gemm<float> get(float) const { return single; }
  Gemm<double> get(double) const { return twice; }
};

// Looked up at the first use, when torch is loaded.
const Blas& blas() {
  static const Blas found;
  return found;
}

std::atomic<bool> blas_allowed{true};

// In this thread: inside a SerialBlas that could not tell the BLAS.
thread_local bool blas_avoided = false;

bool fits_blas(Index rows, Index columns, Index leading) {
  const Index limit = std::numeric_limits<std::int32_t>::max();
  return rows <= limit && columns <= limit && leading <= limit && leading >= std::max<Index>(1, columns);
}

// The built-in product: C in blocks of block_m × block_n, each summed over k in panels of block_k that are packed
// contiguously, whatever the operands' layout.
constexpr Index block_m = 64, block_n = 256, block_k = 128;

template <class Real>
void pack(Op op, Index rows, Index columns, const Real* from, Index leading, Real* to) {
  for (Index r = 0; r < rows; ++r)
    for (Index c = 0; c < columns; ++c)
      to[r * columns + c] = op == Op::none ? from[r * leading + c] : from[c * leading + r];
}

// A 64-byte line of elements; the compiler splits it where the machine's registers are narrower.
template <class Real>
struct Line {
  typedef Real type __attribute__((vector_size(64)));
};

// C[m,n] += A[m,k] B[k,n] for packed A and B, in tiles of 4 rows × one line that stay in registers over k.
template <class Real>
[[gnu::always_inline]] inline void multiply_tiles(Index m, Index n, Index k, const Real* a, const Real* b, Real* c,
                                                  Index ldc) {
  constexpr Index rows = 4, columns = 64 / sizeof(Real);
  Index r = 0;
  const Index whole_n = n / columns * columns;
  for (; r + rows <= m; r += rows) {
    for (Index j = 0; j < whole_n; j += columns) {
      typename Line<Real>::type sum[rows] = {}, line;
      for (Index l = 0; l < k; ++l) {
        std::memcpy(&line, b + l * n + j, sizeof line);
        for (Index y = 0; y < rows; ++y) sum[y] += a[(r + y) * k + l] * line;
      }
      for (Index y = 0; y < rows; ++y)
        for (Index x = 0; x < columns; ++x) c[(r + y) * ldc + j + x] += sum[y][x];
    }
  }
  // the edges: columns beyond the last whole line, then rows beyond the last four
  for (Index y = 0; y < m; ++y)
    for (Index l = 0; l < k; ++l)
      for (Index x = y < r ? whole_n : 0; x < n; ++x) c[y * ldc + x] += a[y * k + l] * b[l * n + x];
}

DIT_FAST_CLONES void multiply_block(Index m, Index n, Index k, const float* a, const float* b, float* c, Index ldc) {
  multiply_tiles(m, n, k, a, b, c, ldc);
}

DIT_FAST_CLONES void multiply_block(Index m, Index n, Index k, const double* a, const double* b, double* c, Index ldc) {
  multiply_tiles(m, n, k, a, b, c, ldc);
}

template <class Real>
void scale_block(Index m, Index n, Real beta, Real* c, Index ldc) {
  if (beta == 1) return;
  for (Index r = 0; r < m; ++r)
    for (Index j = 0; j < n; ++j) c[r * ldc + j] = beta == 0 ? 0 : beta * c[r * ldc + j];
}

template <class Real>
void built_in_gemm(Op op_a, Op op_b, Index m, Index n, Index k, const Real* a, Index lda, const Real* b, Index ldb,
                   Real beta, Real* c, Index ldc, int threads) {
  const Index blocks_n = (n + block_n - 1) / block_n, num_blocks = (m + block_m - 1) / block_m * blocks_n;
  // rounding the panel sizes down to the problem keeps small products free of large buffers
  const Index panel_m = std::min(m, block_m), panel_n = std::min(n, block_n), panel_k = std::min(k, block_k);
  threads = static_cast<int>(std::min<Index>(threads, num_blocks));
  std::vector<Real> packed(static_cast<std::size_t>(threads * panel_k * (panel_m + panel_n)));
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int thread = 0; thread < threads; ++thread) {
    Real* packed_a = packed.data() + thread * panel_k * (panel_m + panel_n);
    Real* packed_b = packed_a + panel_k * panel_m;
    // thread t owns the blocks t, t + threads, …
    for (Index block = thread; block < num_blocks; block += threads) {
      const Index m0 = block / blocks_n * block_m, n0 = block % blocks_n * block_n;
      const Index mm = std::min(block_m, m - m0), nn = std::min(block_n, n - n0);
      scale_block(mm, nn, beta, c + m0 * ldc + n0, ldc);
      for (Index k0 = 0; k0 < k; k0 += block_k) {
        const Index kk = std::min(block_k, k - k0);
        pack(op_a, mm, kk, op_a == Op::none ? a + m0 * lda + k0 : a + k0 * lda + m0, lda, packed_a);
        pack(op_b, kk, nn, op_b == Op::none ? b + k0 * ldb + n0 : b + n0 * ldb + k0, ldb, packed_b);
        multiply_block(mm, nn, kk, packed_a, packed_b, c + m0 * ldc + n0, ldc);
      }
    }
  }
}

}  // namespace

template <class Real>
void gemm(Op op_a, Op op_b, Index m, Index n, Index k, const Real* a, Index lda, const Real* b, Index ldb, Real beta,
          Real* c, Index ldc, int threads) {
  if (m == 0 || n == 0) return;
  const bool fits = fits_blas(m, n, ldc) && (op_a == Op::none ? fits_blas(m, k, lda) : fits_blas(k, m, lda)) &&
                    (op_b == Op::none ? fits_blas(k, n, ldb) : fits_blas(n, k, ldb));
  const Gemm<Real> torch_gemm =
      blas_allowed.load(std::memory_order_relaxed) && !blas_avoided ? blas().get(Real{}) : nullptr;
  if (!torch_gemm || !fits) {
    built_in_gemm(op_a, op_b, m, n, k, a, lda, b, ldb, beta, c, ldc, threads);
    return;
  }
  // BLAS is column-major and sees every matrix transposed: Cᵀ = op(B)ᵀ op(A)ᵀ
  const Real one = 1;
  torch_gemm(op_b == Op::none ? "N" : "T", op_a == Op::none ? "N" : "T", &n, &m, &k, &one, b, &ldb, a, &lda, &beta, c,
             &ldc);
}

template void gemm(Op, Op, Index, Index, Index, const float*, Index, const float*, Index, float, float*, Index, int);
template void gemm(Op, Op, Index, Index, Index, const double*, Index, const double*, Index, double, double*, Index,
                   int);

SerialBlas::SerialBlas() {
  if (blas().set_local_threads)
    before_ = blas().set_local_threads(1);
  else
    blas_avoided = true;
}

SerialBlas::~SerialBlas() {
  if (blas().set_local_threads)
    blas().set_local_threads(before_);
  else
    blas_avoided = false;
}

bool use_blas(bool allowed) {
  blas_allowed = allowed;
  return allowed && blas().single;
}

const char* blas_name() {
  return blas_allowed ? blas().name : "built-in";
}

}  // namespace dit_fast::cpu
