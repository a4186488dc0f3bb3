// The primitives math.h is written in, on scalars of a GPU thread; included before it, by .cu files
// alone.
//
// With GFL_APPROXIMATE the float overloads at the end take the place of math.h's own: instructions
// in which a GPU has hardware, or a term less. Where an error is multiplied by something large
// (beta < 1) a file leaves them out.
#pragma once

#include <cstdint>

#define GFL_DEVICE static __device__ __forceinline__
#define GFL_MEMBER __device__ __forceinline__

namespace gfl {

template <typename T>
struct ScalarOf {
  using type = T;
};
template <typename T>
using scalar_t = typename ScalarOf<T>::type;

template <typename S>
__device__ constexpr S smallest() {
  return sizeof(S) == 4 ? S(1.1754943508222875e-38f) : S(2.2250738585072014e-308);
}

template <typename T>
GFL_DEVICE T broadcast(scalar_t<T> value) {
  return value;
}
GFL_DEVICE float select(bool mask, float yes, float no) { return mask ? yes : no; }
GFL_DEVICE double select(bool mask, double yes, double no) { return mask ? yes : no; }

// The larger of the two; b if either is NaN.
GFL_DEVICE float maximum(float a, float b) { return a > b ? a : b; }
GFL_DEVICE double maximum(double a, double b) { return a > b ? a : b; }
GFL_DEVICE float negative_abs(float x) { return -fabsf(x); }
GFL_DEVICE double negative_abs(double x) { return -fabs(x); }

// 2^n for t = n + bias + 1.5 * 2^(mantissa bits), where n + bias stands in the low bits.
GFL_DEVICE float shift_exponent(float t) { return __int_as_float(__float_as_int(t) << 23); }
GFL_DEVICE double shift_exponent(double t) {
  return __longlong_as_double(__double_as_longlong(t) << 52);
}

// v = 2^n m with m in [sqrt(1/2), sqrt(2)), for normal v > 0. NaN has NaN as its m.
GFL_DEVICE float split_mantissa(float v, float* n) {
  const int exponent = (__float_as_int(v) - 0x3f3504f3) >> 23;
  *n = static_cast<float>(exponent);
  return v == v ? __int_as_float(__float_as_int(v) - (exponent << 23)) : v;
}
GFL_DEVICE double split_mantissa(double v, double* n) {
  const int64_t exponent = (__double_as_longlong(v) - 0x3fe6a09e667f3bcd) >> 52;
  *n = static_cast<double>(exponent);
  return v == v ? __longlong_as_double(__double_as_longlong(v) - (exponent << 52)) : v;
}
GFL_DEVICE float floor_small(float t) { return floorf(t); }
GFL_DEVICE double floor_small(double t) { return floor(t); }
GFL_DEVICE double reciprocal(double x) { return 1 / x; }
GFL_DEVICE float square_root(float x) { return sqrtf(x); }
GFL_DEVICE double square_root(double x) { return sqrt(x); }

#if defined(GFL_APPROXIMATE)

// 1 / x.  Valid: normal x below 2^126, NaN.  Max error: 1 ulp.
GFL_DEVICE float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// exp(x).  Valid: x <= 88, -inf and NaN included.  Max relative error: 2^-22 + 6e-8 |x|, because
// x log2(e) is rounded before 2^x.  0 below the smallest normal number.
GFL_DEVICE float exponential(float x) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * 1.4426950408889634f));
  return e;
}

// exp(x).  Valid: x <= 88, -inf and NaN included.  Max relative error: 0.7 ulp for |x| < 1/8, that
// of exponential() beyond.
GFL_DEVICE float exponential_near_one(float x) {
  float p = x * (1.0f / 120) + 1.0f / 24;
  p = p * x + 1.0f / 6;
  p = p * x + 0.5f;
  p = p * x + 1.0f;
  return fabsf(x) < 0.125f ? p * x + 1.0f : exponential(x);
}

// log(1 + e).  Valid: e in [0, 1], NaN.  Max relative error: 3.4e-7, or 1.5e-6 if kHalf.  Not
// lg2.approx, which is good to 2^-22 absolute near 1.
template <bool kHalf = false>
GFL_DEVICE float log1p_unit(float e) {
  float p;
  if (kHalf) {
    p = e * 0.014141022227704525f - 0.06640179455280304f;
    p = p * e + 0.14922386407852173f;
    p = p * e - 0.2350386083126068f;
    p = p * e + 0.33109450340270996f;
    p = p * e - 0.4998696446418762f;
    p = p * e + 0.9999987483024597f;
    return p * e;
  }
  p = e * -0.008539197801925138f + 0.04408959149373808f;
  p = p * e - 0.10768165299070905f;
  p = p * e + 0.17745236940510242f;
  p = p * e - 0.2449546105570622f;
  p = p * e + 0.3327547943749218f;
  p = p * e - 0.4999740537328888f;
  p = p * e + 0.9999998056682943f;
  return p * e;
}

// log(v).  Valid: v in [0, 7/8], NaN; 0 gives -inf, less than that NaN.  Max relative error: 3.5e-7
// up to 1/2, 1.3e-6 up to 7/8.  Without .ftz, for denormals, it is five instructions and not two.
template <bool kNormal = false>
GFL_DEVICE float logarithm_below_one(float v) {
  float log2_v;
  if (kNormal) {
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2_v) : "f"(v));
  } else {
    asm("lg2.approx.f32 %0, %1;" : "=f"(log2_v) : "f"(v));
  }
  return log2_v * 0.6931471805599453f;
}

// log(1 - p).  Valid: p in [0, 1/2], NaN; p in [0, 1/8] if kHalf.  Max relative error: 2.9e-7, or
// 6.1e-7 if kHalf.
template <bool kHalf = false>
GFL_DEVICE float log1m(float p) {
  float y;
  if (kHalf) {
    y = p * 0.3083760738372803f + 0.3285427391529083f;
    y = y * p + 0.5001226663589478f;
    y = y * p + 0.9999995231628418f;
    return -(y * p);
  }
  y = p * 1.184933066368103f - 1.081543207168579f;
  y = y * p + 0.7854332327842712f;
  y = y * p + 0.03801724687218666f;
  y = y * p + 0.2722506821155548f;
  y = y * p + 0.33186259865760803f;
  y = y * p + 0.5000365376472473f;
  y = y * p + 0.9999998807907104f;
  return -(y * p);
}

#else

GFL_DEVICE float reciprocal(float x) { return 1 / x; }

#endif

}  // namespace gfl
