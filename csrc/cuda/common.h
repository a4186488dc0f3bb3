// What the kernels share: elements, vectors, rows, sums. Device code, internal linkage.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// clang-format off: math.h is written in the primitives that device.h declares
#include "device.h"
#include "shapes.h"
#include "../math.h"
// clang-format on

namespace gfl {

constexpr double kEps = 1.1920928955078125e-07;  // eps(float32), which mmdetection adds

// Elements

// A bfloat16 or a float16. Which of the two is known at run time: kernels for each of them would
// take a few per cent fewer instructions, but be as many again to build and to ship.
struct Half {
  uint16_t bits;
};

template <int kDtype>
struct Element;
template <>
struct Element<GFL_FLOAT32> {
  using type = float;
  using acc = float;
};
template <>
struct Element<GFL_FLOAT64> {
  using type = double;
  using acc = double;
};
template <>
struct Element<kHalf> {
  using type = Half;
  using acc = float;
};

GFL_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
GFL_DEVICE float widen(__half x) { return __half2float(x); }

// 16 bytes of elements; what a thread loads or stores at once.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T of[kSize];
};
template <typename T>
GFL_DEVICE Vector<T> load_vector(const T* from) {
  Vector<T> v;
  *reinterpret_cast<uint4*>(&v) = *reinterpret_cast<const uint4*>(from);
  return v;
}
template <typename T>
GFL_DEVICE void store_vector(T* to, const Vector<T>& v) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&v);
}

// Elements of a launch as numbers to compute with, and back.
template <typename T>
struct Format {
  GFL_MEMBER explicit Format(int) {}

  GFL_MEMBER T widen(T x) const { return x; }
  template <int n>
  GFL_MEMBER void widen(const T (&from)[n], T (&to)[n]) const {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = from[i];
  }
  GFL_MEMBER void narrow(T value, T* to) const { *to = value; }
  template <int n>
  GFL_MEMBER void narrow(const T (&from)[n], T (&to)[n]) const {
    widen(from, to);
  }
};
template <>
struct Format<Half> {
  bool is_bfloat;

  GFL_MEMBER explicit Format(int dtype) : is_bfloat(dtype == GFL_BFLOAT16) {}

  GFL_MEMBER float widen(Half x) const {
    return is_bfloat ? __uint_as_float(uint32_t{x.bits} << 16)
                     : gfl::widen(reinterpret_cast<const __half&>(x));
  }
  template <int n>
  GFL_MEMBER void widen(const Half (&from)[n], float (&to)[n]) const {
    constexpr bool kPairs = n % 2 == 0;  // in one register
    const uint32_t* const pairs = reinterpret_cast<const uint32_t*>(&from);
    if (is_bfloat) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (kPairs) {
          to[i] = __uint_as_float(i % 2 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16);
        } else {
          to[i] = __uint_as_float(uint32_t{from[i].bits} << 16);
        }
      }
    } else {
      const __half* const halves = reinterpret_cast<const __half*>(&from);
#pragma unroll
      for (int i = 0; i < n; ++i) to[i] = __half2float(halves[i]);
    }
  }
  GFL_MEMBER void narrow(float value, Half* to) const {
    if (is_bfloat) {
      *reinterpret_cast<__nv_bfloat16*>(to) = __float2bfloat16_rn(value);
    } else {
      *reinterpret_cast<__half*>(to) = __float2half_rn(value);
    }
  }
  template <int n>
  GFL_MEMBER void narrow(const float (&from)[n], Half (&to)[n]) const {
    if (is_bfloat) {
      __nv_bfloat16* const all = reinterpret_cast<__nv_bfloat16*>(&to);
#pragma unroll
      for (int i = 0; i < n; ++i) all[i] = __float2bfloat16_rn(from[i]);
    } else {
      __half* const all = reinterpret_cast<__half*>(&to);
#pragma unroll
      for (int i = 0; i < n; ++i) all[i] = __float2half_rn(from[i]);
    }
  }
};
// Qualities of a dense target, in pred's dtype or float32; aligned.
template <typename T, int n>
GFL_DEVICE void load_qualities(const Format<T>& format, const void* from, bool is_float,
                               float (&q)[n]) {
  if (sizeof(T) == 4 || !is_float) {
    format.widen(load_vector(static_cast<const T*>(from)).of, q);
  } else {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const Vector<float> v = load_vector(static_cast<const float*>(from) + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) q[i + j] = v.of[j];
    }
  }
}

template <typename T>
GFL_DEVICE float load_quality(const Format<T>& format, const void* target, bool is_float,
                              int64_t at) {
  return is_float ? static_cast<const float*>(target)[at]
                  : format.widen(static_cast<const T*>(target)[at]);
}
// A pointer that the compiler takes as it is. Otherwise it adds a loop's index to the offset that
// the pointer was made of, which takes six instructions at every use instead of one.
template <typename T>
GFL_DEVICE T* settled(T* p) {
  asm("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
  return p;
}
GFL_DEVICE int settled(int n) {
  asm("" : "+r"(n));
  return n;
}
// Whether there is such an operand. Asked in a loop it is not kept in a register until then.
GFL_DEVICE bool given(const Steps& steps) {
  int present = steps.present;
  asm volatile("" : "+r"(present));
  return present;
}
GFL_DEVICE unsigned misalignment(const void* p) { return reinterpret_cast<uintptr_t>(p) & 15; }

// A value of any dtype; float32 is what there nearly always is.
template <typename A>
GFL_DEVICE A load_value(const void* from, int dtype, int64_t at) {
  if (dtype == GFL_FLOAT32) return static_cast<A>(static_cast<const float*>(from)[at]);
  asm volatile("" : "+l"(at));  // or the addresses of all cases would be computed before
  switch (dtype) {
    case GFL_FLOAT64:
      return static_cast<A>(static_cast<const double*>(from)[at]);
    case GFL_BFLOAT16:
      return static_cast<A>(widen(static_cast<const __nv_bfloat16*>(from)[at]));
    case GFL_FLOAT16:
      return static_cast<A>(widen(static_cast<const __half*>(from)[at]));
    case GFL_INT64:
      return static_cast<A>(static_cast<const int64_t*>(from)[at]);
    case GFL_INT32:
      return static_cast<A>(static_cast<const int32_t*>(from)[at]);
    case GFL_INT16:
      return static_cast<A>(static_cast<const int16_t*>(from)[at]);
    case GFL_INT8:
      return static_cast<A>(static_cast<const int8_t*>(from)[at]);
    default:  // uint8, bool
      return static_cast<A>(static_cast<const uint8_t*>(from)[at]);
  }
}

// A label as a class, -1 for whatever is none in [0, classes): -1, 255, NaN, 1.5.
GFL_DEVICE int class_of(const void* labels, int dtype, int64_t at, int classes) {
  if (dtype == GFL_INT64) {
    const uint64_t label = static_cast<const uint64_t*>(labels)[at];
    return label < static_cast<unsigned>(classes) ? static_cast<int>(label) : -1;
  }
  asm volatile("" : "+l"(at));
  if (dtype <= GFL_FLOAT16) {
    const float label = load_value<float>(labels, dtype, at);
    if (!(label >= 0 && label < classes)) return -1;
    const int index = static_cast<int>(label);
    return static_cast<float>(index) == label ? index : -1;
  }
  const int label = load_value<int>(labels, dtype, at);
  return label >= 0 && label < classes ? label : -1;
}

// A bin, a number from 0 on, as an index; 0 for NaN, of which float64 makes the least integer.
template <typename A>
GFL_DEVICE int index_of(A bin) {
  return bin > 0 ? static_cast<int>(bin) : 0;
}

// Rows

// Numbers of rows and their strides are below 2^31 here: plan.cpp sends what has more to the
// general kernels. 64 bits of them would be four multiplications, and a division a function call;
// their products have 64.
GFL_DEVICE int64_t wide_product(int a, int b) {
  int64_t product;  // the compiler would make 64 bits of both, and keep them
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}
GFL_DEVICE int divide(int64_t n, int64_t d) {
  return static_cast<uint32_t>(n) / static_cast<uint32_t>(d);
}

// A row's place along the three innermost dimensions; the others have size 1.
struct RowIndex {
  int outer, middle, inner;

  GFL_MEMBER int64_t offset(const Steps& steps) const {
    return wide_product(inner, steps.row[kInner]) + wide_product(outer, steps.row[kInner - 2]) +
           wide_product(middle, steps.row[kInner - 1]);
  }
};
GFL_DEVICE RowIndex run_at(const RowShape& rows, int run, int inner) {
  if (rows.ndim == 1) return RowIndex{0, 0, inner};
  const int size = rows.size[kInner - 1], outer = divide(run, size);
  return RowIndex{outer, run - outer * size, inner};
}
GFL_DEVICE RowIndex row_at(const RowShape& rows, int row) {
  if (rows.ndim == 1) return RowIndex{0, 0, row};
  const int size = rows.size[kInner], run = divide(row, size);
  return run_at(rows, run, row - run * size);
}

// The same along any number of dimensions.
template <int n>
GFL_DEVICE void locate(const RowShape& rows, int64_t row, const Steps* const (&steps)[n],
                       int64_t (&offsets)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) offsets[i] = 0;
  for (int d = kInner; d > kInner - rows.ndim; --d) {
    const int64_t rest = d == kInner - rows.ndim + 1 ? 0 : row / rows.size[d];
    const int64_t digit = row - rest * rows.size[d];
#pragma unroll
    for (int i = 0; i < n; ++i) offsets[i] += digit * steps[i]->row[d];
    row = rest;
  }
}

// The same, in 32 bits where plan.cpp found that they are enough.
template <typename Shape, int n>
GFL_DEVICE void locate(const Shape& s, int64_t row, const Steps* const (&steps)[n],
                       int64_t (&offsets)[n]) {
  if (!s.simple) return locate(s.rows, row, steps, offsets);
  const RowIndex place = row_at(s.rows, static_cast<int>(row));
#pragma unroll
  for (int i = 0; i < n; ++i) offsets[i] = place.offset(*steps[i]);
}

// scale / (avg_factor + eps)
template <typename A>
GFL_DEVICE A scale_factor(const Scale& s, const void* avg_factor) {
  const A scale = static_cast<A>(s.scale);
  if (avg_factor == nullptr) return scale;
  return scale / (load_value<A>(avg_factor, s.avg_dtype, 0) + static_cast<A>(kEps));
}

// The larger of two numbers; the other one if one is NaN.
GFL_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
GFL_DEVICE double larger(double a, double b) { return fmax(a, b); }

// Sums, in an order that does not depend on timing

// Of the `lanes` neighbours (a power of two) that a thread belongs to. The whole warp takes part.
template <typename A>
GFL_DEVICE A sum_lanes(A value, int lanes) {
  for (int o = lanes >> 1; o > 0; o >>= 1) value += __shfl_xor_sync(~0u, value, o);
  return value;
}
template <typename A>
GFL_DEVICE A max_lanes(A value, int lanes) {
  for (int o = lanes >> 1; o > 0; o >>= 1) {
    value = larger(__shfl_xor_sync(~0u, value, o), value);
  }
  return value;
}

// The block's sum to partials[blockIdx.x]. A thread of the first warp adds up a column of the
// block in A: shuffles in all warps would be more instructions than a row of classes has.
template <int kThreads, typename A>
GFL_DEVICE void leave_sum(A value, double* partials) {
  __shared__ A values[kThreads];
  values[threadIdx.x] = value;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  A column = 0;
#pragma unroll
  for (int i = 0; i < kThreads; i += 32) column += values[i + threadIdx.x];
  const double total = sum_lanes(static_cast<double>(column), 32);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

}  // namespace gfl
