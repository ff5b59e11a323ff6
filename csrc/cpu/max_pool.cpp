#include "max_pool.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/clones.h"

namespace dit_fast::cpu {
namespace {

// Below this many numbers a parallel region costs more than it saves.
constexpr Index parallel_numbers = 1 << 17;

// Windows of 2 × 2 side by side, which most nets have: their rows become vectors.
bool halves(const PoolShape& s) {
  if (s.out[1] < 4) return false;
  for (int d = 0; d < 2; ++d)
    if (s.kernel[d] != 2 || s.stride[d] != 2 || s.dilation[d] != 1 || s.padding[d] != 0 || s.in[d] < 2 * s.out[d])
      return false;
  return true;
}

// L numbers, and integers as wide, which comparisons of them give: all bits or none.
template <class Real, int L>
struct Lanes {
  using Whole = std::conditional_t<sizeof(Real) == 4, std::int32_t, std::int64_t>;
  typedef Real Numbers __attribute__((vector_size(L * sizeof(Real))));
  typedef Whole Integers __attribute__((vector_size(L * sizeof(Real))));
  typedef std::uint8_t Bytes __attribute__((vector_size(L)));
};

template <class Vector, class T>
[[gnu::always_inline]] inline void load(const T* from, Vector& value) {
  std::memcpy(&value, from, sizeof value);
}

template <class Vector, class T>
[[gnu::always_inline]] inline void store(const Vector& value, T* to) {
  std::memcpy(to, &value, sizeof value);
}

// Numbers 0, 2, 4, … or 1, 3, 5, … of 2 L in memory.
template <int L, class Vector, class Real>
[[gnu::always_inline]] inline void load_every_other(const Real* from, bool odd, Vector& value) {
  Vector a, b;
  load(from, a);
  load(from + L, b);
  if constexpr (L == 8)
    value = odd ? __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)
                : __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  else
    value = odd ? __builtin_shufflevector(a, b, 1, 3, 5, 7) : __builtin_shufflevector(a, b, 0, 2, 4, 6);
}

// The way back: a₀ b₀ a₁ b₁ …
template <int L, class Vector, class Real>
[[gnu::always_inline]] inline void store_in_turn(const Vector& a, const Vector& b, Real* to) {
  if constexpr (L == 8) {
    store(__builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11), to);
    store(__builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15), to + L);
  } else {
    store(__builtin_shufflevector(a, b, 0, 4, 1, 5), to);
    store(__builtin_shufflevector(a, b, 2, 6, 3, 7), to + L);
  }
}

// A row of outputs in vectors of L, the last of which overlaps the one before: work(first output).
template <int L, class Work>
[[gnu::always_inline]] inline void for_each_vector(Index n, Work work) {
  for (Index w = 0; w + L < n; w += L) work(w);
  work(n - L);
}

template <int L, class Real>
[[gnu::always_inline]] inline void halve_row(Real slope, Index W, Index n, const Real* x, Real* y,
                                             std::uint8_t* places) {
  using Numbers = typename Lanes<Real, L>::Numbers;
  using Integers = typename Lanes<Real, L>::Integers;
  for_each_vector<L>(n, [=](Index w) __attribute__((always_inline)) {
    Numbers best = {};
    Integers place = {};
    for (int number = 0; number < 4; ++number) {
      Numbers value;
      load_every_other<L>(x + number / 2 * W + 2 * w, number % 2, value);
      const Integers larger = number == 0 ? Integers{} == Integers{} : (value > best) | (value != value);
      best = larger ? value : best;
      place = larger ? Integers{} + number : place;
    }
    store(best > 0 ? best : slope * best, y + w);
    store(__builtin_convertvector(place, typename Lanes<Real, L>::Bytes), places + w);
  });
}

// The row's part of halve_columns; y is read where `curved`.
template <int L, bool curved, bool transposed, class Real>
[[gnu::always_inline]] inline void halve_row_of_column(Real slope, Index W, Index n, const Real* y,
                                                       const std::uint8_t* places, const Real* from, Real* to) {
  using Numbers = typename Lanes<Real, L>::Numbers;
  using Integers = typename Lanes<Real, L>::Integers;
  for_each_vector<L>(n, [=](Index w) __attribute__((always_inline)) {
    typename Lanes<Real, L>::Bytes bytes;
    load(places + w, bytes);
    const auto place = __builtin_convertvector(bytes, Integers);
    Numbers sum = {}, value;
    if (transposed) load(from + w, sum);
    for (int number = 0; !transposed && number < 4; ++number) {
      load_every_other<L>(from + number / 2 * W + 2 * w, number % 2, value);
      sum = place == number ? value : sum;
    }
    if (curved) {
      load(y + w, value);
      sum = value > 0 ? sum : slope * sum;
    }
    if (!transposed) return store(sum, to + w);
    const Numbers none = {};
    for (int row = 0; row < 2; ++row)
      store_in_turn<L>(place == 2 * row ? sum : none, place == 2 * row + 1 ? sum : none, to + row * W + 2 * w);
  });
}

template <int L, class Real>
[[gnu::always_inline]] inline void halve(const PoolShape& s, Real slope, const Real* x, Real* y, std::uint8_t* places) {
  const Index W = s.in[1], n = s.out[1];
  for (Index h = 0; h < s.out[0]; ++h) halve_row<L>(slope, W, n, x + 2 * h * W, y + h * n, places + h * n);
}

template <int L, bool curved, bool transposed, class Real>
[[gnu::always_inline]] inline void halve_column(const PoolShape& s, Real slope, const Real* y,
                                                const std::uint8_t* places, const Real* from, Real* to) {
  const Index W = s.in[1], n = s.out[1], from_row = transposed ? n : 2 * W, to_row = transposed ? 2 * W : n;
  for (Index h = 0; h < s.out[0]; ++h, from += from_row, to += to_row) {
    halve_row_of_column<L, curved, transposed>(slope, W, n, curved ? y + h * n : y, places + h * n, from, to);
    if (transposed)
      for (Index row = 0; row < 2; ++row) std::fill(to + row * W + 2 * n, to + (row + 1) * W, Real(0));
  }
  if (transposed) std::fill_n(to, (s.in[0] - 2 * s.out[0]) * W, Real(0));
}

constexpr int lanes = 8;

// Windows of any kind, eight at a time. Rows of the plane are copied between enough −∞ that all windows of a row are
// alike; `first` [out rounded up to eight] has the first number of each window that lies in the input.
template <class Real>
struct Padded {
  Index width;
  std::vector<Real> rows;
  std::vector<typename Lanes<Real, lanes>::Whole> first;

  explicit Padded(const PoolShape& s) {
    const Index rounded = (s.out[1] + lanes - 1) / lanes * lanes;
    width = std::max((rounded + 1) * s.stride[1] + s.kernel[1] * s.dilation[1], s.in[1] + s.padding[1]);
    rows.assign(static_cast<std::size_t>(s.in[0] * width), -std::numeric_limits<Real>::infinity());
    for (Index w = 0; w < rounded; ++w) {
      Index k = 0;
      while (k + 1 < s.kernel[1] && s.at(1, w, k) < 0) ++k;
      first.push_back(static_cast<typename Lanes<Real, lanes>::Whole>(k));
    }
  }
};

template <class Vector, class Real>
[[gnu::always_inline]] inline void load_apart(const Real* from, Index stride, Vector& value) {
  if (stride == 1) return load(from, value);
  if (stride == 2) return load_every_other<lanes>(from, false, value);
  for (int l = 0; l < lanes; ++l) value[l] = from[l * stride];
}

// Output row h of a plane that `padded` holds.
template <class Real>
[[gnu::always_inline]] inline void pool_row(const PoolShape& s, Real slope, Index h, const Padded<Real>& padded,
                                            Real* y, const Places& places, Index at) {
  using Numbers = typename Lanes<Real, lanes>::Numbers;
  using Integers = typename Lanes<Real, lanes>::Integers;
  Index top = 0, bottom = s.kernel[0];
  while (s.at(0, h, top) < 0) ++top;
  while (s.at(0, h, bottom - 1) >= s.in[0]) --bottom;
  for (Index w = 0; w < s.out[1]; w += lanes) {
    Numbers best = Numbers{} - std::numeric_limits<Real>::infinity(), value;
    Integers place;
    load(padded.first.data() + w, place);
    place += static_cast<typename Lanes<Real, lanes>::Whole>(top * s.kernel[1]);
    for (Index kh = top; kh < bottom; ++kh) {
      const Real* from = padded.rows.data() + s.at(0, h, kh) * padded.width + w * s.stride[1];
      for (Index kw = 0; kw < s.kernel[1]; ++kw) {
        load_apart(from + kw * s.dilation[1], s.stride[1], value);
        const Integers larger = (value > best) | (value != value);
        best = larger ? value : best;
        place = larger ? Integers{} + static_cast<typename Lanes<Real, lanes>::Whole>(kh * s.kernel[1] + kw) : place;
      }
    }
    const Index n = std::min<Index>(lanes, s.out[1] - w);
    for (Index l = 0; l < n; ++l) {
      y[w + l] = pool_activation(slope, best[l]);
      places.set(at + w + l, place[l]);
    }
  }
}

template <class Real>
[[gnu::always_inline]] inline void pool_planes(const MaxPool<Real>& args, Padded<Real>& padded, Index first,
                                               Index last) {
  const PoolShape& s = args.shape;
  const Real slope = static_cast<Real>(args.slope);
  const bool fast = halves(s);
  for (Index plane = first; plane < last; ++plane) {
    const Real* x = args.x + plane * s.num_in();
    const Index at = plane * s.num_out();
    if (fast) {
      auto* places = static_cast<std::uint8_t*>(args.places.data) + at;
      if (s.out[1] < 8)
        halve<4>(s, slope, x, args.y + at, places);
      else
        halve<8>(s, slope, x, args.y + at, places);
      continue;
    }
    for (Index h = 0; h < s.in[0]; ++h)
      std::copy_n(x + h * s.in[1], s.in[1], padded.rows.data() + h * padded.width + s.padding[1]);
    for (Index h = 0, row = at; h < s.out[0]; ++h, row += s.out[1])
      pool_row(s, slope, h, padded, args.y + row, args.places, row);
  }
}

template <int L, class Real>
[[gnu::always_inline]] inline void halve_any(const PoolColumns<Real>& args, const Real* y, const std::uint8_t* places,
                                             const Real* from, Real* to) {
  const Real slope = static_cast<Real>(args.slope);
  if (args.transposed)
    return y ? halve_column<L, true, true>(args.shape, slope, y, places, from, to)
             : halve_column<L, false, true>(args.shape, slope, y, places, from, to);
  return y ? halve_column<L, true, false>(args.shape, slope, y, places, from, to)
           : halve_column<L, false, false>(args.shape, slope, y, places, from, to);
}

template <class Real>
[[gnu::always_inline]] inline void pool_plane_of_column(const PoolColumns<Real>& args, const Index* offsets, bool fast,
                                                        Index at, const Real* from, Real* to) {
  const PoolShape& s = args.shape;
  const Real slope = static_cast<Real>(args.slope);
  const Real* y = args.y ? args.y + at : nullptr;
  if (fast) {
    const std::uint8_t* places = static_cast<const std::uint8_t*>(args.places.data) + at;
    if (s.out[1] < 8) return halve_any<4>(args, y, places, from, to);
    return halve_any<8>(args, y, places, from, to);
  }
  if (args.transposed) std::fill_n(to, s.num_in(), Real(0));
  for (Index h = 0, o = 0; h < s.out[0]; ++h)
    for (Index w = 0; w < s.out[1]; ++w, ++o) {
      const Index element = s.at(0, h, 0) * s.in[1] + s.at(1, w, 0) + offsets[args.places.get(at + o)];
      const Real factor = pool_factor(slope, y, o);
      if (args.transposed)
        to[element] += factor * from[o];
      else
        to[o] = factor * from[element];
    }
}

// The planes of all columns of one sample.
template <class Real>
[[gnu::always_inline]] inline void pool_sample(const PoolColumns<Real>& args, const Index* offsets, Index b) {
  const PoolShape& s = args.shape;
  const Index from_size = args.transposed ? s.num_out() : s.num_in(), to_size = s.num_in() + s.num_out() - from_size;
  const bool fast = halves(s);
  for (Index k = 0; k < args.K; ++k)
    for (Index c = 0; c < args.C; ++c) {
      const Index plane = (b * args.K + k) * args.C + c;
      pool_plane_of_column(args, offsets, fast, (b * args.C + c) * s.num_out(), args.from + plane * from_size,
                           args.to + plane * to_size);
    }
}

DIT_FAST_CLONES void pool_some(const MaxPool<float>& args, Padded<float>& padded, Index first, Index last) {
  pool_planes(args, padded, first, last);
}
DIT_FAST_CLONES void pool_some(const MaxPool<double>& args, Padded<double>& padded, Index first, Index last) {
  pool_planes(args, padded, first, last);
}
DIT_FAST_CLONES void pool_some(const PoolColumns<float>& args, const Index* offsets, Index b) {
  pool_sample(args, offsets, b);
}
DIT_FAST_CLONES void pool_some(const PoolColumns<double>& args, const Index* offsets, Index b) {
  pool_sample(args, offsets, b);
}

}  // namespace

template <class Real>
void max_pool(const MaxPool<Real>& args, int threads) {
  if (args.num_planes * args.shape.num_in() < parallel_numbers) threads = 1;
#pragma omp parallel for num_threads(threads)
  for (int i = 0; i < threads; ++i) {
    Padded<Real> padded(args.shape);
    pool_some(args, padded, args.num_planes * i / threads, args.num_planes * (i + 1) / threads);
  }
}

template <class Real>
void pool_columns(const PoolColumns<Real>& args, int threads) {
  if (args.B * args.K * args.C * args.shape.num_in() < parallel_numbers) threads = 1;
  // of each place, from the first number of its window on
  const PoolShape& s = args.shape;
  std::vector<Index> offsets;
  for (Index place = 0; place < s.kernel[0] * s.kernel[1]; ++place)
    offsets.push_back(place / s.kernel[1] * s.dilation[0] * s.in[1] + place % s.kernel[1] * s.dilation[1]);
#pragma omp parallel for num_threads(threads)
  for (Index b = 0; b < args.B; ++b) pool_some(args, offsets.data(), b);
}

template void max_pool(const MaxPool<float>&, int);
template void max_pool(const MaxPool<double>&, int);
template void pool_columns(const PoolColumns<float>&, int);
template void pool_columns(const PoolColumns<double>&, int);

}  // namespace dit_fast::cpu
