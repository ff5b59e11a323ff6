#include "mlp_gradient.h"

#include "cpu/elementwise.h"
#include "cpu/mlp_primal.h"
#include "cpu/small_gemm.h"

namespace dit_fast::cpu {

template <class Real>
void mlp_gradient(const MlpSweep<Real>& args, Real* gradients, Index gradients_stride, int threads) {
  MlpSweep<Real> point = args;
  Primal<Real> primal(point, args.offsets[1]);
  for (Index t = 0; t < args.num_steps; ++t, point.theta += args.theta_stride, gradients += gradients_stride) {
    primal.run(0, true, true, threads);
    for (std::size_t l = 0; l < args.layers.size(); ++l) {
      const MlpLayer& layer = args.layers[l];
      const auto& state = primal.layers[l];
      product<Real>(Op::transpose, Op::none, layer.O, layer.I, primal.B, state.delta, layer.O, state.input, layer.I, 1,
                    gradients + layer.weight, layer.I, threads);
      if (layer.bias >= 0) add_row_sums<Real>(primal.B, layer.O, 1, state.delta, gradients + layer.bias);
    }
  }
}

template void mlp_gradient(const MlpSweep<float>&, float*, Index, int);
template void mlp_gradient(const MlpSweep<double>&, double*, Index, int);

}  // namespace dit_fast::cpu
