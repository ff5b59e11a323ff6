// The two halves of the low-rank ops on a tile of U's rows (k, o). A tile that fits the cache can be updated and then
// dotted while it is there.
#pragma once

#include <algorithm>

#include "cpu/matrix.h"
#include "layer.h"

namespace dit_fast::cpu {

// Rows first … first + count of (k, o) of a layer's directions.
template <class T>
struct RowTile {
  Matrix<T> weight;
  const Directions<T>& of;
  Index first, count;
};

// No tile has more rows: its products with the samples' rows, at most max_sample_rows at a time, are 2 to 4 MiB.
constexpr Index max_tile_rows = 1024, max_sample_rows = 512;

// Calls visit(tile) for tiles that cover all directions; `rows` bounds the rows of each.
template <class T, class Visit>
void for_each_tile(const Directions<T>& directions, Index rows, Visit visit) {
  const Blocks<T> blocks(directions.weight, directions.K, directions.O, directions.I);
  for (Index block = 0; block < blocks.num_blocks; ++block)
    for (Index r = 0; r < blocks.rows_per_block; r += rows)
      visit(RowTile<T>{blocks.rows_from(block, r), directions, block * blocks.rows_per_block + r,
                       std::min(rows, blocks.rows_per_block - r)});
}

// The activations' rows (b, s) as a matrix, copied if they have to be.
template <class Real>
class Activations {
 public:
  Activations(const Samples<Real>& samples, Index I, int threads) {
    if (samples.B * samples.S > 0)
      matrix_ = packed_.matrix(samples.activations, samples.B, I, 0, samples.B * samples.S, threads);
  }
  const Matrix<const Real>& matrix() const { return matrix_; }

 private:
  Packed<Real> packed_;
  Matrix<const Real> matrix_{nullptr, 1};
};

// U and v of the tile become alpha times themselves plus the weighted gradients (lowrank_update.h).
template <class Real>
void update_tile(double alpha, const Rows<const double>& coefficients, const Samples<Real>& samples,
                 const Matrix<const Real>& a, const RowTile<Real>& tile, int threads);

// The tile's part of the dots (grad_dot.h). The order of the sums does not depend on the number of threads.
template <class Real>
void dot_tile(const Rows<double>& dots, const Samples<Real>& samples, const Matrix<const Real>& a,
              const RowTile<const Real>& tile, int threads);

}  // namespace dit_fast::cpu
