// The mathematics, once for every C++ backend: branch-free templates over T, which is float or
// double on a GPU and a vector of them in the CPU kernels. Names and order are those of
// gfl_kernels/reference.py.
//
// Notation: s = sigmoid(x), d = s - q, B = bce(x, q).
//
// T has the arithmetic operators and comparisons; select, negative_abs, maximum, shift_exponent,
// split_mantissa, reciprocal and square_root are overloaded for the vector types in cpu/simd.h and
// for a GPU's scalars in cuda/device.h, before this file is included; so may be any function below
// that has a cheaper form on a machine. Every function has internal linkage: the same template is
// compiled for several instruction sets, and the linker must not choose one for all.
#pragma once

#include "gfl_kernels/gfl_kernels.h"

#if defined(__CUDACC__)
#define GFL_HD static __device__ __forceinline__
#elif defined(__GNUC__)
#define GFL_HD static inline __attribute__((always_inline))
#else
#define GFL_HD static inline
#endif

namespace gfl {

// Exponential and logarithm

// exp(x).  Valid: x <= 88, -inf and NaN included.  Max relative error: 1e-7 (float), 2.3e-16
// (double). 0 below the smallest normal number, so that softmax tails and saturated sigmoids make
// no denormals; kBounded: |x| <= 80, so there are none.
template <bool kBounded = false, typename T>
GFL_HD T exponential(T x) {
  using S = scalar_t<T>;
  if constexpr (sizeof(S) == 4) {
    // The constant carries n + 127 in its low bits: shift_exponent makes 2^n of it. Multiplied and
    // not added to the exponent field, or a NaN would come out as a number.
    const T t = x * S(1.44269504f) + S(12582912.0f + 127.0f);
    const T n = t - S(12582912.0f + 127.0f);
    T r = x - n * S(0.693359375f);  // ln 2 in two parts; the product with the first is exact
    r = r - n * S(-2.12194440e-4f);
    T p = r * S(0.00138131422637709f) + S(0.008369418802357927f);
    p = p * r + S(0.04166845681945763f);
    p = p * r + S(0.16666514791863757f);
    p = p * r + S(0.49999993050676267f);
    p = p * r + S(1);
    p = p * r + S(1);
    p = p * shift_exponent(t);
    return kBounded ? p : select(x < S(-87.33f), broadcast<T>(S(0)), p);
  } else {
    const T t = x * S(1.4426950408889634) + S(6755399441055744.0 + 1023.0);
    const T n = t - S(6755399441055744.0 + 1023.0);
    T r = x - n * S(6.93147180369123816490e-01);
    r = r - n * S(1.90821492927058770002e-10);
    // Taylor to degree 13 on |r| <= ln(2) / 2: the remainder is below 5e-18.
    T p = r * S(1.0 / 6227020800.0) + S(1.0 / 479001600.0);
    p = p * r + S(1.0 / 39916800.0);
    p = p * r + S(1.0 / 3628800.0);
    p = p * r + S(1.0 / 362880.0);
    p = p * r + S(1.0 / 40320.0);
    p = p * r + S(1.0 / 5040.0);
    p = p * r + S(1.0 / 720.0);
    p = p * r + S(1.0 / 120.0);
    p = p * r + S(1.0 / 24.0);
    p = p * r + S(1.0 / 6.0);
    p = p * r + S(0.5);
    p = (p * r) * r + (r + S(1));
    p = p * shift_exponent(t);
    return kBounded ? p : select(x < S(-708.39), broadcast<T>(S(0)), p);
  }
}

// 2 atanh(f / (2 + f)) = log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], double: |z| <= 0.172,
// remainder below 1e-17.
template <typename T>
GFL_HD T log1p_series(T f) {
  using S = scalar_t<T>;
  const T z = f / (f + S(2));
  const T y = z * z;
  T p = y * S(2.0 / 21.0) + S(2.0 / 19.0);
  p = p * y + S(2.0 / 17.0);
  p = p * y + S(2.0 / 15.0);
  p = p * y + S(2.0 / 13.0);
  p = p * y + S(2.0 / 11.0);
  p = p * y + S(2.0 / 9.0);
  p = p * y + S(2.0 / 7.0);
  p = p * y + S(2.0 / 5.0);
  p = p * y + S(2.0 / 3.0);
  return z * S(2) + (z * y) * p;
}

// log(1 + e).  Valid: e in [0, 1], NaN.  Max relative error: 2e-7 (float), 3.6e-16 (double).
// Not log(1 + e): in float32 that is 0 for every e below 6e-8, a logit of -17.  kHalf: the logit
// was a half float, rounded to 2^-12 at best; a machine may have a cheaper form for it.
template <bool kHalf = false, typename T>
GFL_HD T log1p_unit(T e) {
  using S = scalar_t<T>;
  if constexpr (sizeof(S) == 4) {
    T p = e * S(0.005232699341333869f) + S(-0.02950525518431116f);
    p = p * e + S(0.07822597113722513f);
    p = p * e + S(-0.1366324669758161f);
    p = p * e + S(0.19106006795348082f);
    p = p * e + S(-0.2484298211563429f);
    p = p * e + S(0.33319096783792534f);
    p = p * e + S(-0.49999493139629136f);
    return (p * e) * e + e * S(0.9999999698801978f);
  } else {
    const auto large = e > S(0.41421356237309503);
    const T f = select(large, (e - S(1)) * S(0.5), e);
    return log1p_series(f) + select(large, broadcast<T>(S(0.6931471805599453)), broadcast<T>(S(0)));
  }
}

// log(v).  Valid: normal v > 0, NaN.  Max relative error: 1.1e-7 (float), 3.3e-16 (double).
template <typename T>
GFL_HD T logarithm(T v) {
  using S = scalar_t<T>;
  T n;
  const T f = split_mantissa(v, &n) - S(1);  // v = 2^n (1 + f), 1 + f in [sqrt(1/2), sqrt(2))
  if constexpr (sizeof(S) == 4) {
    T p = f * S(0.0870044628880524f) + S(-0.14267489580370582f);
    p = p * f + S(0.14914765724289647f);
    p = p * f + S(-0.16577584312638893f);
    p = p * f + S(0.19963063946436482f);
    p = p * f + S(-0.2500133704941046f);
    p = p * f + S(0.333339107346837f);
    const T square = f * f;
    p = (p * f) * square + n * S(-2.12194440e-4f);
    return n * S(0.693359375f) + (f + (p - square * S(0.5)));
  } else {
    return n * S(6.93147180369123816490e-01) +
           (n * S(1.90821492927058770002e-10) + log1p_series(f));
  }
}

// log(v).  Valid: v in [0, 1), NaN; 0 gives a number below -100.  Max relative error: 1.1e-7
// (float), 3.3e-16 (double).  A denormal, sigmoid(-95) in float32, has a logarithm too.  kNormal:
// there is none; a machine may have a cheaper form then.
template <bool kNormal = false, typename T>
GFL_HD T logarithm_below_one(T v) {
  using S = scalar_t<T>;
  const auto tiny = v < smallest<S>();
  return logarithm(select(tiny, v * S(0x1p64), v)) -
         select(tiny, broadcast<T>(S(44.3614195558364998)), broadcast<T>(S(0)));  // 64 ln 2
}

// log(1 - p).  Valid: p in [0, 1), NaN.  Max relative error: 1.5e-7 (float), 3.6e-16 (double).  The
// correction restores what 1 - p rounds away for small p.  kHalf: p was a half float; a machine may
// have a cheaper form for p <= 1/8.
template <bool kHalf = false, typename T>
GFL_HD T log1m(T p) {
  using S = scalar_t<T>;
  const T u = S(1) - p;
  return logarithm(u) - (p - (S(1) - u)) / u;
}

// exp(x) where every digit of a result near 1 counts.  Valid as exponential().  A machine whose
// exponential() is an instruction of fewer digits has its own form.
template <typename T>
GFL_HD T exponential_near_one(T x) {
  return exponential(x);
}

// |d|^beta for |d| in (0, 1.1], given log |d|; the caller takes care of d = 0.
template <typename T>
GFL_HD T pow_abs(T log_abs_d, scalar_t<T> beta) {
  return exponential(log_abs_d * beta);
}

// atan(x).  Valid: all.  Max relative error: 1.5e-7 (float), 2.5e-16 (double).
template <typename T>
GFL_HD T arctangent(T x) {
  using S = scalar_t<T>;
  const T a = -negative_abs(x), zeros = broadcast<T>(S(0)), ones = broadcast<T>(S(1));
  // |z| <= tan(pi / 8):  atan(a) = pi / 2 + atan(-1 / a) = pi / 4 + atan((a - 1) / (a + 1)).
  const auto steep = a > S(2.414213562373095);
  const auto middle = a > S(0.41421356237309503);
  const T z = select(steep, -ones, select(middle, a - S(1), a)) /
              select(steep, a, select(middle, a + S(1), ones));
  const T base = select(steep, broadcast<T>(S(1.5707963267948966)),
                        select(middle, broadcast<T>(S(0.7853981633974483)), zeros));
  const T y = z * z;
  T p;
  if constexpr (sizeof(S) == 4) {
    p = y * S(-0.06451718509197235f) + S(0.10743668675422668f);
    p = p * y + S(-0.14263950288295746f);
    p = p * y + S(0.19999539852142334f);
    p = p * y + S(-0.3333333134651184f);
  } else {
    p = y * S(-0.013916943217800841) + S(0.03063443323901452);
    p = p * y + S(-0.04104381417807643);
    p = p * y + S(0.04719381457895137);
    p = p * y + S(-0.052580394289794816);
    p = p * y + S(0.05881925033877732);
    p = p * y + S(-0.06666642004996545);
    p = p * y + S(0.07692306735321475);
    p = p * y + S(-0.0909090906699066);
    p = p * y + S(0.11111111110754406);
    p = p * y + S(-0.14285714285711515);
    p = p * y + S(0.19999999999999993);
    p = p * y + S(-0.3333333333333333);
  }
  const T angle = base + (z + (z * y) * p);
  return select(x < S(0), -angle, angle);
}

// Quality family

// A loss and its derivative in x, per element.
template <typename T>
struct LossGrad {
  T loss, grad;
};

// What every formula on logits starts from. With a = |x|, e = exp(-a):  w = e / (1 + e) =
// sigmoid(-a), ds = s (1 - s) = w / (1 + e).  tau = 1 - q for x >= 0, else q; then |x| tau +
// log1p(e) = B and tau - w = sign(x) d. Nothing cancels, nothing overflows: +-inf counts as the
// largest finite number.
template <typename T>
struct Logistic {
  T log1p_e, w, ds, a, e, r;  // r = 1 / (1 + e)
};

template <bool kHalf = false, typename T>
GFL_HD Logistic<T> logistic(T x) {
  using S = scalar_t<T>;
  const T na = negative_abs(x);
  const T e = exponential(na);
  const T r = reciprocal(e + S(1));
  const T w = e * r;
  return {log1p_unit<kHalf>(e), w, w * r, -na, e, r};
}

// B = |x| tau + log1p(e), without the first term for tau = 0: an infinite logit on the right side.
template <typename T>
GFL_HD T cross_entropy(T a, T tau, T log1p_e) {
  using S = scalar_t<T>;
  return select(tau == S(0), log1p_e, a * tau + log1p_e);
}

// Quality Focal Loss with beta = 2 on a background element, q = 0:  L = s^2 softplus(x),
// dL/dx = s^2 (s + 2 (1 - s) softplus(x)).
template <bool kHalf = false, typename T>
GFL_HD LossGrad<T> quality_background_loss_grad(T x) {
  using S = scalar_t<T>;
  const T na = negative_abs(x);
  const T e = exponential(na);
  const T r = reciprocal(e + S(1));
  const T w = e * r;
  const auto positive = x >= S(0);
  const T s = select(positive, r, w);
  const T b = log1p_unit<kHalf>(e) + select(positive, -na, broadcast<T>(S(0)));
  const T square = s * s;
  const T rest = select(positive, w, r);  // 1 - s
  return {square * b, square * ((rest + rest) * b + s)};
}

// Quality Focal Loss with beta = 2:  L = d^2 B,  dL/dx = d^2 d + 2 d s (1 - s) B.
template <bool kHalf = false, typename T>
GFL_HD LossGrad<T> quality_square_loss_grad(T x, T q) {
  using S = scalar_t<T>;
  const Logistic<T> c = logistic<kHalf>(x);
  const auto positive = x >= S(0);
  const T tau = select(positive, S(1) - q, q);
  const T b = cross_entropy(c.a, tau, c.log1p_e);
  const T d = tau - c.w;  // sign(x) d
  const T square = d * d;
  const T g = d * ((b + b) * c.ds + square);
  return {square * b, select(positive, g, -g)};
}

// Binary cross entropy, Quality Focal Loss with beta = 0:  L = B,  dL/dx = d.
template <typename T>
GFL_HD LossGrad<T> bce_with_logits_loss_grad(T x, T q) {
  using S = scalar_t<T>;
  const Logistic<T> c = logistic(x);
  const auto positive = x >= S(0);
  const T tau = select(positive, S(1) - q, q);
  const T d = tau - c.w;  // sign(x) d
  return {cross_entropy(c.a, tau, c.log1p_e), select(positive, d, -d)};
}

// Quality Focal Loss:  L = |d|^beta B,  dL/dx = |d|^beta d + beta |d|^(beta - 1) sign(d) s (1 - s)
// B,  both terms of w = |d|^beta being 0^beta and 0 at d = 0.  For q = 0 the second is beta s^beta
// (1 - s) B, finite for every beta >= 0: s (1 - s) / |d| is taken as 1 - s there, which matters
// where s underflows.
template <typename T>
GFL_HD LossGrad<T> quality_loss_grad(T x, T q, scalar_t<T> beta) {
  using S = scalar_t<T>;
  Logistic<T> c = logistic(x);
  // w again to the last digit, with the remainder of its division (exact where multiplications are
  // fused): for beta < 1 the slope at small d multiplies the rounding error.
  const T sum = c.e + S(1);
  c.w = c.w + ((c.e - c.w * sum) - c.w * (c.e - (sum - S(1)))) * c.r;
  const auto positive = x >= S(0);
  const T tau = select(positive, S(1) - q, q);
  const T b = cross_entropy(c.a, tau, c.log1p_e);
  const T d = tau - c.w;
  const T size = -negative_abs(d);
  const auto zero = size <= S(0);
  const T safe = select(zero, broadcast<T>(S(1)), size);
  const T power =
      select(zero, broadcast<T>(beta == S(0) ? S(1) : S(0)), pow_abs(logarithm(safe), beta));
  T slope = c.ds / safe;                                                // s (1 - s) / |d|
  slope = select(q == S(0), select(positive, c.w, S(1) - c.w), slope);  // 1 - s
  const T sign =
      select(zero, broadcast<T>(S(0)), select(d > S(0), broadcast<T>(S(1)), broadcast<T>(S(-1))));
  const T g = power * (d + beta * (sign * (slope * b)));
  return {power * b, select(positive, g, -g)};
}

// |d|^beta and its derivative beta |d|^(beta - 1) sign(d), which is 0 at d = 0.
template <typename T>
struct PowerSlope {
  T power, slope;
};
template <typename T>
GFL_HD PowerSlope<T> power_slope(T d, scalar_t<T> beta) {
  using S = scalar_t<T>;
  if (beta == S(2)) return {d * d, d + d};
  const T zeros = broadcast<T>(S(0)), ones = broadcast<T>(S(1));
  const T size = -negative_abs(d);
  const auto zero = size < smallest<S>();
  const T safe = select(zero, ones, size);
  const T power =
      select(zero, broadcast<T>(beta == S(0) ? S(1) : S(0)), pow_abs(logarithm(safe), beta));
  const T slope = beta * (power / safe);
  return {power, select(zero, zeros, select(d > S(0), slope, -slope))};
}

// Binary cross entropy of probabilities:  B = -q log p - (1 - q) log(1 - p) with logs clamped at
// -100;  dB/dp = (p - q) / max(p (1 - p), 1e-12): F.binary_cross_entropy's rules.  kBackground: q
// is 0, and a NaN is left to a factor |p|^beta.  kHalf: p was a half float.
template <bool kBackground = false, bool kHalf = false, typename T>
GFL_HD LossGrad<T> bce_loss_grad(T p, T q) {
  using S = scalar_t<T>;
  const T zeros = broadcast<T>(S(0)), floor = broadcast<T>(S(-100));
  const T u = S(1) - p;
  T b, reach;
  auto beyond = u < S(0);
  if (kBackground) {  // B = -log(1 - p) alone
    reach = maximum(p, zeros);
    const T far = maximum(logarithm_below_one<true>(maximum(u, zeros)), floor);
    b = -select(p >= S(kHalf ? 0.125 : 0.5), far, log1m<kHalf>(reach));
  } else {
    // m is the smaller of p and 1 - p. Its logarithm is far from 0, the other's is log(1 - m).
    reach = p - q;
    const auto upper = p >= S(0.5);
    T m = select(upper, u, p);
    beyond = m < S(0);
    m = select(beyond, zeros, m);
    const T near = log1m(m);
    T far = logarithm_below_one(m);
    far = select(far < floor, floor, far);
    b = (q - S(1)) * select(upper, far, near) - q * select(upper, near, far);
  }
  // The float that PyTorch has in every dtype.
  const T spread = maximum(p * u, broadcast<T>(S(1e-12f)));
  // A p beyond [0, 1] stands still.
  return {b, select(beyond, zeros, reach * reciprocal(spread))};
}

// Quality Focal Loss on probabilities:  L = |d|^beta B, d = p - q, B as above.  kBackground: q is
// 0.  kHalf: p was a half float.
template <bool kBackground = false, bool kHalf = false, typename T>
GFL_HD LossGrad<T> quality_probability_loss_grad(T p, T q, scalar_t<T> beta) {
  const LossGrad<T> b = bce_loss_grad<kBackground, kHalf>(p, q);
  const PowerSlope<T> w = power_slope(kBackground ? p : p - q, beta);
  return {w.power * b.loss, w.power * b.grad + w.slope * b.loss};
}

// The factor that weighs positives, q > 0, against the rest: alpha, 1 - alpha.
template <typename T>
GFL_HD T balance(T q, scalar_t<T> alpha) {
  using S = scalar_t<T>;
  return select(q > S(0), broadcast<T>(alpha), broadcast<T>(S(1) - alpha));
}

// log s = x - softplus(x).
template <typename T>
GFL_HD T log_sigmoid(const Logistic<T>& c, T x) {
  using S = scalar_t<T>;
  return -(c.log1p_e + select(x >= S(0), broadcast<T>(S(0)), c.a));
}

// s^gamma.
template <typename T>
GFL_HD T sigmoid_power(const Logistic<T>& c, T x, scalar_t<T> gamma) {
  using S = scalar_t<T>;
  const T s = select(x >= S(0), c.r, c.w);
  if (gamma == S(2)) return s * s;
  return gamma == S(0) ? broadcast<T>(S(1)) : pow_abs(log_sigmoid(c, x), gamma);
}

// What an element of target 0 has in nearly all of the family:  L = alpha s^gamma softplus(x),
// dL/dx = alpha s^gamma (s + gamma (1 - s) softplus(x)), without the second term if the weight is
// detached.
template <bool kHalf = false, typename T>
GFL_HD LossGrad<T> background_loss_grad(T x, scalar_t<T> alpha, scalar_t<T> gamma,
                                        bool detach_weight) {
  using S = scalar_t<T>;
  const Logistic<T> c = logistic<kHalf>(x);
  const auto right = x >= S(0);
  const T b = c.log1p_e + select(right, c.a, broadcast<T>(S(0)));
  T slope = select(right, c.r, c.w);
  const T weight = sigmoid_power(c, x, gamma) * alpha;
  if (!detach_weight) slope = slope + select(right, c.w, c.r) * b * gamma;
  return {weight * b, weight * slope};
}

// L = w B,  w = weight on positives, alpha s^gamma on the others;  dL/dx = w d, on the others + w
// gamma (1 - s) B unless the weight is detached.  Varifocal Loss has weight = q.
template <typename T, typename Mask>
GFL_HD LossGrad<T> varifocal_loss_grad(T x, T q, T weight, Mask positive, scalar_t<T> alpha,
                                       scalar_t<T> gamma, bool detach_weight) {
  using S = scalar_t<T>;
  const Logistic<T> c = logistic(x);
  const auto right = x >= S(0);
  const T tau = select(right, S(1) - q, q);
  const T b = cross_entropy(c.a, tau, c.log1p_e);
  T d = tau - c.w;
  d = select(right, d, -d);
  weight = select(positive, weight, sigmoid_power(c, x, gamma) * alpha);
  if (!detach_weight) {
    const T rest = select(right, c.w, c.r);  // 1 - s
    d = d + select(positive, broadcast<T>(S(0)), rest * b * gamma);
  }
  return {weight * b, weight * d};
}

// The same on probabilities:  B as in bce_loss_grad, alpha p^gamma on the others.
template <typename T, typename Mask>
GFL_HD LossGrad<T> varifocal_probability_loss_grad(T p, T q, T weight, Mask positive,
                                                   scalar_t<T> alpha, scalar_t<T> gamma,
                                                   bool detach_weight) {
  using S = scalar_t<T>;
  const LossGrad<T> b = bce_loss_grad(p, q);
  const PowerSlope<T> w = power_slope(p, gamma);
  weight = select(positive, weight, w.power * alpha);
  T grad = weight * b.grad;
  if (!detach_weight) {
    grad = grad + select(positive, broadcast<T>(S(0)), w.slope * alpha) * b.loss;
  }
  return {weight * b.loss, grad};
}

// q^gamma, what Matchability-Aware Loss trains positives to, and 0 for q <= 0.  The loss of a
// saturated logit is x (1 - target): near 1 every digit counts.
template <typename T>
GFL_HD T matchability_target(T q, scalar_t<T> gamma) {
  using S = scalar_t<T>;
  const auto zero = q < smallest<S>();
  const T log_q = logarithm(select(zero, broadcast<T>(S(1)), q));
  return select(zero, broadcast<T>(S(0)), exponential_near_one(log_q * gamma));
}

// max(s^alpha q^(1 - alpha), 0.01), a constant: what IA-BCE trains positives to.
template <typename T>
GFL_HD T iou_aware_target(T x, T q, scalar_t<T> alpha) {
  using S = scalar_t<T>;
  const auto zero = q < smallest<S>();
  const T log_q = logarithm(select(zero, broadcast<T>(S(1)), q)) * (S(1) - alpha);
  const T log_s =
      alpha == S(0) ? broadcast<T>(S(0)) : log_sigmoid(logistic(x), x) * alpha;  // 0^0 = 1
  const T least = broadcast<T>(S(0.01)), target = exponential_near_one(log_q + log_s);
  return select(zero, least, select(target < least, least, target));
}

// alpha y + (1 - alpha) (1 - y), or 1 for alpha < 0.
template <typename T>
GFL_HD T focal_alpha(T y, scalar_t<T> alpha) {
  using S = scalar_t<T>;
  return alpha < S(0) ? broadcast<T>(S(1)) : y * (alpha + alpha - S(1)) + (S(1) - alpha);
}

// Focal Loss:  L = alpha_t m^gamma B,  m = y (1 - s) + (1 - y) s;  dL/dx = alpha_t m^gamma (d +
// gamma (1 - 2 y) s (1 - s) / m B).  m = tau (1 - w) + (1 - tau) w, where nothing cancels, and
// (1 - 2 y) s (1 - s) / m = sign(x) (2 tau - 1) w (1 - w) / m, in which the last two are 1 - w for
// tau = 0, also where w underflows.
template <typename T>
GFL_HD LossGrad<T> focal_loss_grad(T x, T y, scalar_t<T> alpha, scalar_t<T> gamma) {
  using S = scalar_t<T>;
  const T zeros = broadcast<T>(S(0));
  const Logistic<T> c = logistic(x);
  const auto right = x >= S(0);
  const T tau = select(right, S(1) - y, y);
  const T b = cross_entropy(c.a, tau, c.log1p_e);
  const T d = tau - c.w;  // sign(x) d
  const T turn = tau + tau - S(1);
  const T m = tau * c.r + (S(1) - tau) * c.w;
  T power, slope;  // m^gamma; gamma m^(gamma - 1) s (1 - s)
  if (gamma == S(2)) {
    power = m * m;
    slope = (m + m) * c.ds;
  } else {
    const auto zero = m < smallest<S>();
    const T safe = select(zero, broadcast<T>(S(1)), m);
    power =
        select(zero, broadcast<T>(gamma == S(0) ? S(1) : S(0)), pow_abs(logarithm(safe), gamma));
    slope = power * select(tau == S(0), c.r, select(zero, zeros, c.ds / safe)) * gamma;
  }
  const T factor = focal_alpha(y, alpha);
  const T g = factor * (power * d + turn * slope * b);
  return {factor * power * b, select(right, g, -g)};
}

// The same on probabilities:  m = y (1 - p) + (1 - y) p, B as in bce_loss_grad.
template <typename T>
GFL_HD LossGrad<T> focal_probability_loss_grad(T p, T y, scalar_t<T> alpha, scalar_t<T> gamma) {
  using S = scalar_t<T>;
  const LossGrad<T> b = bce_loss_grad(p, y);
  const PowerSlope<T> w = power_slope(y * (S(1) - p) + (S(1) - y) * p, gamma);
  const T factor = focal_alpha(y, alpha);
  return {factor * w.power * b.loss,
          factor * (w.power * b.grad + w.slope * (S(1) - (y + y)) * b.loss)};
}

// An element in any form (a gfl_form).  positive: where the weight of varifocal forms is that of a
// positive; q is 0 elsewhere.  beta is the exponent, which papers call gamma too.
template <int kForm, typename T, typename Mask>
GFL_HD LossGrad<T> form_loss_grad(T x, T q, Mask positive, int flags, scalar_t<T> alpha,
                                  scalar_t<T> beta) {
  using S = scalar_t<T>;
  const T ones = broadcast<T>(S(1));
  const bool detach = flags & GFL_DETACH_WEIGHT, unit = flags & GFL_UNIT_POSITIVES;
  if constexpr (kForm == GFL_PROBABILITIES) {
    return quality_probability_loss_grad(x, q, beta);
  } else if constexpr (kForm == GFL_VARIFOCAL) {
    return varifocal_loss_grad(x, q, unit ? ones : q, positive, alpha, beta, detach);
  } else if constexpr (kForm == GFL_VARIFOCAL_PROBABILITIES) {
    return varifocal_probability_loss_grad(x, q, unit ? ones : q, positive, alpha, beta, detach);
  } else if constexpr (kForm == GFL_FOCAL) {
    return focal_loss_grad(x, q, alpha, beta);
  } else if constexpr (kForm == GFL_FOCAL_PROBABILITIES) {
    return focal_probability_loss_grad(x, q, alpha, beta);
  } else if constexpr (kForm == GFL_MATCHABILITY) {
    return varifocal_loss_grad(x, matchability_target(q, beta), ones, positive, alpha, beta, true);
  } else if constexpr (kForm == GFL_IOU_AWARE) {
    const T target = select(positive, iou_aware_target(x, q, alpha), q);
    return varifocal_loss_grad(x, target, ones, positive, S(1), beta, false);
  } else {
    LossGrad<T> r = beta == S(2) ? quality_square_loss_grad(x, q) : quality_loss_grad(x, q, beta);
    if constexpr (kForm == GFL_BALANCED) {
      const T factor = balance(q, alpha);
      r = {factor * r.loss, factor * r.grad};
    }
    return r;
  }
}

// Distribution family

// l = floor(t), wl = l + 1 - t, wr = t - l, with t clamped into [0, bins - 1].  NaN weights for
// NaN.
template <typename T>
GFL_HD void split_target(T t, scalar_t<T> last_bin, T* left, T* wl, T* wr) {
  using S = scalar_t<T>;
  t = select(t < S(0), broadcast<T>(S(0)), select(t > last_bin, broadcast<T>(last_bin), t));
  *left = floor_small(t);
  *wr = t - *left;
  *wl = (*left + S(1)) - t;
}

// Distribution Focal Loss of a row out of its pieces, z shifted by its maximum: L = (wl + wr)
// log(sum_k exp(z_k)) - wl z_l - wr z_r.  A side of weight 0 contributes 0 even if its z is -inf.
template <typename T>
GFL_HD T distribution_loss(T log_sum, T wl, T wr, T z_left, T z_right) {
  using S = scalar_t<T>;
  const T zeros = broadcast<T>(S(0));
  const T left = select(wl == S(0), zeros, wl * z_left);
  const T right = select(wr == S(0), zeros, wr * z_right);
  return (wl + wr) * log_sum - left - right;
}

// dL/dz_k = (wl + wr) p_k - wl [k = l] - wr [k = r], out of total_p = (wl + wr) p_k; total_p, wl
// and wr may have a common factor. A bin is not both l and r.
template <typename T, typename Mask>
GFL_HD T distribution_grad(T total_p, Mask is_left, Mask is_right, T wl, T wr) {
  using S = scalar_t<T>;
  const T zeros = broadcast<T>(S(0));
  return total_p - select(is_left, wl, select(is_right, wr, zeros));
}

// dE/dz_k = p_k (y_k - E),  E = sum_k y_k p_k.  The derivative of the statistics too: y_k is then
// what comes from upstream for bin k.
template <typename T>
GFL_HD T expectation_grad(T p, T y, T expectation) {
  return p * (y - expectation);
}

// 1 for a bin at most `window` bins from the peak, else 0: a factor of exp(z_k), in which a NaN
// stays. The peak is the highest bin, of equals the first one.
template <typename T>
GFL_HD T peak_window(T bin, T peak, scalar_t<T> window) {
  using S = scalar_t<T>;
  return select(negative_abs(bin - peak) < -window, broadcast<T>(S(0)), broadcast<T>(S(1)));
}

// p s where p is not 0: s may be -inf there.  The entropy is H = log(sum_k exp(s_k)) - sum_k p_k
// s_k, s = z shifted by its maximum; both parts are positive.
template <typename T>
GFL_HD T entropy_term(T p, T s) {
  using S = scalar_t<T>;
  return select(p == S(0), p, p * s);
}

// d sqrt(v) / dv = 1 / (2 sqrt(v)), 0 at v = 0, out of root = sqrt(v).
template <typename T>
GFL_HD T square_root_grad(T root) {
  using S = scalar_t<T>;
  const auto zero = root == S(0);
  return select(zero, root, S(0.5) / select(zero, broadcast<T>(S(1)), root));
}

// What the derivative of the moments of a row is made of: E = sum_k p_k y_k, V = sum_k p_k (y_k -
// E)^2, sum_k p_k s_k, and the upstream gradients of E, of V (out of that of sqrt(V)) and of H.
template <typename T>
struct Moments {
  T mean, variance, mean_s, by_mean, by_variance, by_entropy;
};

// dL/dz_k = p_k (g_E (y_k - E) + g_V ((y_k - E)^2 - V) - g_H (s_k - sum_j p_j s_j)).
template <typename T>
GFL_HD T moments_grad(T p, T y, T s, const Moments<T>& m) {
  const T away = y - m.mean;
  return p * (m.by_mean * away + m.by_variance * (away * away - m.variance)) -
         m.by_entropy * entropy_term(p, s - m.mean_s);
}

// Distillation: with a = (z - max z) / T of student and teacher, p = softmax(a), the teacher's a
// constant,  KL(p_t || p_s) = sum_k p_t,k (a_t,k - a_s,k) + log sum_k exp(a_s,k) - log sum_k
// exp(a_t,k).  A bin of p_t = 0 has no part in it.
template <typename T>
GFL_HD T distillation_term(T p_teacher, T gap) {
  using S = scalar_t<T>;
  return select(p_teacher == S(0), p_teacher, p_teacher * gap);
}
template <typename T>
GFL_HD T distillation_loss(T sum_of_terms, T log_sum, T log_sum_teacher) {
  return sum_of_terms + (log_sum - log_sum_teacher);
}

// T dKL/dz_k = p_s,k - p_t,k.
template <typename T>
GFL_HD T distillation_grad(T p, T p_teacher) {
  return p - p_teacher;
}

// Box term. Boxes are x1, y1, x2, y2 in units of the stride; sides 0 to 3 are left, top, right and
// bottom. A point's coordinate is x for left and right, y for the others.

// The box's coordinate at a distance from a point's: decode_box of a side.
template <typename T>
GFL_HD T decode_side(int side, T point, T distance) {
  return side < 2 ? point - distance : point + distance;
}

// x clamped into [0, limit], the image. NaN stays NaN.
template <typename T>
GFL_HD T clip_coordinate(T x, T limit) {
  using S = scalar_t<T>;
  return select(x < S(0), broadcast<T>(S(0)), select(x > limit, limit, x));
}

// Whether x comes before the highest logit so far: it is larger, or the first NaN.
template <typename T>
GFL_HD auto surpasses(T x, T high) {
  return (x > high) | ((x != x) & (high == high));
}

// The distance of a box's coordinate from a point's, < 0 on its wrong side.
template <typename T>
GFL_HD T side_distance(int side, T point, T coordinate) {
  return side < 2 ? point - coordinate : coordinate - point;
}

// sigmoid(x), the weight of a positive.
template <typename T>
GFL_HD T sigmoid(T x) {
  using S = scalar_t<T>;
  const T e = exponential(negative_abs(x));
  const T r = reciprocal(e + S(1));
  return select(x >= S(0), r, e * r);
}

template <typename T>
struct Overlap {
  T width, height;  // may be negative
  T area, area_union;
};

// The union of a box turned inside out may be negative: callers take care of it.
template <typename T>
GFL_HD Overlap<T> overlap_and_union(const T* box, const T* target) {
  using S = scalar_t<T>;
  const T zeros = broadcast<T>(S(0));
  const auto smaller = [](T a, T b) { return select(a < b, a, b); };
  const auto larger = [](T a, T b) { return select(a > b, a, b); };
  const T width = smaller(box[2], target[2]) - larger(box[0], target[0]);
  const T height = smaller(box[3], target[3]) - larger(box[1], target[1]);
  const T area = select(width < S(0), zeros, width) * select(height < S(0), zeros, height);
  return {width, height, area,
          (box[2] - box[0]) * (box[3] - box[1]) +
              (target[2] - target[0]) * (target[3] - target[1]) - area};
}

// Intersection over union, the quality of a positive.
template <typename T>
GFL_HD T box_iou(const T* box, const T* target) {
  using S = scalar_t<T>;
  const Overlap<T> o = overlap_and_union(box, target);
  const T floor = broadcast<T>(S(1e-6));
  return o.area / select(o.area_union < floor, floor, o.area_union);
}

// Kinds of box loss, as in gfl_kernels/ops.py.
enum { kIou, kGiou, kDiou, kCiou, kCiouAll };

template <typename T>
struct BoxLossGrad {
  T loss, grad[4];
};

// Box loss and its derivatives in the box's coordinates. With O the overlap, U the union, C the
// smallest box around both, c its diagonal and rho the distance of the centres:
//   kIou   -log(O / U)
//   kGiou  1 - O / U + (C - U) / C
//   kDiou  1 - O / U + rho^2 / c^2
//   kCiou  the same + alpha v,  v = 4 / pi^2 (atan(target's w / h) - atan(w / h))^2,
//          alpha = v / (1 - O / U + v) a constant, 0 where O / U <= 0.5 or v = 0; the sum is
//          clamped into [0, 2]
//   kCiouAll  the same with alpha at every O / U, and no clamp
// Derivatives are PyTorch's: half of it to each side where a minimum or maximum is a tie, 0 at the
// end of a clamp.
template <typename T>
GFL_HD BoxLossGrad<T> box_loss_grad(int kind, const T* box, const T* target, scalar_t<T> epsilon) {
  using S = scalar_t<T>;
  const T zeros = broadcast<T>(S(0)), ones = broadcast<T>(S(1)), eps = broadcast<T>(epsilon);
  // The derivative of max(a, b) in a; of min(a, b) it is above(b, a).
  const auto above = [&](T a, T b) {
    return select(a > b, ones, select(a == b, broadcast<T>(S(0.5)), zeros));
  };
  const auto floor_slope = [&](T a, T floor) { return select(a > floor, ones, zeros); };
  const Overlap<T> o = overlap_and_union(box, target);
  const T width = box[2] - box[0], height = box[3] - box[1];

  // L depends on the overlap's sides, the box's area, the sides of C, and directly on the box.
  T loss, by_overlap, by_area, by_enclosure_width = zeros, by_enclosure_height = zeros;
  T direct[4] = {zeros, zeros, zeros, zeros};
  const bool clamped = kind == kIou || kind == kGiou;  // U = max(U, eps), else U + eps
  const T area_union =
      clamped ? select(o.area_union < eps, eps, o.area_union) : o.area_union + epsilon;
  const T union_slope = clamped ? floor_slope(o.area_union, eps) : ones;
  const T iou = o.area / area_union;
  const T by_union = union_slope * (iou / area_union);  // of 1 - iou
  if (kind == kIou) {
    const T ratio = select(iou < eps, eps, iou);
    const T slope = floor_slope(iou, eps) / ratio;
    loss = -logarithm(ratio);
    by_area = slope * by_union;
    by_overlap = -slope / area_union - by_area;
  } else {
    const auto span = [&](int low, int high) {
      const T last = select(box[high] > target[high], box[high], target[high]);
      const T side = last - select(box[low] < target[low], box[low], target[low]);
      return select(side < S(0), zeros, side);
    };
    const T enclosure_width = span(0, 2), enclosure_height = span(1, 3);
    if (kind == kGiou) {
      const T product = enclosure_width * enclosure_height;
      const T enclosure = select(product < eps, eps, product);
      loss = S(1) - (iou - (enclosure - area_union) / enclosure);
      by_area = by_union - union_slope / enclosure;
      by_overlap = -ones / area_union - by_area;
      const T by_enclosure = floor_slope(product, eps) * (area_union / enclosure / enclosure);
      by_enclosure_width = by_enclosure * enclosure_height;
      by_enclosure_height = by_enclosure * enclosure_width;
    } else {
      const T dx = (target[0] + target[2]) - (box[0] + box[2]);
      const T dy = (target[1] + target[3]) - (box[1] + box[3]);
      const T square =
          enclosure_width * enclosure_width + enclosure_height * enclosure_height + epsilon;
      const T part = (dx * dx + dy * dy) * S(0.25) / square;
      loss = S(1) - (iou - part);
      by_area = by_union;
      by_overlap = -ones / area_union - by_area;
      const T by_square = S(-2) * part / square;
      by_enclosure_width = by_square * enclosure_width;
      by_enclosure_height = by_square * enclosure_height;
      direct[0] = direct[2] = S(-0.5) * dx / square;
      direct[1] = direct[3] = S(-0.5) * dy / square;
      if (kind != kDiou) {
        const T tall = height + epsilon;
        const T angle = arctangent((target[2] - target[0]) / (target[3] - target[1] + epsilon)) -
                        arctangent(width / tall);
        const T v = S(0.4052847345693511) * (angle * angle);  // 4 / pi^2
        const T factor = v / select(v > S(0), (S(1) - iou) + v, ones);
        const T alpha = kind == kCiou ? select(iou > S(0.5), factor, zeros) : factor;
        loss = loss + alpha * v;
        const T by_ratio =
            S(-2 * 0.4052847345693511) * (alpha * angle) / (width * width + tall * tall);
        direct[0] = direct[0] - by_ratio * tall;
        direct[2] = direct[2] + by_ratio * tall;
        direct[1] = direct[1] + by_ratio * width;
        direct[3] = direct[3] - by_ratio * width;
      }
    }
  }

  BoxLossGrad<T> result;
  result.loss = loss;
  T scale = ones;
  if (kind == kCiou) {
    result.loss = select(loss < S(0), zeros, select(loss > S(2), ones + ones, loss));
    scale = select((loss <= S(0)) | (loss >= S(2)), zeros, ones);
  }
  // A side of the overlap or of C that was cut off at 0 stands still.
  const T overlap_width = select(o.width > S(0), o.width, zeros);
  const T overlap_height = select(o.height > S(0), o.height, zeros);
  const T by_width = select(o.width > S(0), by_overlap * overlap_height, zeros);
  const T by_height = select(o.height > S(0), by_overlap * overlap_width, zeros);
  for (int low = 0; low < 2; ++low) {
    const int high = low + 2;
    const T by_side = low ? by_height : by_width;
    const T by_enclosure_side = low ? by_enclosure_height : by_enclosure_width;
    const T other = by_area * (low ? width : height);
    result.grad[low] = scale * (direct[low] - by_side * above(box[low], target[low]) -
                                by_enclosure_side * above(target[low], box[low]) - other);
    result.grad[high] = scale * (direct[high] + by_side * above(target[high], box[high]) +
                                 by_enclosure_side * above(box[high], target[high]) + other);
  }
  return result;
}

}  // namespace gfl
