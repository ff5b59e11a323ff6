// A team of threads that works through one piece of a problem together: a block of a CUDA grid, or threads of the CPU
// that run the same code for tests.
//
// Work goes in phases. In a phase every thread takes its share of the elements, and none reads what another one writes;
// team.sync() ends a phase. Every element is made by one thread in a fixed order, so that a result does not depend on
// the team's size.
//
//   int rank, size                  this thread's number and how many there are
//   void sync()                     waits for all threads, whose writes are then seen
//   void add(double* at, double)    atomically, in any order
//   void raise(Index* at, Index)    the larger of both, atomically
#pragma once

#include "layer.h"

namespace dit_fast::team {

// work(i) for i < n, shared by the team.
template <class Team, class Work>
DIT_FAST_HOST_DEVICE void for_each(const Team& team, int n, Work work) {
  for (int i = team.rank; i < n; i += team.size) work(i);
}

// write(i, j, Σ_l a(i, l) b(l, j)) for i < m, j < n. A thread makes four elements at a time, so that each number it
// reads serves two of them; neighbours have neighbouring j.
template <class Real, class Team, class A, class B, class Write>
DIT_FAST_HOST_DEVICE void product(const Team& team, int m, int n, int k, A a, B b, Write write) {
  const int half_m = (m + 1) / 2, half_n = (n + 1) / 2;
  for_each(team, half_m * half_n, [&](int tile) {
    const int i = tile / half_n, j = tile % half_n;
    const bool two_rows = i + half_m < m, two_columns = j + half_n < n;
    // beyond the edge the first one is computed once more
    const int next_i = two_rows ? i + half_m : i, next_j = two_columns ? j + half_n : j;
    Real sum = 0, right = 0, below = 0, corner = 0;
    for (int l = 0; l < k; ++l) {
      const Real a0 = a(i, l), a1 = a(next_i, l), b0 = b(l, j), b1 = b(l, next_j);
      sum += a0 * b0;
      right += a0 * b1;
      below += a1 * b0;
      corner += a1 * b1;
    }
    // one copy of `write` in the kernel, not four: what it does may be long
#ifdef __CUDACC__
#pragma unroll 1
#endif
    for (int element = 0; element < 4; ++element) {
      const bool second_row = element >= 2, second_column = element % 2 != 0;
      if ((second_row && !two_rows) || (second_column && !two_columns)) continue;
      const Real upper = second_column ? right : sum, lower = second_column ? corner : below;
      write(second_row ? next_i : i, second_column ? next_j : j, second_row ? lower : upper);
    }
  });
}

}  // namespace dit_fast::team
