// The whole sweep, or all models' retraining, in one launch: a team is a block of the grid, its memory shared memory.
#pragma once

#include "team/retrain.h"
#include "team/sweep.h"

namespace dit_fast::cuda {

struct DeviceLimits {
  Index shared_memory;  // bytes a block may ask for
  int processors;
};

DeviceLimits device_limits(int device);

// Launch on `stream` of `device` and return: no synchronisation, no allocation. Throw on a failed launch. args.run.net
// is a plan within the device's shared memory. Scores are added to in any order: they may differ in the last bits of a
// double; u, m and d are bit-equal.
template <class Real>
void team_sweep(const team::Sweep<Real>& args, int device, void* stream);

template <class Real>
void team_retrain(const team::Retrain<Real>& args, int device, void* stream);

}  // namespace dit_fast::cuda
