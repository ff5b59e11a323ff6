// Maximum pooling over planes [H,W] and what it does to K tangents and cotangents at once, an activation
// f(x) = x > 0 ? x : slope·x, slope ≥ 0, behind it included. With w(b,c,h',w') the place of the largest number in a
// window (the first of equal ones, the last NaN), numbered kh·KW + kw within the window:
//
//   max_pool   y[b,c,h',w'] = f(x[b,c,w]);  places[b,c,h',w'] = w
//   tangent    to[b,k,c,h',w'] = f'(x[w]) from[b,k,c,w]
//   transposed to[b,k,c,h,w] = Σ over the windows whose w it is of f'(x[w]) from[b,k,c,h',w']
//
// f' is 1 where y > 0, else slope; y may be null for f(x) = x. Places are bytes, or 32-bit integers for windows of more
// than 255 numbers. Everything is contiguous; one spatial dimension is a plane of height 1. No window lies in the
// padding altogether. Python face dit_fast.pooling.
#pragma once

#include <cstdint>

#include "layer.h"

namespace dit_fast {

// Of the two dimensions, rows first.
struct PoolShape {
  Index in[2], out[2], kernel[2], stride[2], padding[2], dilation[2];

  DIT_FAST_HOST_DEVICE Index num_in() const { return in[0] * in[1]; }
  DIT_FAST_HOST_DEVICE Index num_out() const { return out[0] * out[1]; }
  // Where number k of window o lies in dimension d; outside of 0 … in[d] − 1 it is padding.
  DIT_FAST_HOST_DEVICE Index at(int d, Index o, Index k) const { return o * stride[d] - padding[d] + k * dilation[d]; }
  // The element of a plane at a place of the window of output `o`.
  DIT_FAST_HOST_DEVICE Index element(Index o, Index place) const {
    return at(0, o / out[1], place / kernel[1]) * in[1] + at(1, o % out[1], place % kernel[1]);
  }
};

struct Places {
  void* data;
  bool wide;

  DIT_FAST_HOST_DEVICE Index get(Index i) const {
    return wide ? static_cast<const std::int32_t*>(data)[i] : static_cast<const std::uint8_t*>(data)[i];
  }
  DIT_FAST_HOST_DEVICE void set(Index i, Index place) const {
    if (wide)
      static_cast<std::int32_t*>(data)[i] = static_cast<std::int32_t>(place);
    else
      static_cast<std::uint8_t*>(data)[i] = static_cast<std::uint8_t>(place);
  }
};

template <class Real>
struct MaxPool {
  Index num_planes;
  PoolShape shape;
  double slope;
  const Real* x;
  Real* y;
  Places places;
};

template <class Real>
struct PoolColumns {
  Index B, K, C;
  PoolShape shape;
  double slope;
  const Real* y;
  Places places;
  bool transposed;
  const Real* from;
  Real* to;
};

// y and the place of one output; x: its plane.
template <class Real>
DIT_FAST_HOST_DEVICE Real largest_at(const PoolShape& shape, const Real* x, Index o, Index* place) {
  Real best = 0;
  *place = -1;
  for (Index kh = 0; kh < shape.kernel[0]; ++kh) {
    const Index h = shape.at(0, o / shape.out[1], kh);
    if (h < 0 || h >= shape.in[0]) continue;
    for (Index kw = 0; kw < shape.kernel[1]; ++kw) {
      const Index w = shape.at(1, o % shape.out[1], kw);
      if (w < 0 || w >= shape.in[1]) continue;
      const Real value = x[h * shape.in[1] + w];
      if (*place < 0 || value > best || value != value) {
        best = value;
        *place = kh * shape.kernel[1] + kw;
      }
    }
  }
  return best;
}

// f(x), and f'(x) told from y = f(x)
template <class Real>
DIT_FAST_HOST_DEVICE Real pool_activation(Real slope, Real x) {
  return x > 0 ? x : x == x ? slope * x : x;
}

template <class Real>
DIT_FAST_HOST_DEVICE Real pool_factor(Real slope, const Real* y, Index i) {
  return !y || y[i] > 0 ? Real(1) : slope;
}

namespace cpu {
template <class Real>
void max_pool(const MaxPool<Real>& args, int threads);
template <class Real>
void pool_columns(const PoolColumns<Real>& args, int threads);
}  // namespace cpu

namespace cuda {
// Launch on `stream` of `device` and return: no synchronisation, no allocation. Throw on a failed launch.
template <class Real>
void max_pool(const MaxPool<Real>& args, int device, void* stream);
template <class Real>
void pool_columns(const PoolColumns<Real>& args, int device, void* stream);
}  // namespace cuda

}  // namespace dit_fast
