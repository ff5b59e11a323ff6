// The teams' code run by threads of the CPU, for tests of what the CUDA kernels do where there is no GPU: one group
// after the other, `team_size` threads to a team.
#pragma once

#include "team/retrain.h"
#include "team/sweep.h"

namespace dit_fast::cpu {

template <class Real>
void team_sweep(const team::Sweep<Real>& args, int team_size);

template <class Real>
void team_retrain(const team::Retrain<Real>& args, int team_size);

}  // namespace dit_fast::cpu
