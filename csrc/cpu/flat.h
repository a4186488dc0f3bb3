// Rows of bins without gaps between them, as one array.
//
// Logits that are near enough to each other need no shift by their row's maximum, p_k = exp(z_k) /
// sum, so the rows need not be turned into lanes either: exponentials go along the array, and what
// is left of a row is its sum and a look at two of its elements. The loss is -wl log p_l - wr log
// p_r, as exact as with the shift.
//
// As all of the CPU kernels with internal linkage and without std.
#pragma once

// clang-format off: math.h is written in the primitives that simd.h declares
#include "rows.h"
#include "../math.h"
// clang-format on

namespace gfl {
namespace {

constexpr int64_t kLeastFlatBins = 8, kFlatBins = 64;
constexpr int kSmall = 40;    // kFlatBins exp(2 kSmall) is a float
constexpr int kAhead = 4096;  // bytes: hardware prefetchers stop at every page

constexpr bool has_flat_bins(int64_t bins) { return bins >= kLeastFlatBins && bins <= kFlatBins; }

// e = exp(z - shift) of n logits, if all are near enough to it; a vector's room behind both. `also`
// is what the caller will write as far into.
template <bool kShifted, typename S>
bool exponentials_near(const S* z, const S* also, int64_t n, Accumulator<S> shift,
                       Accumulator<S>* e) {
  using A = Accumulator<S>;
  Vector<A> square{};
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    Vector<A> x = load(z + i);
    if constexpr (kShifted) x = x - shift;
    __builtin_prefetch(reinterpret_cast<const char*>(z + i) + kAhead, 0);
    __builtin_prefetch(reinterpret_cast<const char*>(also + i) + kAhead, 1);
    square = maximum(x * x, square);
    store(e + i, exponential<true>(x));
  }
  for (int i = 0; i < kLanes<A>; ++i) {
    if (square[i] > A(kSmall * kSmall)) return false;
  }
  return true;
}

// The same with the shift of the logits before these or, where it does not fit them, their middle.
// False if they are too far apart for any.
template <typename S>
bool exponentials(const S* z, const S* also, int64_t n, Accumulator<S>* shift, Accumulator<S>* e) {
  using A = Accumulator<S>;
  if (*shift == 0 ? exponentials_near<false>(z, also, n, A(0), e)
                  : exponentials_near<true>(z, also, n, *shift, e)) {
    return true;
  }
  Vector<A> high = load(z), low = -high;
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    const Vector<A> x = load(z + i);
    high = maximum(x, high);
    low = maximum(-x, low);
  }
  A most = high[0], least = -low[0];
  for (int i = 1; i < kLanes<A>; ++i) {
    most = high[i] > most ? high[i] : most;
    least = -low[i] < least ? -low[i] : least;
  }
  if (!(most - least < A(2 * kSmall))) return false;
  *shift = (most + least) / 2;
  return exponentials_near<true>(z, also, n, *shift, e);
}

// A number of bins that is known to the compiler, or any for K = 0.
template <int K>
struct Bins {
  int64_t any;
  constexpr operator int64_t() const { return K ? K : any; }
};
// f(Bins<...>), compiled for the numbers that detectors have.
template <typename F>
__attribute__((always_inline)) inline auto with_bins(int64_t bins, const F& f) {
  switch (bins) {
    case 8:
      return f(Bins<8>{});
    case 16:
      return f(Bins<16>{});
    case 17:
      return f(Bins<17>{});
    case 33:
      return f(Bins<33>{});
    default:
      return f(Bins<0>{bins});
  }
}

// Lane i: the sum over row i of f(i, k), a vector from bin k on.
template <typename V, int K, typename F>
__attribute__((always_inline)) inline V flat_sums(Bins<K> bins, const F& f) {
  constexpr int lanes = kLanes<scalar_t<V>>;
  const int64_t n = bins;  // GCC unrolls no loop whose end is a conversion
  V part[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    part[i] = n < lanes ? first_lanes(f(i, 0), static_cast<int>(n)) : f(i, 0);
    int64_t k = lanes;
#pragma GCC unroll 16
    for (; k + lanes <= n; k += lanes) part[i] = part[i] + f(i, k);
    if (k < n) part[i] = part[i] + first_lanes(f(i, k), static_cast<int>(n - k));
  }
  return sum_each(part);
}

// f(i, each) for the elements from i on that are a vector, of as many rows as a vector has lanes:
// rows of K bins are K whole vectors. each(by_row): what their rows have in by_row.
template <typename V, int K, int vector = 0, typename F>
__attribute__((always_inline)) inline void each_vector(const F& f) {
  if constexpr (vector < K) {
    constexpr int first = vector * kLanes<scalar_t<V>>;
    f(first, [](V by_row) __attribute__((always_inline)) {
      return shuffle(by_row, by_row, [](int l) { return (first + l) / K; });
    });
    each_vector<V, K, vector + 1>(f);
  }
}

// The bins' values, `times` times one after the other, with a vector's room behind.
template <typename A>
A* repeat_values(Scratch* scratch, const Operand& values, int64_t bins, int64_t times) {
  A* const y = scratch->take<A>(times * bins + kLanes<A>);
  for (int64_t t = 0; t < times; ++t) {
    for (int64_t k = 0; k < bins; ++k) y[t * bins + k] = reinterpret_cast<const A*>(values.data)[k];
  }
  return y;
}

// sum_k exp(z_k) and sum_k y_k exp(z_k) of as many rows as a vector has lanes, out of their
// exponentials.
template <typename V>
struct Sums {
  V sum, moment;
};
template <typename A, int K>
__attribute__((always_inline)) inline Sums<Vector<A>> moments_of_flat(Bins<K> bins, const A* e,
                                                                      const A* y) {
  using V = Vector<A>;
  const V sum = flat_sums<V>(bins, [&](int i, int64_t k) __attribute__((always_inline)) {
    return load(e + i * bins + k);
  });
  const V moment = flat_sums<V>(bins, [&](int i, int64_t k) __attribute__((always_inline)) {
    return load(e + i * bins + k) * load(y + k);
  });
  return {sum, moment};
}

}  // namespace
}  // namespace gfl
