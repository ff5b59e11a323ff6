// Rows numbered by a pair, seen as matrices that a GEMM can take.
#pragma once

#include <algorithm>
#include <vector>

#include "layer.h"

namespace dit_fast::cpu {

// Below this many elements a parallel region costs more than it saves.
constexpr Index parallel_from = 1 << 15;

template <class T>
struct Matrix {
  T* data;
  Index leading;
};

// All rows (outer, inner) have one distance from each other, so that they are a matrix.
template <class T>
bool evenly_spaced(const Rows<T>& rows, Index num_outer) {
  return num_outer <= 1 || rows.num_inner <= 1 || rows.outer_stride == rows.num_inner * rows.inner_stride;
}

// The distance of evenly spaced rows, at least `columns` where there is a single row and any distance will do.
template <class T>
Index spacing(const Rows<T>& rows, Index num_outer, Index columns) {
  if (rows.num_inner > 1) return rows.inner_stride;
  return num_outer > 1 ? rows.outer_stride : std::max<Index>(1, columns);
}

// The rows (k, o) of a weight as few matrices as its strides allow: one [K·O, I], or K of [O, I].
template <class T>
struct Blocks {
  Rows<T> rows;
  Index num_blocks, rows_per_block, leading;

  Blocks(const Rows<T>& rows, Index num_outer, Index num_inner, Index columns) : rows(rows) {
    const bool one = evenly_spaced(rows, num_outer);
    num_blocks = one ? 1 : num_outer;
    rows_per_block = one ? num_outer * num_inner : num_inner;
    leading = spacing(rows, one ? num_outer : 1, columns);
  }

  Matrix<T> rows_from(Index block, Index row) const { return {rows.row(block * rows_per_block + row), leading}; }
};

// A tile of the rows (b, s) as a matrix: where they lie when evenly spaced and apart, else copied.
template <class Real>
class Packed {
 public:
  Matrix<const Real> matrix(const Rows<const Real>& rows, Index num_outer, Index columns, Index first, Index count,
                            int threads) {
    if (evenly_spaced(rows, num_outer) && spacing(rows, num_outer, columns) >= columns)
      return {rows.row(first), spacing(rows, num_outer, columns)};
    buffer_.resize(static_cast<std::size_t>(count * columns));
#pragma omp parallel for num_threads(threads) if (threads > 1 && count * columns > parallel_from)
    for (Index m = 0; m < count; ++m) std::copy_n(rows.row(first + m), columns, buffer_.data() + m * columns);
    return {buffer_.data(), columns};
  }

 private:
  std::vector<Real> buffer_;
};

}  // namespace dit_fast::cpu
