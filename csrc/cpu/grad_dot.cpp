#include "grad_dot.h"

#include "cpu/row_tiles.h"

namespace dit_fast::cpu {

template <class Real>
void grad_dot(const GradDot<Real>& args, int threads) {
  for (const auto& [samples, directions] : args.layers) {
    if (!has_terms(samples, directions)) continue;
    const Activations<Real> activations(samples, directions.I, threads);
    for_each_tile(directions, max_tile_rows, [&, &samples = samples](const RowTile<const Real>& tile) {
      dot_tile(args.dots, samples, activations.matrix(), tile, threads);
    });
  }
}

template void grad_dot(const GradDot<float>&, int);
template void grad_dot(const GradDot<double>&, int);

}  // namespace dit_fast::cpu
