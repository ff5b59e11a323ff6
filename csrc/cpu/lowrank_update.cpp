#include "lowrank_update.h"

#include "cpu/row_tiles.h"

namespace dit_fast::cpu {

template <class Real>
void lowrank_update(const LowrankUpdate<Real>& args, int threads) {
  for (const auto& [samples, directions] : args.layers) {
    if (directions.K * directions.O == 0) continue;
    const Activations<Real> activations(samples, directions.I, threads);
    for_each_tile(directions, max_tile_rows, [&, &samples = samples](const RowTile<Real>& tile) {
      update_tile(args.alpha, args.coefficients, samples, activations.matrix(), tile, threads);
    });
  }
}

template void lowrank_update(const LowrankUpdate<float>&, int);
template void lowrank_update(const LowrankUpdate<double>&, int);

}  // namespace dit_fast::cpu
