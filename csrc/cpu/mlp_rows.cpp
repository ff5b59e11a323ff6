#include "mlp_rows.h"

namespace dit_fast::cpu {

template <class Real>
void mlp_rows(Piece piece, const MlpRows<Real>& args) {
  for (Index i = 0; i < piece_size(piece, args); ++i) piece_at(piece, args, i);
}

template void mlp_rows(Piece, const MlpRows<float>&);
template void mlp_rows(Piece, const MlpRows<double>&);

}  // namespace dit_fast::cpu
