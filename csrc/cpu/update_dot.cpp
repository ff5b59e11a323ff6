#include "update_dot.h"

#include <algorithm>

#include "cpu/row_tiles.h"

namespace dit_fast::cpu {
namespace {

// A tile stays in a core's second-level cache from its update to its dots.
constexpr Index cached_bytes = 1 << 19;

// How many rows of U a tile has; with threads the BLAS shares each tile out among them.
template <class Real>
Index rows_per_tile(Index I, int threads) {
  const Index row_bytes = std::max<Index>(1, I * static_cast<Index>(sizeof(Real)));
  return std::clamp<Index>(cached_bytes * threads / row_bytes / 16 * 16, 64, max_tile_rows);
}

}  // namespace

template <class Real>
void update_dot(const UpdateDot<Real>& args, int threads) {
  for (const auto& [update, dot, directions] : args.layers) {
    const auto& [K, O, I, weight, bias] = directions;
    if (K * O == 0) continue;
    const bool has_dots = has_terms(dot, directions);
    const Directions<const Real> read{K,
                                      O,
                                      I,
                                      {weight.data, weight.outer_stride, weight.inner_stride, weight.num_inner},
                                      {bias.data, bias.outer_stride, bias.inner_stride, bias.num_inner}};
    const Activations<Real> update_a(update, I, threads), dot_a(dot, I, threads);
    for_each_tile(
        directions, rows_per_tile<Real>(I, threads), [&, &update = update, &dot = dot](const RowTile<Real>& tile) {
          update_tile(args.alpha, args.coefficients, update, update_a.matrix(), tile, threads);
          if (has_dots)
            dot_tile(args.dots, dot, dot_a.matrix(),
                     RowTile<const Real>{{tile.weight.data, tile.weight.leading}, read, tile.first, tile.count},
                     threads);
        });
  }
}

template void update_dot(const UpdateDot<float>&, int);
template void update_dot(const UpdateDot<double>&, int);

}  // namespace dit_fast::cpu
