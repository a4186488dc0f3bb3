// What the CPU kernels share: runs of values of any dtype out of strided memory, and scratch
// memory. As all of their code with internal linkage and without std.
#pragma once

#include <type_traits>

#include "../problem.h"
#include "simd.h"

#define GFL_CONCAT_(a, b) a##b
#define GFL_CONCAT(a, b) GFL_CONCAT_(a, b)

namespace gfl {
namespace {

template <typename S>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename S>
using Accumulator = typename AccumulatorOf<S>::type;

template <typename A>
constexpr gfl_dtype kDtype = sizeof(A) == 8 ? GFL_FLOAT64 : GFL_FLOAT32;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Single values and strided runs of any dtype

float to_number(bfloat16 v) { return widen(U16{} + v.bits, bfloat16{})[0]; }
float to_number(float16 v) { return widen(U16{} + v.bits, float16{})[0]; }
template <typename S>
S to_number(S v) {
  return v;
}
template <typename To, typename From>
void convert_run(const From* from, int64_t stride, int64_t n, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    if (stride == 1) {
      std::memcpy(to, from, n * sizeof(To));
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(to_number(from[i * stride]));
}

// n values of an operand, from element offset on, stride apart.
template <typename To>
void load_run(const Operand& o, int64_t offset, int64_t stride, int64_t n, To* to) {
  switch (o.dtype) {
#define GFL_CASE(code, type) \
  case code:                 \
    return convert_run(reinterpret_cast<const type*>(o.data) + offset, stride, n, to)
    GFL_CASE(GFL_FLOAT32, float);
    GFL_CASE(GFL_FLOAT64, double);
    GFL_CASE(GFL_BFLOAT16, bfloat16);
    GFL_CASE(GFL_FLOAT16, float16);
    GFL_CASE(GFL_INT64, int64_t);
    GFL_CASE(GFL_INT32, int32_t);
    GFL_CASE(GFL_INT16, int16_t);
    GFL_CASE(GFL_INT8, int8_t);
    GFL_CASE(GFL_UINT8, uint8_t);
    GFL_CASE(GFL_BOOL, bool);
#undef GFL_CASE
  }
}

// The classes of n rows; -1 for whatever is no class in [0, classes): -1, 255, NaN, 1.5.
inline void load_labels(const Operand& o, int64_t offset, int64_t stride, int64_t n,
                        int64_t classes, int64_t* to) {
  if (o.dtype == GFL_FLOAT32 || o.dtype == GFL_FLOAT64 || o.dtype == GFL_BFLOAT16 ||
      o.dtype == GFL_FLOAT16) {
    for (int64_t i = 0; i < n; ++i) {
      double value;
      load_run(o, offset + i * stride, 1, 1, &value);
      const bool inside = value >= 0 && value < static_cast<double>(classes);
      const int64_t label = inside ? static_cast<int64_t>(value) : -1;
      to[i] = static_cast<double>(label) == value ? label : -1;
    }
    return;
  }
  load_run(o, offset, stride, n, to);
  for (int64_t i = 0; i < n; ++i) to[i] = to[i] >= 0 && to[i] < classes ? to[i] : -1;
}

// A row per lane: to(k, column) for each of the n columns of kLanes rows in their order, row i
// beginning at row(i), its elements `stride` apart.
template <typename S, typename Row, typename To>
__attribute__((always_inline)) inline void rows_to_lanes(int64_t n, int64_t stride, const Row& row,
                                                         const To& to) {
  using V = Vector<Accumulator<S>>;
  constexpr int kN = kLanes<Accumulator<S>>;
  int64_t k = 0;
  if (stride == 1) {
    V square[kN];
    for (; k + kN <= n; k += kN) {
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) square[i] = load(row(i) + k);
      transpose(square);
#pragma GCC unroll 16
      for (int j = 0; j < kN; ++j) to(k + j, square[j]);
    }
    if (const int rest = static_cast<int>(n - k); rest > kN / 4) {
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) square[i] = load_first(row(i) + k, rest);
      transpose(square);
#pragma GCC unroll 16
      for (int j = 0; j < kN; ++j) {
        if (j < rest) to(k + j, square[j]);
      }
      return;
    }
  }
  for (; k < n; ++k) {
    V column;  // lane by lane: a vector loaded from an array would wait for the stores to it
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) column[i] = to_number(row(i)[k * stride]);
    to(k, column);
  }
}

// And back, of the first `lanes`: from(k) is column k.
template <typename S, typename Row, typename From>
__attribute__((always_inline)) inline void lanes_to_rows(int64_t n, int64_t stride, int lanes,
                                                         const Row& row, const From& from) {
  using V = Vector<Accumulator<S>>;
  constexpr int kN = kLanes<Accumulator<S>>;
  int64_t k = 0;
  if (stride == 1) {
    V square[kN];
    for (; k + kN <= n; k += kN) {
#pragma GCC unroll 16
      for (int j = 0; j < kN; ++j) square[j] = from(k + j);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) {
        if (i < lanes) store(row(i) + k, square[i]);
      }
    }
    if (const int rest = static_cast<int>(n - k); rest > kN / 4) {
#pragma GCC unroll 16
      for (int j = 0; j < kN; ++j) square[j] = j < rest ? from(k + j) : V{};
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) {
        if (i < lanes) store_first(row(i) + k, square[i], rest);
      }
      return;
    }
  }
  for (; k < n; ++k) {
    S column[kN];
    store(column, from(k));
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) {
      if (i < lanes) row(i)[k * stride] = column[i];
    }
  }
}

// Cuts arrays out of the scratch memory.
class Scratch {
 public:
  explicit Scratch(void* memory) : next_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t n) {
    T* const array = reinterpret_cast<T*>(next_);
    next_ += (n * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64;
    return array;
  }

 private:
  char* next_;
};

}  // namespace
}  // namespace gfl
